"""Results: every field survives the file, and a file that is something else is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from bench_stand_ins import result

from benchmarks.harness.record import RecordError, from_json
from benchmarks.harness.result import SCHEMA, VERSION, Result, read_result
from flux2_trt.errors import UsageError

LAYOUT_OF_VERSION_1 = {
    "": "created gemm identity measurements missing options primary quality schema stopped systems version",
    "gemm": "flops_per_second library number_format shape",
    "systems": "facts first_seconds load_seconds loaded_host_bytes name same_latents title track",
    "measurements": "case clocks_mhz others_share peak_device_bytes peak_host_bytes samples scenario system throttling "
    "watched work",
    "measurements.case": "batch height references steps width",
    "measurements.work": "attention call floor_seconds step",
    "measurements.samples": "cpu_seconds energy_joules seconds stages",
    "measurements.watched": "gaps stages steps",
    "quality": "clip identical latent_error_by_step lpips pictures psnr_db reference scores ssim system",
}


def written(folder: Path, values: Any = None) -> Path:
    path = folder / "result.json"
    result().write(path)
    if values is not None:
        path.write_text(json.dumps(values), encoding="utf-8")
    return path


def stored(folder: Path) -> dict[str, Any]:
    return json.loads(written(folder).read_text(encoding="utf-8"))


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    assert read_result(written(tmp_path)) == result()


def test_a_change_of_the_layout_needs_another_version(tmp_path: Path) -> None:
    """Files of version 1 have these fields, whatever the code calls them."""
    values = stored(tmp_path)
    assert (values["schema"], values["version"]) == ("flux2-trt/benchmark", 1) == (SCHEMA, VERSION)
    for path, names in LAYOUT_OF_VERSION_1.items():
        found: Any = values
        for step in filter(None, path.split(".")):
            found = found[step][0] if isinstance(found[step], list) else found[step]
        assert sorted(found) == names.split(), path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.pop("measurements"), "result lacks measurements"),
        (lambda v: v.update(more=1), "result has the unknown more"),
        (lambda v: v["systems"][0].update(track="fast"), "result.systems[0].track is 'fast', not one of 'exact'"),
        (
            lambda v: v["measurements"][1]["samples"][0].update(seconds="0.2"),
            ".samples[0].seconds is '0.2', not a numb",
        ),
        (lambda v: v["measurements"][0]["case"].update(width=True), ".case.width is True, not int"),
        (lambda v: v["gemm"].update(shape=[1, 2]), "result.gemm.shape is [1, 2], not 3 values"),
        (lambda v: v["quality"][0].update(latent_error_by_step=[float("nan")]), "is nan, not a finite number"),
        (lambda v: v.update(created=None), "result.created is None, not str"),
    ],
)
def test_damage_is_found_and_named(tmp_path: Path, change: Any, message: str) -> None:
    values = stored(tmp_path)
    change(values)
    with pytest.raises(RecordError) as found:
        from_json(Result, values)
    assert message in str(found.value)
    with pytest.raises(UsageError, match=r"result.json is damaged: .*; measure again"):
        read_result(written(tmp_path, values))


def test_another_version_says_which_and_what_to_do(tmp_path: Path) -> None:
    path = written(tmp_path, stored(tmp_path) | {"version": 2})
    with pytest.raises(UsageError, match=r"has version 2 of the schema, and this flux2-trt reads 1; measure again, or"):
        read_result(path)


def test_other_files_are_not_results(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is no result of flux2-trt bench: its schema is not"):
        read_result(written(tmp_path, {"builds": []}))
    with pytest.raises(UsageError, match=r"is no result of flux2-trt bench"):
        read_result(written(tmp_path, [1]))
    half = written(tmp_path)
    half.write_bytes(half.read_bytes()[:1000])
    with pytest.raises(UsageError, match=r"result.json cannot be read: .*; give a file that flux2-trt bench wrote"):
        read_result(half)
    with pytest.raises(UsageError, match="cannot be read"):
        read_result(tmp_path / "nothing.json")
