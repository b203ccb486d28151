"""The command line: exit codes, which stream gets what, no file half-made. Pipeline and builder are stand-ins."""

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from fake_endpoint import answering, completion
from PIL import Image
from typer.testing import CliRunner, Result

from flux2_trt.bundle import Bundle, ComponentRecord, content_key
from flux2_trt.cli import app
from flux2_trt.errors import CheckpointError
from flux2_trt.finishing import PictureSettings
from flux2_trt.metadata import read_parameters
from flux2_trt.models import published_spec
from flux2_trt.store import Store

COMMAND = [sys.executable, "-m", "flux2_trt.cli"]


def publish(model: str = "tiny", recipe: str = "fp32", target: str = "cpu", source: dict | None = None) -> Path:
    key = content_key({"model": model, "recipe": recipe, "target": target, "source": source or {}})
    with Store().publish(key, model=published_spec(model), recipe=recipe, target=target) as draft:
        if not draft.done:
            records = []
            for component in draft.model.components:
                plan = draft.plan_path(component, ".onnx")
                plan.write_bytes(b"plan")
                record = ComponentRecord(
                    name=component,
                    plan=draft.record(plan),
                    graph_sha256="0" * 64,
                    compiler="onnxruntime",
                    compiler_version="1",
                    weights=None,
                    weight_placement="embedded",
                    shapes={},
                    layers={},
                )
                records.append(record)
            draft.finish(records, [], source=source or {})
    return draft.bundle.path


@dataclass
class Bench:
    """What the stand-ins were asked for, and what they are to do."""

    loads: list[Path] = field(default_factory=list)
    backends: list[str] = field(default_factory=list)
    calls: list[dict] = field(default_factory=list)
    builds: list[dict] = field(default_factory=list)
    closed: int = 0
    truncated: bool = False
    failure: BaseException | None = None
    failing_step: int = 0
    failing_picture: int = 0
    before_failing: Callable[[], object] = lambda: None
    overlaps: bool = False
    left: str | None = None
    refused: tuple[str | None, ...] = ()


@pytest.fixture
def bench(monkeypatch, tmp_path) -> Bench:
    monkeypatch.setenv("FLUX2_TRT_HOME", str(tmp_path / "home"))
    for variable in ("OPENROUTER_API_KEY", "UPSAMPLE_API_KEY", "TEXT_ENCODER_PATH"):
        monkeypatch.delenv(variable, raising=False)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    bench = Bench()

    class StandInPipeline:
        def __init__(self, bundle: Bundle) -> None:
            self.bundle, self.spec = bundle, bundle.manifest.model
            self.runtime = SimpleNamespace(overlaps=bench.overlaps, computes_on_host=not bench.overlaps)

        @staticmethod
        def from_bundle(path, backend):
            bench.loads.append(Path(path))
            bench.backends.append(backend)
            return StandInPipeline(Bundle.open(path))

        def close(self):
            bench.closed += 1

        def __call__(self, *, seed, width, height, num_inference_steps, num_images_per_prompt, **rest):
            asked = {"seed": seed, "width": width, "height": height, "num_inference_steps": num_inference_steps}
            bench.calls.append(asked | {"num_images_per_prompt": num_images_per_prompt} | rest)
            print("a library prints this")
            sampling = self.spec.sampling
            steps = num_inference_steps or len(rest["sigmas"] or ()) or sampling.num_inference_steps
            size = (width or sampling.width, height or sampling.height)
            guidance = rest["guidance_scale"] or sampling.guidance_scale
            refused = bench.refused or (None,) * num_images_per_prompt
            images = [Image.new("RGB", size, "red") for _ in range(num_images_per_prompt)]
            with ThreadPoolExecutor(1) as thread:
                for picture, image in enumerate(images):
                    for step in range(steps):
                        if bench.failure and (picture, step) == (bench.failing_picture, bench.failing_step):
                            bench.before_failing()
                            raise bench.failure
                        rest["callback_on_step_end"](self, step, 1.0, {"latents": None})
                    settings = PictureSettings(picture, seed + picture, *size, steps, guidance)
                    arguments = (settings, image, refused[picture])
                    if self.runtime.overlaps:
                        thread.submit(rest["callback_on_picture"], *arguments)
                    else:
                        rest["callback_on_picture"](*arguments)
            return SimpleNamespace(
                images=images,
                seed=seed,
                seeds=[seed + index for index in range(num_images_per_prompt)],
                width=size[0],
                height=size[1],
                num_inference_steps=steps,
                guidance_scale=guidance,
                truncated=(bench.truncated,),
                refused=refused,
                timings={"total": 0.5},
            )

    pipeline = ModuleType("flux2_trt.pipeline")
    pipeline.Flux2Pipeline = StandInPipeline
    monkeypatch.setitem(sys.modules, "flux2_trt.pipeline", pipeline)

    @dataclass(frozen=True)
    class BuildRequest:
        model: str
        target: str = "auto"
        precision: str | None = None
        components: tuple[str, ...] | None = None
        checkpoint: str | None = None
        weights: str | None = None
        calibration: Path | None = None
        sizes: tuple[str, ...] = ("any",)
        max_batch: int = 1
        max_references: int = 1
        plans: str = "whole"
        prepare: bool = False
        loras: tuple[object, ...] = ()
        output: Path | None = None

    def build(request, on_progress, on_phase):
        bench.builds.append(asdict(request))
        on_progress("tracing transformer")
        assert on_phase("optimizing", 1, 4)
        print("a library prints this")
        if bench.failure:
            raise bench.failure
        report = {"bundle": str(publish(request.model)), "target": "cpu", "model": request.model, "precision": "fp32"}
        return SimpleNamespace(
            to_dict=lambda: report | {"reused": False, "components": [], "seconds": 1.0, "left": bench.left}
        )

    builder = ModuleType("engines.build")
    builder.BuildRequest, builder.build = BuildRequest, build
    monkeypatch.setitem(sys.modules, "engines.build", builder)
    return bench


def flux2(*arguments: str, typed: str | None = None) -> Result:
    result = CliRunner().invoke(app, list(arguments), input=typed, catch_exceptions=False)
    assert "Traceback" not in result.output
    return result


def the_object(result: Result) -> dict:
    [line] = result.stdout.splitlines()
    return json.loads(line)


def files() -> list[str]:
    return sorted(path.name for path in Path().iterdir())


def reference(name: str, width: int, height: int) -> Path:
    Image.new("RGB", (width, height), "blue").save(name)
    return Path(name)


# run


def test_run_prints_only_the_paths_on_stdout(bench):
    publish()
    result = flux2("run", "a red cube", "--num-images", "2", "--seed", "7")
    assert (result.exit_code, result.stdout) == (0, "flux2-0001.png\nflux2-0002.png\n")
    assert "built-in model tiny" in result.stderr and "seed 7" in result.stderr and not bench.builds
    assert files() == ["flux2-0001.png", "flux2-0002.png"]


def test_the_backend_is_handed_on(bench):
    publish()
    for flags in ([], ["--backend", "torch"], ["--backend", "torch-compile"]):
        assert flux2("run", "a red cube", *flags).exit_code == 0
    assert bench.backends == ["plans", "torch", "torch-compile"]


def test_a_session_loads_again_for_another_backend(bench, terminal):
    publish()
    flux2("run", typed="a cube\nrun\nbackend=torch\nrun\nrun\nbackend=\nrun\nquit\n")
    assert bench.backends == ["plans", "torch", "plans"]
    assert bench.closed == 2  # each before the next one is loaded


def test_a_picture_carries_what_made_it(bench):
    folder = publish()
    Path("refs").mkdir()
    path = reference("refs/cube.png", 256, 128)
    flux2("run", "a red cube", "--image", str(path), "--seed", "7", "--num-images", "2", "--sigmas", "1,0.5")
    parameters = read_parameters("flux2-0002.png")
    assert (parameters.prompt, parameters.seed, parameters.image_index) == ("a red cube", 8, 1)
    assert parameters.model_key == Bundle.open(folder).manifest.key and parameters.model == "tiny"
    assert parameters.sigmas == (1.0, 0.5) and parameters.num_inference_steps == 2
    [found] = parameters.references
    assert (found.name, found.sha256) == ("cube.png", sha256(path.read_bytes()).hexdigest())


def test_json_is_one_object_on_stdout(bench):
    folder = publish()
    result = flux2("run", "a red cube", "--json", "--width", "128", "--guidance", "2")
    report = the_object(result)
    assert report["images"] == ["flux2-0001.png"] and report["bundle"] == str(folder) and report["width"] == 128
    assert report["seeds"] == [report["seed"]] and report["guidance_scale"] == 2 and not report["prompt_truncated"]
    assert "a library prints this" in result.stderr


def test_a_seed_that_was_not_given_is_drawn_and_shown(bench):
    publish()
    results = [flux2("run", "a cube") for _ in range(2)]
    seeds = [call["seed"] for call in bench.calls]
    assert seeds[0] != seeds[1]
    assert all(f"seed {seed}, drawn" in result.stderr for seed, result in zip(seeds, results, strict=True))


def test_quiet_leaves_stderr_to_warnings(bench):
    publish()
    bench.truncated = True
    result = flux2("run", "a cube", "--quiet")
    lines = [line for line in result.stderr.splitlines() if "a library" not in line]
    assert len(lines) == 1 and "longer than tiny reads" in lines[0]


@pytest.mark.parametrize(
    "flags",
    [
        ["--width", "100"],
        ["--width", "1e3"],
        ["--height", "4096"],
        ["--steps", "0"],
        ["--steps", "3", "--sigmas", "1,0.5"],
        ["--guidance", "nan"],
        ["--guidance", "inf"],
        ["--guidance", "-1"],
        ["--seed", "-1"],
        ["--seed", str(2**64)],
        ["--num-images", "0"],
        ["--image", "missing.png"],
        ["--match-image", "1"],
        ["--backend", "onnx"],
        ["--model", "colour"],
        ["--model", "tiny", "--bundle", "."],
        ["-o", "picture.gif"],
        ["--quality", "0", "-o", "picture.jpg"],
        ["--quality", "101", "-o", "picture.jpg"],
        ["--quality", "90"],
        ["--quality", "90", "-o", "picture.png"],
        ["--metadata", "some"],
        ["--watermark", "yes"],
        ["--watermark", "0120"],
        ["--c2pa-cert", "missing.pem", "--c2pa-key", "missing.pem"],
        ["--c2pa-cert", "missing.pem"],
        ["--like", "missing.png"],
        ["-o", "folder/"],
        ["--colour", "red"],
        ["--upsample", "somebody"],
        ["--upsample", "openrouter"],
        ["--upsample", "local"],
        ["--upsample", "https://me:secret@host/v1"],
        ["--upsample", "http://127.0.0.1:1/v1", "--upsample-params", "model=other"],
        ["--upsample-params", "hot"],
        ["--text-encoder", "host"],
        ["--prompt-embeds", "missing.safetensors"],
        ["--endpoint-timeout", "0"],
        ["--safety", "maybe"],
    ],
)
@pytest.mark.parametrize("built", [True, False])
def test_bad_values_are_refused_before_anything_is_built_or_loaded(bench, flags, built):
    if built:
        publish()
    result = flux2("run", "a cube", *flags)
    assert (result.exit_code, result.stdout) == (2, "") and "rror: " in result.stderr
    result = flux2("run", "a cube", "--json", *flags)
    assert result.exit_code == the_object(result)["exit_code"] == 2 and "rror" not in result.stderr
    assert not bench.loads and not bench.builds and not files()


def test_an_existing_picture_is_refused_before_generating_and_a_free_name_given(bench):
    publish()
    for name in ("cube.png", "cube-2.png"):
        Path(name).write_bytes(b"mine")
    result = flux2("run", "a cube", "-o", "cube.png")
    assert result.exit_code == 2 and "cube-3.png" in result.stderr and "--overwrite" in result.stderr
    assert not bench.loads and Path("cube.png").read_bytes() == b"mine"
    assert flux2("run", "a cube", "-o", "cube.png", "--overwrite").exit_code == 0
    assert read_parameters("cube.png").prompt == "a cube" and files() == ["cube-2.png", "cube.png"]


def test_several_pictures_get_numbered_names_and_none_is_taken_if_one_exists(bench):
    publish()
    Path("cube-0002.png").write_bytes(b"mine")
    assert flux2("run", "a cube", "-o", "cube.png", "--num-images", "2").exit_code == 2
    assert files() == ["cube-0002.png"] and not bench.loads
    result = flux2("run", "a cube", "-o", "ball.png", "--num-images", "2")
    assert result.stdout == "ball-0001.png\nball-0002.png\n"


def test_a_folder_as_output_gets_free_names(bench):
    publish()
    Path("out").mkdir()
    assert [flux2("run", "a cube", "-o", "out").stdout for _ in range(2)] == [
        f"{Path('out', name)}\n" for name in ("flux2-0001.png", "flux2-0002.png")
    ]


@pytest.mark.skipif(os.name != "posix", reason="a file is no folder there either, but says so otherwise")
@pytest.mark.parametrize("output", ["/proc/self/cube.png", "/proc/self", "missing/cube.png"])
def test_an_unwritable_folder_is_refused_before_generating(bench, output):
    publish()
    result = flux2("run", "a cube", "-o", output)
    assert result.exit_code == 1 and "folder" in result.stderr and not bench.loads


def test_overwriting_in_an_unwritable_folder_is_refused_before_generating(bench, monkeypatch):
    publish()
    Path("cube.png").write_bytes(b"mine")

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("flux2_trt.outputs.tempfile.TemporaryFile", refuse)  # root may write anywhere
    result = flux2("run", "a cube", "-o", "cube.png", "--overwrite")
    assert result.exit_code == 1 and "Permission denied" in result.stderr and not bench.loads


@pytest.mark.parametrize("flags", [(), ("-o", "cube.png"), ("--num-images", "3")])
def test_ctrl_c_exits_130_and_leaves_nothing(bench, flags):
    publish()
    bench.failure, bench.failing_step = KeyboardInterrupt(), 1
    result = flux2("run", "a cube", *flags)
    assert (result.exit_code, result.stdout) == (130, "") and bench.calls and not files()
    assert the_object(flux2("run", "a cube", "--json", *flags)) == {"error": "interrupted", "exit_code": 130}


@pytest.fixture(params=[False, True], ids=["one after the other", "overlapping"])
def overlaps(request, bench) -> bool:
    """Whether pictures come from another thread than steps, and are written by others still."""
    bench.overlaps = request.param
    return request.param


@pytest.fixture
def written(monkeypatch) -> dict[str, threading.Event]:
    """Events by names of files, set once they are there."""
    from flux2_trt import writing

    events = {f"flux2-{number:04d}.png": threading.Event() for number in range(1, 7)}
    write = writing.write_file

    def write_file(path, data, overwrite):
        write(path, data, overwrite)
        events[path.name].set()

    monkeypatch.setattr(writing, "write_file", write_file)
    return events


def test_ctrl_c_keeps_the_pictures_that_are_written(bench, overlaps, written):
    publish()
    bench.failure, bench.failing_picture, bench.failing_step = KeyboardInterrupt(), 1, 1
    bench.before_failing = lambda: written["flux2-0001.png"].wait(60)
    result = flux2("run", "a cube", "--num-images", "3", "--seed", "7")
    assert (result.exit_code, result.stdout) == (130, "flux2-0001.png\n")
    assert files() == ["flux2-0001.png"] and read_parameters("flux2-0001.png").seed == 7
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("write")]


def test_ctrl_c_in_the_session_keeps_them_too_and_it_goes_on(bench, terminal, overlaps, written):
    publish()
    bench.failure, bench.failing_picture = KeyboardInterrupt(), 2

    def once_two_are_written():
        assert all(written[f"flux2-000{number}.png"].wait(60) for number in (1, 2))
        bench.failing_picture = -1

    bench.before_failing = once_two_are_written
    result = flux2("run", "--num-images", "3", typed="a cube\nrun\nquit\n")
    assert result.exit_code == 0 and "stopped" in result.stderr and len(bench.loads) == 1
    assert result.stdout.splitlines() == files() == [f"flux2-{number:04d}.png" for number in range(1, 6)]


@pytest.mark.parametrize(("code", "said"), [(errno.ENOSPC, "free some space"), (errno.EACCES, "can be written")])
def test_a_picture_that_cannot_be_written_ends_the_run_and_the_others_stay(bench, overlaps, monkeypatch, code, said):
    publish()
    replace = os.replace

    def fail(source, target):
        if Path(target).name == "flux2-0002.png":
            raise OSError(code, os.strerror(code))
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    result = flux2("run", "a cube", "--num-images", "3", "--steps", "2")
    assert result.exit_code == 1 and f"'flux2-0002.png' cannot be written: {os.strerror(code)}" in result.stderr
    assert said in result.stderr and result.stdout.splitlines() == files()
    assert "flux2-0001.png" in files() and "flux2-0002.png" not in files()


def test_names_are_told_in_order_whichever_is_written_first(bench, overlaps, written, monkeypatch):
    publish()
    if overlaps:
        from flux2_trt import writing

        write = writing.write_file

        def last_to_first(path, data, overwrite):
            if path.name != "flux2-0003.png":
                assert written["flux2-0003.png"].wait(60)
            write(path, data, overwrite)

        monkeypatch.setattr(writing, "write_file", last_to_first)
    bench.refused = (None, "it is too red", None)
    result = flux2("run", "a cube", "--num-images", "3")
    assert (result.exit_code, result.stdout) == (1, "flux2-0001.png\nflux2-0003.png\n")
    assert "picture 2 was refused and not written: it is too red" in result.stderr and files() == result.stdout.split()


def test_an_unforeseen_failure_keeps_its_traceback_and_leaves_nothing(bench):
    publish()
    bench.failure = RuntimeError("out of memory")
    result = CliRunner().invoke(app, ["run", "a cube", "--json"])
    assert result.exception is bench.failure and not files()
    assert the_object(result) == {"error": "RuntimeError: out of memory", "exit_code": 1}


def test_match_image_takes_the_size_of_that_reference_as_the_model_sees_it(bench):
    publish()
    small, large = reference("small.png", 256, 144), reference("large.png", 1024, 512)
    images = ["--image", str(small), "--image", str(large)]
    assert flux2("run", "a cube", *images, "--match-image", "1", "-o", "1.png").exit_code == 0
    assert flux2("run", "a cube", *images, "--match-image", "2", "-o", "2.png").exit_code == 0
    assert [(call["width"], call["height"]) for call in bench.calls] == [(256, 144), (512, 256)]
    result = flux2("run", "a cube", *images, "--match-image", "3")
    assert result.exit_code == 2 and "2 reference(s)" in result.stderr
    assert flux2("run", "a cube", *images, "--match-image", "1", "--width", "256").exit_code == 2


def test_guidance_of_a_distilled_model_is_refused(bench):
    publish("klein-4b")
    result = flux2("run", "a cube", "--model", "klein-4b", "--guidance", "3")
    assert result.exit_code == 2 and "distilled" in result.stderr and not bench.loads


# where pictures say that they come from


def test_formats_qualities_and_what_a_file_says(bench):
    publish()
    for name in ("a.jpg", "a.webp", "b.JPEG"):
        assert flux2("run", "a cube", "-o", name, "--seed", "1").stdout == f"{name}\n"
        with Image.open(name) as image:
            assert image.format == ("WEBP" if name == "a.webp" else "JPEG")
        assert read_parameters(name).prompt == "a cube"
    flux2("run", "a cube", "-o", "small.jpg", "--quality", "10", "--metadata", "none")
    assert Path("small.jpg").stat().st_size < Path("a.jpg").stat().st_size
    result = flux2("run", "--like", "small.jpg")
    assert result.exit_code == 2 and "no flux2-trt parameters" in result.stderr
    assert flux2("run", "a cube", "-o", "c.webp", "--num-images", "2").stdout == "c-0001.webp\nc-0002.webp\n"


def test_the_watermark_is_on_for_real_models_and_off_for_tiny(bench):
    publish()
    publish("klein-4b")
    assert the_object(flux2("run", "a cube", "--json"))["watermark_bits"] == [None]
    assert read_parameters("flux2-0001.png").watermark is None
    report = the_object(flux2("run", "a cube", "--json", "--model", "klein-4b"))
    assert report["watermark_bits"] == [46] and len(read_parameters("flux2-0002.png").watermark) == 46
    report = the_object(flux2("run", "a cube", "--json", "--model", "klein-4b", "--watermark", "off"))
    assert report["watermark_bits"] == [None]
    report = the_object(flux2("run", "a cube", "--json", "--watermark", "0110100101"))
    assert report["watermark_bits"] == [10] and read_parameters("flux2-0004.png").watermark == "0110100101"


def test_a_picture_too_small_for_the_watermark_is_written_and_that_is_said(bench):
    publish()
    result = flux2("run", "a cube", "--watermark", "on", "--width", "128", "--height", "128")
    assert (result.exit_code, result.stdout) == (0, "flux2-0001.png\n")
    assert "warning: flux2-0001.png: no watermark: the picture has 128x128 pixels" in result.stderr


def test_like_asks_for_what_the_picture_says_and_flags_change_it(bench):
    folder = publish()
    path = reference("cube.png", 256, 128)
    flux2("run", "a red cube", "--image", str(path), "--seed", "7", "--num-images", "2", "--sigmas", "1,0.5")
    bench.calls.clear()
    assert flux2("run", "--like", "flux2-0002.png", "-o", "again.png").exit_code == 0
    assert flux2("run", "a ball", "--like", "flux2-0002.png", "--steps", "3").exit_code == 0
    again, other = bench.calls
    assert (again["prompt"], again["seed"], again["sigmas"], len(again["image"])) == ("a red cube", 8, (1.0, 0.5), 1)
    assert (again["width"], again["height"], again["guidance_scale"]) == (256, 256, 1.0)
    assert (other["prompt"], other["num_inference_steps"], other["sigmas"]) == ("a ball", 3, None)
    assert {Path(load) for load in bench.loads} == {folder}
    path.unlink()
    result = flux2("run", "--like", "flux2-0002.png")
    assert result.exit_code == 2 and "'cube.png'" in result.stderr and "--image" in result.stderr


def test_like_takes_the_bundle_that_made_the_picture_and_says_where_it_is_gone(bench):
    old = publish()
    flux2("run", "a cube", "--seed", "1")
    publish(recipe="fp8")
    result = flux2("run", "--like", "flux2-0001.png")
    assert Path(bench.loads[-1]) == old and "can differ" not in result.stderr
    Store().remove(old)
    result = flux2("run", "--like", "flux2-0001.png")
    assert result.exit_code == 0 and "the picture can differ" in result.stderr
    result = flux2("run", "--like", "flux2-0001.png", "--model", "dev")
    assert result.exit_code == 3 and "flux2-trt build dev" in result.stderr


def test_like_in_the_session_needs_no_prompt(bench, terminal):
    publish()
    flux2("run", "a cube", "--seed", "5")
    result = flux2("run", typed="like=flux2-0001.png\nrun\nquit\n")
    assert result.stdout == "flux2-0002.png\n" and bench.calls[-1]["seed"] == 5


def test_signed_pictures_are_inspected(bench):
    publish("klein-4b")
    files = the_object(flux2("dev-certificate", "--json"))
    signing = ["--c2pa-cert", files["certificate"], "--c2pa-key", files["key"]]
    path = reference("cube.png", 256, 256)
    assert flux2("run", "a cube", "--model", "klein-4b", "--image", str(path), *signing).exit_code == 0
    [found] = the_object(flux2("inspect", "flux2-0001.png", "--trust", files["root"], "--json"))["pictures"]
    assert found["parameters"]["prompt"] == "a cube" and found["watermark"]["matches"] == 46
    assert found["credentials"]["state"] == "Trusted" and found["credentials"]["ingredients"] == ["cube.png"]
    text = flux2("inspect", "flux2-0001.png").stdout
    assert "46 of 46 bits" in text and "nothing here vouches for" in text and "compositeWith" in text
    assert flux2("dev-certificate").exit_code == 2


def test_a_picture_that_cannot_be_signed_leaves_nothing(bench, monkeypatch):
    publish()
    files = the_object(flux2("dev-certificate", "--json"))
    before = sorted(Path().iterdir())
    monkeypatch.setattr("flux2_trt.credentials.MIME", {"PNG": "image/heic"})
    result = flux2("run", "a cube", "--c2pa-cert", files["certificate"], "--c2pa-key", files["key"])
    assert (result.exit_code, result.stdout) == (1, "") and "could not be signed" in result.stderr
    assert sorted(Path().iterdir()) == before


def test_what_is_no_picture_does_not_hide_the_others(bench):
    reference("cube.png", 256, 256)
    Path("text.png").write_text("hello")
    result = flux2("inspect", "text.png", "cube.png")
    assert result.exit_code == 2 and "'text.png' is not a readable" in result.stderr
    assert result.stdout.startswith("cube.png: PNG, 256x256\n")
    report = the_object(flux2("inspect", "text.png", "cube.png", "--json"))
    assert [bool(found["problem"]) for found in report["pictures"]] == [True, False] and report["exit_code"] == 2
    for flags in (["--watermark", "2"], ["--trust", "missing.pem"], []):
        names = ["cube.png"] if flags else []
        assert the_object(flux2("inspect", *names, *flags, "--json"))["exit_code"] == 2


# prompts that are rewritten, pictures that are refused


def test_a_rewritten_prompt_is_drawn_and_the_typed_one_kept(bench):
    publish()
    with answering(completion("a large red cube")) as endpoint:
        flags = ["--upsample", endpoint.url, "--upsample-model", "m", "--upsample-params", "seed=7"]
        report = the_object(flux2("run", "a cube", *flags, "--json"))
        text = flux2("run", "a cube", *flags)
    assert bench.calls[0]["prompt"] == report["prompts"][0] == "a large red cube"
    assert (report["original_prompt"], report["upsampled_by"]) == ("a cube", "endpoint m")
    assert "rewritten by endpoint m: a large red cube" in text.stderr and text.stdout == "flux2-0002.png\n"
    assert endpoint.asked[0].body["seed"] == 7
    parameters = read_parameters("flux2-0001.png")
    assert (parameters.prompt, parameters.original_prompt) == ("a large red cube", "a cube")
    flux2("run", "--like", "flux2-0001.png")
    again = read_parameters("flux2-0003.png")
    assert bench.calls[-1]["prompt"] == "a large red cube" and len(endpoint.asked) == 2
    assert (again.original_prompt, again.upsampled_by) == ("a cube", "endpoint m")
    with answering(completion("another")) as endpoint:
        flux2("run", "--like", "flux2-0001.png", "--upsample", endpoint.url, "--upsample-model", "m")
    assert endpoint.asked[0].body["messages"][1]["content"] == "a cube"  # what was typed is rewritten anew


def test_a_prompt_that_is_not_rewritten_is_drawn_or_with_strict_an_error(bench):
    publish()
    with answering(completion("I'm sorry, but I can't help with that.")) as endpoint:
        flags = ["--upsample", endpoint.url, "--upsample-model", "m"]
        result = flux2("run", "a cube", *flags)
        strict = flux2("run", "a cube", *flags, "--upsample-strict")
    assert result.exit_code == 0 and "warning: the prompt is used as it is" in result.stderr
    assert bench.calls[0]["prompt"] == "a cube" and read_parameters("flux2-0001.png").original_prompt is None
    assert (strict.exit_code, strict.stdout) == (1, "") and "not rewritten: the language model refused" in strict.stderr
    assert len(bench.calls) == 1 and files() == ["flux2-0001.png"]


def test_a_session_can_switch_upsampling(bench, terminal):
    publish()
    with answering(completion("a large cube")) as endpoint:
        typed = f"upsample={endpoint.url} upsample_model=m upsample_strict=on\nshow\na cube\nupsample=\na ball\nquit\n"
        result = flux2("run", typed=typed)
    assert [call["prompt"] for call in bench.calls] == ["a large cube", "a ball"]
    assert "upsample_strict=on" in result.stdout


def test_refused_pictures_are_not_written_and_the_others_are(bench):
    publish()
    bench.refused = (None, "it is too red", None)
    result = flux2("run", "a cube", "--num-images", "3", "-o", "cube.png")
    assert result.exit_code == 1 and result.stdout == "cube-0001.png\ncube-0003.png\n"
    assert "picture 2 was refused and not written: it is too red" in result.stderr
    assert files() == ["cube-0001.png", "cube-0003.png"]
    report = the_object(flux2("run", "a cube", "--num-images", "3", "--seed", "5", "--json"))
    assert report["exit_code"] == 1 and report["refused"] == [{"number": 2, "reason": "it is too red"}]
    assert report["seeds"] == [5, 7] and len(report["images"]) == len(report["watermark_bits"]) == 2


def test_content_checks_are_on_for_the_real_models_and_look_before_a_prompt_is_sent(bench):
    for model in ("tiny", "klein-4b"):
        publish(model)
    with answering(completion("a large cube")) as endpoint:
        flags = ["--upsample", endpoint.url, "--upsample-model", "m"]
        refused = flux2("run", "a cube", "--model", "klein-4b", *flags)
        assert refused.exit_code == 1 and "Mistral-Small" in refused.stderr and "--safety off" in refused.stderr
        assert not endpoint.asked and not bench.calls and not files()
        for model, safety in (("klein-4b", ["--safety", "off"]), ("tiny", [])):
            assert flux2("run", "a cube", "--model", model, *safety, *flags).exit_code == 0
    assert len(bench.calls) == 2


# which bundle


def test_with_nothing_built_tiny_is_built_and_used(bench):
    result = flux2("run", "a cube")
    assert (result.exit_code, result.stdout) == (0, "flux2-0001.png\n")
    assert [(build["model"], build["target"]) for build in bench.builds] == [("tiny", "cpu")]
    assert "building tiny" in result.stderr and "coloured shapes" in result.stderr


def source_of(sha256: str) -> dict:
    return {"weights_sha256": {"transformer": {"transformer.safetensors": sha256}}}


def test_tiny_is_built_again_after_an_update_came_with_other_weights(bench, monkeypatch, tmp_path):
    old = publish(source=source_of("0" * 64))
    monkeypatch.setattr("flux2_trt.models.TINY_ASSETS", tmp_path)
    weights = tmp_path / "transformer.safetensors"
    weights.write_bytes(b"newer")
    os.utime(weights, (1e9, 1e9))  # older than the bundle: not even read
    assert flux2("run", "a cube").exit_code == 0 and not bench.builds
    os.utime(weights, (4e9, 4e9))
    assert flux2("run", "a cube", "--bundle", str(old)).exit_code == 0 and not bench.builds
    result = flux2("run", "a cube")
    assert result.exit_code == 0 and len(bench.builds) == 1 and "building tiny" in result.stderr


def test_a_bundle_of_tiny_with_the_weights_of_the_package_is_used(bench, monkeypatch, tmp_path):
    (tmp_path / "transformer.safetensors").write_bytes(b"newer")
    folder = publish(source=source_of(hashlib.sha256(b"newer").hexdigest()))
    monkeypatch.setattr("flux2_trt.models.TINY_ASSETS", tmp_path)
    os.utime(tmp_path / "transformer.safetensors", (4e9, 4e9))
    assert flux2("run", "a cube").exit_code == 0 and not bench.builds and bench.loads == [folder]


def test_without_the_packages_to_build_tiny_the_exit_code_is_3(bench, monkeypatch):
    monkeypatch.setattr("flux2_trt.runner.BUILD_PACKAGES", ("torch", "no_such_package"))
    result = flux2("run", "a cube")
    assert result.exit_code == 3 and "no_such_package" in result.stderr and not bench.builds and not files()


def test_a_published_model_that_is_not_built_gives_the_build_command(bench):
    result = flux2("run", "a cube", "--model", "dev")
    assert result.exit_code == 3 and "flux2-trt build dev --target" in result.stderr
    assert "coloured shapes" not in result.stderr


def test_a_damaged_bundle_of_tiny_is_named_and_not_built_over(bench):
    plan = publish() / "plans" / "transformer.onnx"
    plan.chmod(0o644)
    plan.write_bytes(b"longer than it was")
    result = flux2("run", "a cube")
    assert result.exit_code == 3 and "rebuild it" in result.stderr and not bench.builds


def test_a_bundle_folder_is_taken_as_it_is(bench, tmp_path):
    folder = publish("klein-4b")
    assert flux2("run", "a cube", "--bundle", str(folder)).exit_code == 0 and bench.loads == [folder]
    result = flux2("run", "a cube", "--bundle", str(tmp_path))
    assert result.exit_code == 3 and "bundle" in result.stderr


def test_pictures_of_made_up_weights_are_said_to_mean_nothing_once(bench, terminal):
    folder = publish(source={"random": 3})
    warning = f"warning: {folder} has made-up weights (random:3): pictures mean nothing\n"
    result = flux2("run", "a cube", "--bundle", str(folder), "--quiet")
    assert result.exit_code == 0 and warning in result.stderr
    assert flux2("run", "--bundle", str(folder), typed="a cube\nrun\nquit\n").stderr.count(warning) == 1
    publish()
    assert "made-up" not in flux2("run", "a cube").stderr


# the session


@pytest.fixture
def terminal(monkeypatch):
    """The streams of that name are a terminal."""
    there = {"<stdin>"}
    monkeypatch.setattr("typer.testing._NamedTextIOWrapper.isatty", lambda self: self.name in there)
    return there


def test_without_prompt_and_terminal_run_is_a_usage_error(bench):
    for flags in ([], ["--json"]):
        assert flux2("run", *flags, typed="a cube\n").exit_code == 2 and not bench.loads


@pytest.mark.parametrize("prompt", ["", " \n"])
def test_an_empty_prompt_is_refused_before_anything_is_built_or_loaded(bench, prompt):
    result = flux2("run", prompt)
    assert (result.exit_code, result.stdout) == (2, "") and "the prompt is empty" in result.stderr
    assert not bench.loads and not bench.builds and not files()


def test_without_prompt_a_terminal_opens_the_session_and_loads_the_model_once(bench, terminal):
    publish()
    result = flux2("run", "--width", "128", typed="a cube\nwidth=100\nrun\nwidth=256 seed=3\nrun\nquit\n")
    assert (result.exit_code, result.stdout) == (0, "flux2-0001.png\nflux2-0002.png\n")
    assert [call["width"] for call in bench.calls] == [128, 256] and len(bench.loads) == 1
    assert "100x256 is not allowed" in result.stderr
    assert result.stderr.count("built-in model tiny") == 1


def test_a_terminal_shows_progress_on_stderr_and_never_with_json_or_quiet(bench, terminal):
    publish()
    terminal.add("<stderr>")
    shown = flux2("run", "a cube", "--num-images", "2")
    assert "drawing" in shown.stderr and shown.stdout == "flux2-0001.png\nflux2-0002.png\n"
    assert not any("drawing" in flux2("run", "a cube", flag).stderr for flag in ("--json", "--quiet"))


def test_bundles_that_this_version_cannot_run_are_passed_over(bench):
    runs = publish()
    publish(recipe="fp8", target="rtx4090")
    assert flux2("run", "a cube").exit_code == 0
    assert [Path(path) for path in bench.loads] == [runs]


# build


def test_a_terminal_shows_how_far_the_compiler_is(bench, terminal):
    terminal.add("<stderr>")
    shown = flux2("build", "tiny").stderr
    assert "tracing transformer" in shown and "optimizing" in shown
    assert not any("optimizing" in flux2("build", "tiny", flag).stderr for flag in ("--json", "--quiet"))


def test_build_prints_the_bundle_and_passes_everything_on(bench, tmp_path):
    result = flux2(
        "build", "tiny", "--target", "cpu", "--precision", "fp32", "--components", "transformer,vae_decoder",
        "--checkpoint", "random:3", "--weights", "bound", "--calibration", "scales.json", "--sizes", "512, 1mp",
        "--max-batch", "2", "--max-references", "3", "--plans", "blocks", "--prepare",
        "--output", str(tmp_path / "home"), "--lora", "a.safetensors:0.5", "--lora", "b.safetensors",
    )  # fmt: skip
    assert result.exit_code == 0 and Path(result.stdout.rstrip("\n")).is_dir() and "tracing" in result.stderr
    assert bench.builds == [
        {
            "model": "tiny",
            "target": "cpu",
            "precision": "fp32",
            "components": ("transformer", "vae_decoder"),
            "checkpoint": "random:3",
            "weights": "bound",
            "calibration": Path("scales.json"),
            "sizes": ("512", "1mp"),
            "max_batch": 2,
            "max_references": 3,
            "plans": "blocks",
            "prepare": True,
            "loras": (
                {"path": Path("a.safetensors"), "strength": 0.5},
                {"path": Path("b.safetensors"), "strength": 1.0},
            ),
            "output": tmp_path / "home",
        }
    ]
    assert the_object(flux2("build", "tiny", "--json"))["model"] == "tiny"


def test_what_is_left_of_a_build_is_said_on_stderr(bench):
    bench.left = "what is left is compiling on an H100"
    result = flux2("build", "tiny")
    assert result.exit_code == 0 and "tiny for cpu in fp32: prepared in 1.0 s" in result.stderr
    assert bench.left in result.stderr and bench.left not in result.stdout
    assert the_object(flux2("build", "tiny", "--json"))["left"] == bench.left


@pytest.mark.parametrize(
    ("failure", "code"),
    [
        (CheckpointError("no weights"), 1),
        (KeyboardInterrupt(), 130),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 1),
    ],
)
def test_a_failed_build_says_why_on_the_right_stream(bench, failure, code):
    bench.failure = failure
    result = flux2("build", "tiny")
    assert (result.exit_code, result.stdout) == (code, "")
    assert the_object(flux2("build", "tiny", "--json"))["exit_code"] == code


# bundles, doctor, version


def test_bundles_are_listed_verified_and_removed(bench):
    assert flux2("bundles", "list").stdout == ""
    folder = publish()
    assert folder.name in flux2("bundles", "list").stdout
    [listed] = the_object(flux2("bundles", "list", "--json"))["bundles"]
    assert listed["path"] == str(folder) and listed["ok"] and listed["model"] == "tiny"
    assert flux2("bundles", "verify").stdout == f"{folder.name}  ok\n"
    assert the_object(flux2("bundles", "verify", folder.name, "--json"))["bundles"][0]["ok"]
    assert flux2("bundles", "remove", folder.name).stdout == f"{folder}\n"
    assert not folder.exists() and flux2("bundles", "remove", folder.name).exit_code == 3
    assert flux2("bundles", "remove", "/etc/passwd").exit_code == 2


def test_a_build_that_was_interrupted_is_listed_and_removed(bench):
    key = content_key({"model": "tiny"})
    with (
        pytest.raises(KeyboardInterrupt),
        Store().publish(key, model=published_spec("tiny"), recipe="fp8", target="cpu") as draft,
    ):
        draft.weights_path("transformer").write_bytes(b"weights")
        draft.journal_path("transformer").touch()
        raise KeyboardInterrupt
    line = flux2("bundles", "list").stdout
    assert line.startswith(draft.name) and "unfinished: the same build goes on with it" in line
    listed = the_object(flux2("bundles", "list", "--json"))
    assert listed["bundles"] == [] and [each["name"] for each in listed["unfinished"]] == [draft.name]
    assert flux2("bundles", "remove", draft.name).exit_code == 0
    assert flux2("bundles", "list").stdout == ""


def test_verify_exits_3_and_names_the_damaged_file(bench):
    sound, folder = publish(), publish("dev")
    plan = folder / "plans" / "transformer.onnx"
    plan.chmod(0o644)
    plan.write_bytes(b"naln")
    result = flux2("bundles", "verify")
    assert (
        result.exit_code == 3 and "transformer.onnx: sha256" in result.stdout and f"{sound.name}  ok" in result.stdout
    )
    assert the_object(flux2("bundles", "verify", "--json"))["exit_code"] == 3


def test_doctor_says_what_is_there(bench, monkeypatch):
    publish()
    monkeypatch.setattr("flux2_trt.doctor.PACKAGES", {"nothing": (("no-such-package",), "pip install nothing")})
    result = flux2("doctor")
    assert result.exit_code == 0 and "cpu path      works" in result.stdout
    assert "not installed: pip install nothing" in result.stdout
    report = the_object(flux2("doctor", "--json"))
    assert report["cpu_problem"] is None and report["packages"] == {"nothing": None}
    assert report["bundles"][0]["model"] == "tiny" and report["store_bytes"] > 0
    monkeypatch.setattr("flux2_trt.doctor.CPU_PROVIDER", "NoProvider")
    assert flux2("doctor").exit_code == 1


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("echo 'NVIDIA H100, 81559, 550.1, 9.0'", (("NVIDIA H100", 81559 * 2**20, "550.1", "9.0"), "nvidia-smi")),
        ("echo 'NVIDIA-SMI has failed' >&2; exit 9", (None, "nvidia-smi: NVIDIA-SMI has failed")),
        ("echo 'no csv'", (None, "nvidia-smi: not enough values")),
    ],
)
@pytest.mark.skipif(os.name != "posix", reason="the stand-in for nvidia-smi is a shell script")
def test_gpus_are_found_with_nvidia_smi_where_there_is_no_nvml(bench, monkeypatch, tmp_path, script, found):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    from flux2_trt.doctor import Gpu, find_gpus

    gpus, source = find_gpus()
    assert gpus == ((Gpu(*found[0]),) if found[0] else ()) and source.startswith(found[1])


def test_no_arguments_is_a_usage_error_with_the_help(bench):
    result = flux2()
    assert (result.exit_code, result.stdout) == (2, "") and "Usage" in result.stderr


def test_a_reader_that_left_is_no_traceback():
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*COMMAND, "--version"], stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writing)
    assert done.returncode == 1 and not done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="file names are bytes there")
def test_a_path_that_is_no_unicode_is_printed_as_it_is(bench):
    publish()
    Path(os.fsdecode(b"out-\xff")).mkdir()
    result = flux2("run", "a cube", "-o", os.fsdecode(b"out-\xff"))
    assert result.stdout_bytes == b"out-\xff/flux2-0001.png\n"
    assert the_object(flux2("run", "a cube", "--json", "-o", os.fsdecode(b"out-\xff")))["images"]
