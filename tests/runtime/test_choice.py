"""Which bundle of a model is run where none is named."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import flux2_trt.doctor
from flux2_trt.bundle import Bundle
from flux2_trt.doctor import Gpu
from flux2_trt.errors import BundleError
from flux2_trt.manifest import MANIFEST_FILE, UNCOMPILED, Manifest
from flux2_trt.runtime.choice import find_runnable, runnable_targets
from flux2_trt.store import Store

H100 = Gpu("NVIDIA H100 80GB HBM3", 80 * 10**9, "580.1", "9.0")
RTX4090 = Gpu("NVIDIA GeForce RTX 4090", 24 * 10**9, "580.1", "8.9")


def machine(monkeypatch: pytest.MonkeyPatch, *gpus: Gpu) -> None:
    monkeypatch.setattr(flux2_trt.doctor, "find_gpus", lambda: (gpus, "NVML"))


@pytest.fixture
def store(built: dict[str, Bundle], tmp_path: Path) -> Store:
    """`tiny` compiled for the CPU and a 4090, and prepared for an H100; the contents are those of other targets."""
    store = Store(tmp_path)
    for number, (kind, target, compiler) in enumerate(
        [("cpu", "cpu", "onnxruntime"), ("whole", "rtx4090", "tensorrt_rtx"), ("whole", "h100", UNCOMPILED)]
    ):
        manifest: Manifest = built[kind].manifest
        key = f"{number}{manifest.key[1:]}"
        records = tuple(replace(record, compiler=compiler) for record in manifest.components)
        changed = replace(manifest, target=target, recipe="bf16", key=key, components=records)
        folder = store.bundles / f"tiny-bf16-{target}-{key[:12]}"
        shutil.copytree(built[kind].path, folder, copy_function=os.link)
        (folder / MANIFEST_FILE).unlink()
        (folder / MANIFEST_FILE).write_text(changed.to_json(), encoding="utf-8")
    return store


def test_a_gpu_of_this_machine_comes_before_the_cpu(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch)
    assert runnable_targets() == ("cpu",)
    assert "-cpu-" in find_runnable(store, "tiny").name
    machine(monkeypatch, RTX4090)
    assert "-rtx4090-" in find_runnable(store, "tiny").name


def test_what_is_only_prepared_is_found_for_torch(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, H100, RTX4090)
    targets = runnable_targets()
    assert targets[0] == "h100" and "rtx4090" in targets and targets[-1] == "cpu"
    assert "-rtx4090-" in find_runnable(store, "tiny").name
    assert "-h100-" in find_runnable(store, "tiny", "torch").name


def test_a_model_that_is_not_there_is_told_with_its_command(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, RTX4090)
    with pytest.raises(BundleError, match="flux2-trt build klein-4b --target cpu"):
        find_runnable(store, "klein-4b")
