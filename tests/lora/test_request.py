"""FILE:STRENGTH, as it is typed."""

from pathlib import Path

import pytest

from flux2_trt.errors import UsageError
from flux2_trt.lora.request import LoraRequest


@pytest.mark.parametrize(
    ("text", "path", "strength"),
    [
        ("style.safetensors", "style.safetensors", 1.0),
        ("style.safetensors:0.8", "style.safetensors", 0.8),
        ("a:b/style.safetensors:-1e-1", "a:b/style.safetensors", -0.1),
        (r"C:\loras\style.safetensors", r"C:\loras\style.safetensors", 1.0),
        (r"C:\loras\style.safetensors:2", r"C:\loras\style.safetensors", 2.0),
        ("style.safetensors:0", "style.safetensors", 0.0),
    ],
)
def test_what_follows_the_last_colon_is_a_strength_if_it_is_a_number(text, path, strength):
    request = LoraRequest.parse(text)
    assert request == LoraRequest(Path(path), strength)
    assert LoraRequest.parse(str(request)) == request


@pytest.mark.parametrize("text", ["", ":0.8", "style.safetensors:nan", "style.safetensors:inf"])
def test_others_are_refused_with_an_example(text):
    with pytest.raises(UsageError, match=r"write for example style\.safetensors:0\.8"):
        LoraRequest.parse(text)


def test_a_home_folder_is_found(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert LoraRequest.parse("~/a.safetensors:0.5").path == tmp_path / "a.safetensors"
