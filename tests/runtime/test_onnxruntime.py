"""The pool of threads that ONNX Runtime is given."""

from __future__ import annotations

import os

import pytest

import flux2_trt.runtime.onnxruntime as module


@pytest.mark.parametrize(("usable", "threads"), [({0, 1, 2, 3}, 0), ({2}, 1), ({1, 3}, 2)])
def test_a_process_that_is_kept_on_some_cores_has_threads_for_these(
    usable: set[int], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: usable, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(module.onnxruntime, "set_global_thread_pool_sizes", lambda *sizes: asked.append(sizes), False)
    assert module._share_threads.__wrapped__()
    assert asked == [(threads, 1)]
