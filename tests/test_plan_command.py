"""`flux2-trt plan`: exit codes, one line of an error, what people read and what programs do."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner, Result

from flux2_trt.cli import app


def plan(*arguments: str) -> Result:
    result = CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False)
    assert "Traceback" not in result.output
    return result


def test_a_table_and_a_few_sentences() -> None:
    result = plan("dev", "--target", "rtx4090", "--width", "1024", "--height", "1024")
    assert result.exit_code == 0
    title, _, *rest = result.stdout.splitlines()
    assert title == "dev in fp8 on rtx4090 with 24.0 GB: 1 picture of 1024x1024, 50 steps"
    rows = {line.split()[0]: line for line in rest[:5]}
    assert "swapped in for its stage" in rows["text_encoder"]
    assert "blocks streamed" in rows["transformer"]
    assert "944 ms" in rows["transformer"] and rows["transformer"].endswith("compute")
    text = result.stdout
    assert "streaming hides behind compute (needs flux2-trt build --plans blocks)" in text
    assert "At best 944 ms a step, bound by compute" in text and "floors from peak rates, not measured" in text
    assert "scratch 2.0 GB (estimate)" in text and "context 1.0 GB (assumed)" in text
    assert "--text-encoder remote (" in text
    assert len(rest) <= 13


def test_nothing_moves_on_an_h100() -> None:
    text = plan("dev", "--target", "h100").stdout
    assert "Everything stays on the device." in text
    assert text.count("resident") == 4


def test_a_remote_text_encoder_and_references() -> None:
    result = plan(
        "klein-4b", "--target", "rtx4090", "--text-encoder", "remote", "--images", "2", "--batch", "2", "--steps", "8"
    )
    title, *rest = result.stdout.splitlines()
    assert title.endswith(": 2 pictures at once of 1360x768, 2 references of 1 MP, 8 steps")
    rows = {line.split()[0]: line.split() for line in rest if line}
    assert rows["text_encoder"][1:3] == ["-", "remote"]
    assert rows["vae_encoder"][4] == "2" and rows["vae_decoder"][4] == "2" and rows["transformer"][4] == "8"


def test_json_is_one_object() -> None:
    result = plan("dev", "--target", "rtx4090", "--text-encoder", "remote", "--json")
    [line] = result.stdout.splitlines()
    found = json.loads(line)
    assert found["model"] == "dev" and found["target"] == "rtx4090" and found["precision"] == "fp8"
    assert sum(found["budget_bytes"].values()) == found["device_bytes"] <= found["memory_bytes"] == 24 * 10**9
    assert found["scratch_source"] == "estimate"
    assert found["hardware"]["bus"]["name"] == "PCIe 4.0 x16" and found["hardware"]["source"]
    components = {each["name"]: each for each in found["components"]}
    assert components["text_encoder"] == {"name": "text_encoder", "kind": "remote"}
    assert components["vae_encoder"] == {"name": "vae_encoder", "kind": "unused"}
    transformer = components["transformer"]
    assert transformer["kind"] == "streamed"
    assert transformer["streamed_bytes_per_step"] == found["pinned_host_bytes"] > 11 * 10**9
    assert found["copies_hide"] and found["step_bound"] == "compute"
    assert found["step_floor_seconds"] == transformer["floor_seconds"] == pytest.approx(0.940, abs=0.001)
    assert found["picture_floor_seconds"] > 50 * found["step_floor_seconds"]
    assert [each["flags"] for each in found["faster"]] == ["--precision fp8-attention"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("deb", "--target", "h100"), "error: unknown model 'deb'; known are tiny, dev"),
        (("dev", "--target", "tpu"), "error: unknown target 'tpu'; this version builds for cpu, gb300"),
        (("dev", "--target", "rtx3090", "--precision", "fp8"), "error: target rtx3090 does not run precision 'fp8'"),
        (("dev", "--target", "h100", "--width", "100"), "error: size 100x768 is not allowed; sides are multiples of"),
        (("dev", "--target", "h100", "--memory", "0"), "error: --memory is 0; give gigabytes above 0"),
        (("dev", "--target", "h100", "--batch", "0"), "error: --batch is 0; it is at least 1"),
        (("dev", "--target", "h100", "--num-references", "-1"), "error: --num-references is -1; it is at least 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments: tuple[str, ...], message: str) -> None:
    result = plan(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    [line] = result.stderr.splitlines()
    assert line.startswith(message)


def test_what_does_not_fit_exits_1_with_advice() -> None:
    result = plan("klein-4b", "--target", "rtx4090", "--memory", "4.2")
    assert (result.exit_code, result.stdout) == (1, "")
    [line] = result.stderr.splitlines()
    assert line.startswith("error: klein-4b in fp8 at 1360x768, batch 1, needs at least 6.7")
    assert line.endswith("and 4.20 GB are free; it fits with --text-encoder remote")
    assert plan("klein-4b", "--target", "rtx4090", "--memory", "4.2", "--text-encoder", "remote").exit_code == 0
    found = json.loads(plan("klein-4b", "--target", "rtx4090", "--memory", "4.2", "--json").stdout)
    assert found["exit_code"] == 1 and "needs at least" in found["error"]
