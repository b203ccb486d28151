"""Sampling parameters as they are typed: JSON or key=value, and nothing that changes what is asked."""

import pytest

from flux2_trt.errors import UsageError
from flux2_trt.sampling import Sampling


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("top_p=0.9", {"top_p": 0.9}),
        ("top_p=0.9,seed=7 stop=END", {"top_p": 0.9, "seed": 7, "stop": "END"}),
        ('{"top_p": 0.9, "stop": ["a", "b"]}', {"top_p": 0.9, "stop": ["a", "b"]}),
        ("temperature=1,max_tokens=64,flag=true", {"temperature": 1, "max_tokens": 64, "flag": True}),
    ],
)
def test_parameters_are_added_to_the_defaults(text, expected):
    assert Sampling.from_text(text).to_dict() == {"temperature": 0.15, "max_tokens": 512, **expected}


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "top_p", "top_p=", "=1", "{", "[1]", "{}", '{"top_p": NaN}', '{"top_p": 1e999}',
        "[" * 10**5, "{" * 10**5,
        "temperature=hot", "temperature=3", "temperature=true", "max_tokens=0", "max_tokens=1.5", "max_tokens=99999",
        "model=other", '{"messages": []}', "stream=true", "n=5", "tools=x",
    ],
)  # fmt: skip
def test_what_is_no_parameter_is_refused_in_one_line(text):
    with pytest.raises(UsageError) as caught:
        Sampling.from_text(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300
