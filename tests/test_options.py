"""One list of options serves the command line and the session; a bad value says what is allowed."""

import subprocess
import sys
from pathlib import Path

import pytest

from flux2_trt.errors import UsageError
from flux2_trt.lora.request import LoraRequest
from flux2_trt.options import OPTIONS, RunOptions, as_text, options_from_texts, parse_assignment


def assigned(*assignments: str) -> RunOptions:
    options = RunOptions()
    for text in assignments:
        options = parse_assignment(text, options)
    return options


def test_assignments_set_typed_values():
    options = assigned(
        "prompt=a red cube = a box", "image=a.png,b.jpg", "width=512", "match-image=2", "guidance=2.5", "seed=7",
        "sigmas=1,0.5", "output=out.png", "num_images=3", "batch=2", "model=tiny",
    )  # fmt: skip
    assert options == RunOptions(
        prompt="a red cube = a box", image=(Path("a.png"), Path("b.jpg")), width=512, match_image=2, guidance=2.5,
        seed=7, sigmas=(1.0, 0.5), output=Path("out.png"), num_images=3, batch=2, model="tiny",
    )  # fmt: skip


def test_loras_are_typed_with_their_strengths():
    options = assigned("lora=a.safetensors:0.5,b.safetensors")
    assert options.lora == (LoraRequest(Path("a.safetensors"), 0.5), LoraRequest(Path("b.safetensors")))
    assert as_text("lora", options) == "a.safetensors:0.5,b.safetensors"


@pytest.mark.parametrize("name", OPTIONS)
def test_an_empty_value_goes_back_to_the_default(name):
    changed = assigned("width=512", "image=a.png", "num_images=2", "seed=1", f"{name}=")
    assert getattr(changed, name) == getattr(RunOptions(), name)


def test_an_unknown_key_lists_the_known_ones():
    with pytest.raises(UsageError, match=r"unknown option 'colour'.*prompt, model, bundle, lora, backend, image"):
        assigned("colour=red")


@pytest.mark.parametrize(
    ("assignment", "advice"),
    [
        ("width=abc", "width 'abc' is not allowed; give a whole number of pixels"),
        ("width=-16", "whole number"),
        ("width=0", "whole number"),
        ("width=5_0", "whole number"),
        ("height=1e3", "whole number"),
        ("height=\u0661\u0662", "whole number"),
        ("steps=0", "1 to 1000"),
        ("steps=1001", "1 to 1000"),
        ("guidance=nan", "from 0 to 100"),
        ("guidance=inf", "from 0 to 100"),
        ("guidance=-1", "from 0 to 100"),
        ("guidance=1_0", "from 0 to 100"),
        ("seed=-1", r"0 to 2\*\*64 - 1"),
        (f"seed={2**64}", r"0 to 2\*\*64 - 1"),
        ("seed=" + "9" * 9999, "…"),
        ("sigmas=1,nan", "numbers like"),
        ("sigmas=0.5,1", "strictly decrease"),
        ("sigmas=1,,0.5", "numbers like"),
        ("num_images=0", "whole number"),
        ("batch=0", "whole number"),
        ("quality=0", "from 1 to 100"),
        ("quality=101", "from 1 to 100"),
        ("metadata=all", "full, minimal or none"),
        ("watermark=0101", "8 to 256 bits"),
        ("watermark=" + "01" * 1000, "…"),
        ("match_image=0", "from 1"),
        ("width", "no key=value"),
    ],
)
def test_a_bad_value_says_what_is_allowed(assignment, advice):
    with pytest.raises(UsageError, match=advice) as caught:
        assigned(assignment)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_seeds_reach_to_the_largest():
    assert assigned(f"seed={2**64 - 1}").seed == 2**64 - 1


def test_a_command_line_leaves_what_was_not_given_and_keeps_commas_in_file_names():
    options = options_from_texts({"prompt": "", "image": ["a,b.png", "c.png"], "width": None})
    assert options == RunOptions(prompt="", image=(Path("a,b.png"), Path("c.png")))


def test_values_are_shown_as_they_are_typed():
    options = assigned("image=a.png,b.png", "guidance=2.5", "sigmas=1,0.123456789")
    assert options == assigned(*(f"{name}={as_text(name, options)}" for name in OPTIONS))


def test_the_help_needs_no_heavy_import():
    """What would cost more than the 0.3 s in which the help must answer."""
    code = "import sys, flux2_trt.cli; print(*{m.partition('.')[0] for m in sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "PIL", "onnxruntime", "huggingface_hub", "rich", "torch", "onnx", "tokenizers"} & set(loaded)
