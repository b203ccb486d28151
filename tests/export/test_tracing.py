"""Components that other processes trace."""

from __future__ import annotations

import subprocess

import pytest
from diffusers_models import small_spec
from traces import parts_traced_once

from export.tracing import Tracing
from flux2_trt.spec import Component

SPEC = small_spec()
LAST: Component = "conditioning"


class Asked(Exception):
    """The process that asks traces by itself."""


@pytest.fixture
def nothing_is_traced_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def trace_parts(component: Component, *_: object) -> None:
        raise Asked(component)

    monkeypatch.setattr("export.tracing.trace_parts", trace_parts)


@pytest.mark.usefixtures("nothing_is_traced_here")
def test_a_helper_traces_from_the_last_one_back_what_this_process_would() -> None:
    with Tracing(SPEC, "bf16", ("vae_encoder", "transformer", LAST), helpers=1) as tracing:
        with pytest.raises(Asked, match="vae_encoder"):
            tracing.parts("vae_encoder")
        assert tracing.parts(LAST) == parts_traced_once(LAST, SPEC, "bf16")
        assert tracing.helpers_peak_rss_bytes > 100_000_000  # torch alone takes more
        (helper,) = tracing._processes
    assert helper.poll() is not None


@pytest.mark.usefixtures("nothing_is_traced_here")
def test_what_a_helper_fails_at_is_traced_by_who_asks() -> None:
    with Tracing(SPEC, "fp32", ("vae_encoder", "text_encoder", LAST), helpers=2) as tracing:
        for helper in tracing._processes:
            helper.kill()
        for component in ("text_encoder", LAST, "vae_encoder"):
            with pytest.raises(Asked, match=component):
                tracing.parts(component)


def test_one_component_needs_no_helper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(subprocess, "Popen")
    with Tracing(SPEC, "fp32", (LAST,), helpers=3) as tracing:
        assert tracing.parts(LAST) == parts_traced_once(LAST, SPEC)
