"""Requests that cannot be met are refused before anything is made. Builds themselves: tests/test_parity.py."""

import pytest

from engines.build import BuildRequest, build
from engines.sources import resolve_source
from flux2_trt.errors import CheckpointError, UsageError


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (BuildRequest("tiny", target="tpu"), r"unknown target 'tpu'; this version builds for cpu"),
        (BuildRequest("tiny", precision="fp8"), r"target cpu does not run precision 'fp8'; it runs fp32"),
        (BuildRequest("tiny", weights="bound"), r"target cpu takes external weights, not bound"),
        (BuildRequest("tiny", components=("unet",)), r"tiny has no component 'unet'; it has text_encoder, "),
        (BuildRequest("tiny", components=()), r"tiny cannot be built without components"),
        (BuildRequest("flux3"), r"flux3 is no model; give tiny, dev, .*a diffusers folder, or a \.safetensors file"),
        (BuildRequest("tiny", checkpoint="random:x"), r"random:x has no seed; write for example random:0"),
        (BuildRequest("dev", checkpoint="/no/such/folder"), r"/no/such/folder does not exist"),
    ],
)
def test_bad_requests_give_one_line_and_make_nothing(tmp_path, request_, message):
    store = tmp_path / "store"
    values = {name: getattr(request_, name) for name in request_.__dataclass_fields__} | {"output": store}
    with pytest.raises(UsageError, match=message) as caught:
        build(BuildRequest(**values), lambda message: None)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2
    assert not store.exists()


def test_an_empty_folder_is_no_model(tmp_path):
    with pytest.raises(CheckpointError, match=r"model_index\.json is missing"):
        resolve_source(str(tmp_path), None)


def test_synthetic_weights_have_no_files_and_say_so():
    source = resolve_source("klein-4b", "random:7")
    assert source.identity() == {"random": 7} and not source.paths
