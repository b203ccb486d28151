"""The built-in model, built once for all tests of the benchmark."""

from __future__ import annotations

import pytest

from engines.build import BuildRequest, build
from flux2_trt.pipeline import Flux2Pipeline


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Flux2Pipeline:
    report = build(BuildRequest("tiny", "cpu", output=tmp_path_factory.mktemp("tiny")), lambda _: None)
    return Flux2Pipeline.from_bundle(report.bundle)
