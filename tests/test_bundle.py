"""A bundle is believed only where every byte, owner and path is what its manifest says."""

import hashlib
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from flux2_trt import bundle as bundle_module
from flux2_trt.bundle import Bundle, ComponentRecord, FileRecord, Manifest, bundle_name, content_key, file_record
from flux2_trt.errors import BundleError
from flux2_trt.manifest import _digest
from flux2_trt.models import published_spec

KEY = content_key({"graph": "abc"})
COMMAND = "flux2-trt build tiny --target cpu"
FILES = {
    "plans/transformer.onnx": b"plan of the transformer" * 100,
    "weights/transformer.fp32.safetensors": b"weights" * 500,
    "plans/vae_decoder.onnx": b"plan of the decoder" * 100,
    "assets/tokenizer.json": b"{}",
}


def component(name: str, plan: FileRecord, weights: FileRecord | None) -> ComponentRecord:
    return ComponentRecord(
        name=name,
        plan=plan,
        graph_sha256="0" * 64,
        compiler="onnxruntime",
        compiler_version="1.32.0",
        weights=weights,
        weight_placement="bound" if weights else "embedded",
        shapes={"latents": {"dtype": "float32", "shape": ["batch", "tokens", 32]}},
        layers={"MatMul": 12},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / bundle_name("tiny", "fp32", "cpu", KEY)
    records = {}
    for file, content in FILES.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_bytes(content)
        records[file] = file_record(folder / file, folder)
    manifest = Manifest(
        key=KEY,
        model=published_spec("tiny"),
        recipe="fp32",
        target="cpu",
        source={"checkpoint": "random", "seed": 7},
        components=(
            component(
                "transformer", records["plans/transformer.onnx"], records["weights/transformer.fp32.safetensors"]
            ),
            component("vae_decoder", records["plans/vae_decoder.onnx"], None),
        ),
        assets=(records["assets/tokenizer.json"],),
        created="2026-11-24T10:00:00.000000+00:00",
        flux2_trt_version="0.1.0",
    )
    (folder / "bundle.json").write_text(manifest.to_json())
    return folder


def forge(folder: Path, change) -> None:
    """Changes the manifest as somebody would who knows how its digest is made."""
    file = folder / "bundle.json"
    values = json.loads(file.read_text())
    del values["digest"]
    change(values)
    file.write_text(json.dumps({**values, "digest": _digest(values)}))


def refusal(folder: Path, file: str = "bundle.json", command: str = COMMAND) -> str:
    """The text of the error at `open`, which is one line, names the file and ends with the way out."""
    with pytest.raises(BundleError) as caught:
        Bundle.open(folder)
    text = str(caught.value)
    assert "\n" not in text and str(folder / file) in text and text.endswith(command), text
    assert caught.value.exit_code == 3
    return text


def test_open_gives_the_paths_of_a_sound_bundle(folder):
    bundle = Bundle.open(folder)
    bundle.verify()
    assert bundle.plan_path("transformer").read_bytes() == FILES["plans/transformer.onnx"]
    assert bundle.weights_path("transformer").read_bytes() == FILES["weights/transformer.fp32.safetensors"]
    assert bundle.weights_path("vae_decoder") is None
    assert bundle.asset_path("tokenizer.json").read_bytes() == b"{}"
    assert bundle.manifest.model == published_spec("tiny")
    assert bundle.manifest.total_bytes == sum(map(len, FILES.values()))
    with pytest.raises(BundleError, match=r"has no text_encoder, only transformer, vae_decoder; .*flux2-trt build"):
        bundle.plan_path("text_encoder")
    with pytest.raises(BundleError, match=r"has no assets/merges.txt"):
        bundle.asset_path("merges.txt")


def test_manifest_survives_json(folder):
    text = (folder / "bundle.json").read_text()
    manifest = Manifest.from_json(text)
    assert manifest.to_json() == text
    assert Manifest.from_json(manifest.to_json()) == manifest


@pytest.mark.parametrize("file", FILES)
def test_flipped_byte_names_both_digests(folder, file):
    content = bytearray(FILES[file])
    content[-1] ^= 1
    (folder / file).write_bytes(content)
    expected, found = (hashlib.sha256(data).hexdigest()[:12] for data in (FILES[file], content))
    assert f"sha256 {expected} expected, {found} found" in refusal(folder, file)


def test_every_flipped_byte_of_the_manifest_is_refused_or_harmless(folder):
    file = folder / "bundle.json"
    text, sound = file.read_bytes(), Bundle.open(folder).manifest
    for position in range(0, len(text), 7):
        changed = bytearray(text)
        changed[position] ^= 0x02
        file.write_bytes(changed)
        try:
            assert Bundle.inspect(folder).manifest == sound  # a blank that became another character of no meaning
        except BundleError as error:
            assert "\n" not in str(error) and "flux2-trt build" in str(error)


@pytest.mark.parametrize("file", FILES)
def test_truncated_or_missing_file_names_both_sizes(folder, file):
    size = len(FILES[file])
    (folder / file).write_bytes(FILES[file][:-1])
    assert f"{size} bytes expected, {size - 1} found" in refusal(folder, file)
    (folder / file).unlink()
    assert f"{size} bytes expected, no file found" in refusal(folder, file)


def test_truncated_or_missing_manifest_still_tells_the_command(folder):
    file = folder / "bundle.json"
    file.write_bytes(file.read_bytes()[:200])
    assert "no JSON" in refusal(folder)
    file.unlink()
    assert "is missing" in refusal(folder)
    shutil.rmtree(folder)
    with pytest.raises(BundleError, match=rf"is no bundle folder; build one: {COMMAND}"):
        Bundle.open(folder)


@pytest.mark.parametrize(
    "text",
    [b"[" * 100_000, b"\xff\xfe", b"NaN", b"[]", b'{"schema_version": 1, "key": Infinity}', b" " * (16 * 2**20 + 1)],
)
def test_hostile_json_is_one_line(folder, text):
    (folder / "bundle.json").write_bytes(text)
    refusal(folder)


def test_unknown_schema_is_refused_before_its_keys_are_judged(folder):
    forge(folder, lambda values: values.update(schema_version=7, new_key=1))
    assert "schema version 7, this flux2-trt reads 3" in refusal(folder)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda v: v.update(extra=1), "the manifest: unknown keys 'extra'"),
        (lambda v: v.pop("created"), "the manifest: missing keys 'created'"),
        (lambda v: v.pop("schema_version"), "missing keys 'schema_version'"),
        (lambda v: v["components"][0].update(extra=1), "a component: unknown keys 'extra'"),
        (lambda v: v["components"][0]["plan"].pop("sha256"), "plan of a component: missing keys 'sha256'"),
        (lambda v: v["components"][0].update(plan=None), "plan of a component is no JSON object"),
        (lambda v: v["components"][0].update(weights=None), "bound weights without a weight file"),
        (lambda v: v["components"][0].update(weight_placement="magic"), "known are bound, embedded, external"),
        (lambda v: v["components"][0].update(name="upscaler"), "tiny has no component upscaler"),
        (lambda v: v["components"][0]["shapes"].update(x={"dtype": "float32", "shape": [-1]}), "no dtype and shape"),
        (lambda v: v["components"].append(v["components"][0]), "more than one record of a component"),
        (lambda v: v.update(components=[]), "no components"),
        (lambda v: v["components"][0]["plan"].update(bytes=True), "True is no size in bytes"),
        (lambda v: v["components"][0]["plan"].update(sha256="0"), "'0' is no sha256"),
        (lambda v: v.update(created="yesterday"), "is no time with a zone"),
        (lambda v: v.update(created="2026-11-24T10:00:00"), "is no time with a zone"),
        (lambda v: v["model"].update(extra=1), "model: unknown keys extra"),
        (lambda v: v["model"]["transformer"].pop("theta"), "model: keys are missing"),
        (lambda v: v["model"]["transformer"].update(in_channels=64), "takes 64 channels"),
        (lambda v: v["model"].update(transformer=3), "model: "),
    ],
)
def test_forged_manifest_is_refused(folder, change, problem):
    forge(folder, change)
    assert problem in refusal(folder)


def test_manifest_edited_by_hand_is_refused(folder):
    file = folder / "bundle.json"
    text, theta = file.read_text(), published_spec("tiny").transformer.theta
    edited = text.replace(f'"theta": {theta}', '"theta": 3000.0')
    assert edited != text
    file.write_text(edited)
    assert "changed after the build" in refusal(folder)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../other/plan", "plans/../../x", "plans//x", "./x", "", "C:\\x", "a\nb", "bundle.json", 5]
)
def test_names_that_leave_the_bundle_are_refused(folder, name):
    forge(folder, lambda values: values["components"][0]["plan"].update(file=name))
    assert "is no path of a file inside the bundle" in refusal(folder)


@pytest.mark.parametrize("linked", ["plans/transformer.onnx", "plans"])
def test_links_that_leave_the_bundle_are_refused(folder, tmp_path, linked):
    outside = tmp_path / "outside"
    (folder / linked).rename(outside)
    (folder / linked).symlink_to(outside)
    assert "is no file inside the bundle" in refusal(folder, "plans/transformer.onnx")


def test_linked_manifest_and_folder_in_place_of_a_file_are_refused(folder, tmp_path):
    (folder / "assets/tokenizer.json").unlink()
    (folder / "assets/tokenizer.json").mkdir()
    assert "is no file inside the bundle" in refusal(folder, "assets/tokenizer.json")
    (folder / "bundle.json").rename(tmp_path / "elsewhere.json")
    (folder / "bundle.json").symlink_to(tmp_path / "elsewhere.json")
    refusal(folder)


def test_text_of_others_cannot_reach_the_terminal_or_the_shell(folder):
    forge(folder, lambda values: values.update(recipe="\x1b[2J\nrm -rf"))
    assert "\x1b" not in refusal(folder)
    forge(folder, lambda values: values.update(recipe="fp32", target="cpu; rm -rf ~", components=[]))
    refusal(folder, command="flux2-trt build tiny --target 'cpu; rm -rf ~'")


@pytest.mark.parametrize("open_to_all", [".", "plans", "plans/vae_decoder.onnx", "bundle.json"])
def test_world_writable_code_is_refused(folder, open_to_all):
    path = folder / open_to_all
    path.chmod(path.stat().st_mode | 0o002)
    assert f"if you trust it: chmod -R o-w {folder};" in refusal(folder, open_to_all.strip("."))
    os.system(f"chmod -R o-w {folder}")  # the advice works
    Bundle.open(folder)


def test_plan_of_another_user_is_refused(folder, monkeypatch):
    plan = folder / "plans/transformer.onnx"
    if os.geteuid() == 0:
        os.chown(plan, 12345, -1)
        problem = "belongs to user 12345, not to you (0)"
    else:
        mine = os.geteuid()
        monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
        problem = f"belongs to user {mine}, not to you ({mine + 1})"
    with pytest.raises(BundleError, match="sudo chown -R") as caught:
        Bundle.open(folder)
    assert problem in str(caught.value)


def test_plan_that_changes_after_open_is_hashed_again(folder):
    bundle = Bundle.open(folder)
    plan = folder / "plans/transformer.onnx"
    evil = b"evil".ljust(len(FILES["plans/transformer.onnx"]))
    plan.write_bytes(evil)
    with pytest.raises(BundleError, match="sha256"):
        bundle.plan_path("transformer")


def test_large_weights_are_hashed_by_verify_and_plans_always(folder, monkeypatch):
    monkeypatch.setattr(bundle_module, "HASHED_AT_OPEN_BYTES", 10)
    file = "weights/transformer.fp32.safetensors"
    (folder / file).write_bytes(b"x" * len(FILES[file]))
    bundle = Bundle.open(folder)
    bundle.weights_path("transformer")
    with pytest.raises(BundleError, match=r"transformer\.fp32\.safetensors: sha256"):
        bundle.verify()
    (folder / "plans/vae_decoder.onnx").write_bytes(b"x" * len(FILES["plans/vae_decoder.onnx"]))
    refusal(folder, "plans/vae_decoder.onnx")


def test_paths_of_an_inspected_bundle_are_checked_before_use(folder):
    plan = folder / "plans/transformer.onnx"
    plan.write_bytes(b"x" * plan.stat().st_size)
    bundle = Bundle.inspect(folder)
    with pytest.raises(BundleError, match="sha256"):
        bundle.plan_path("transformer")


def test_content_key_depends_on_values_only():
    parts = {"recipe": "fp8", "shapes": {"latents": (1, 2)}, "compiler": "tensorrt_rtx 1.2"}
    key = content_key(parts)
    assert key == content_key({name: parts[name] for name in reversed(parts)})
    assert key == content_key({**parts, "shapes": {"latents": [1, 2]}})
    for name, value in (("recipe", "fp16"), ("shapes", {"latents": (1, 3)}), ("compiler", "tensorrt_rtx 1.3")):
        assert content_key({**parts, name: value}) != key
    with pytest.raises(ValueError, match="not JSON compliant"):
        content_key({"scale": math.nan})
    with pytest.raises(TypeError):
        content_key({"path": Path("x")})


def test_bundle_names_are_plain_file_names():
    name = bundle_name("../My Model\n", "fp8", "rtx4090", KEY)
    assert "/" not in name and name.isprintable() and not name.startswith(".")
    assert name.endswith(f"-fp8-rtx4090-{KEY[:12]}")


def test_a_file_cannot_have_two_records(folder):
    manifest = Bundle.open(folder).manifest
    other = replace(manifest.assets[0], sha256="1" * 64)
    with pytest.raises(BundleError, match="two different records"):
        replace(manifest, assets=(*manifest.assets, other))
