"""Runner: from checked options to pictures on disk; the pipeline stays loaded between requests."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flux2_trt.console import Console
from flux2_trt.credentials import Ingredient
from flux2_trt.errors import BundleError, Flux2Error, UsageError
from flux2_trt.manifest import SYNTHETIC, Manifest
from flux2_trt.options import DEFAULT_MODEL, RunOptions
from flux2_trt.outputs import reserved_names
from flux2_trt.spec import ModelSpec
from flux2_trt.version import own_version

if TYPE_CHECKING:
    from PIL import Image

    from flux2_trt.finishing import PictureSettings
    from flux2_trt.imprint import File
    from flux2_trt.lora.request import LoraRequest
    from flux2_trt.pipeline import Flux2Pipeline, Output
    from flux2_trt.preparation import Wording
    from flux2_trt.provenance import Parameters
    from flux2_trt.runtime.engine import Backend
    from flux2_trt.safety import ContentChecks
    from flux2_trt.watermark import Pixels
    from flux2_trt.writing import Writing

TINY = "tiny"
SEED_BITS = 32
BUILD_PACKAGES = ("torch", "onnx", "onnxscript", "engines", "export")


@dataclass(frozen=True)
class Refused:
    """A picture that the content checks refused, counted from 1: nothing of it is written."""

    number: int
    reason: str


@dataclass(frozen=True)
class RunReport:
    """What came of one request; `images` are paths, `seeds` each picture's own, `timings` seconds by stage.

    `watermark_bits`: how many bits are read back from each file, None where no watermark was put in. `prompts` are what
    was drawn; `original_prompt` is what was typed and `upsampled_by` who rewrote it, None where nobody did.
    """

    images: list[str]
    seed: int
    seeds: list[int]
    model: str
    bundle: str
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    prompt_truncated: bool
    watermark_bits: list[int | None]
    timings: dict[str, float]
    prompts: list[str]
    original_prompt: str | None
    upsampled_by: str | None
    refused: list[Refused]


class Runner:
    """Makes pictures for one request after the other, with the pipeline of the last one.

    `checks`: content checks of your own, in place of those that the options ask for.
    """

    def __init__(self, console: Console, overwrite: bool = False, checks: ContentChecks | None = None) -> None:
        self._console = console
        self._own_checks = checks
        self._checks_asked: tuple[str | None, ...] = ()
        self._last_checks: ContentChecks | None = None
        self._overwrite = overwrite
        self._pipeline: Flux2Pipeline | None = None
        self._folder: Path | None = None
        self._backend: Backend | None = None
        self._introduced = False
        self._folded: dict[tuple[Any, ...], Path] = {}

    def run(self, options: RunOptions, on_written: Callable[[Path], None]) -> RunReport:
        """Check, draw and write; `on_written` gets each path once its file is whole.

        Raises Flux2Error. Nothing is left behind where it fails but the pictures that were finished.
        """
        from flux2_trt.imprint import Imprint, imprint
        from flux2_trt.like import made_again
        from flux2_trt.metadata import read_parameters
        from flux2_trt.preparation import Preparation, carried
        from flux2_trt.writing import THREADS, Writing

        # 1. What was asked, and of which model: nothing is loaded yet
        made = None if options.like is None else read_parameters(options.like)
        if made is not None:
            options = made_again(made, options)
        if not (options.prompt or "").strip() and (options.prompt is not None or options.prompt_embeds is None):
            wrong = "there is no prompt" if options.prompt is None else "the prompt is empty"
            raise UsageError(f'{wrong}; give one, for example: flux2-trt run "a red cube"')
        self._introduce(options)
        folder, spec = self._locate(options)
        references, hashes = _load_references(options)
        options = _checked(options, spec, references)
        wanted = Imprint.from_options(options, marked=spec.name != TINY)
        ingredients = [Ingredient.from_file(path) for path in options.image] if wanted.signer else []
        preparation = Preparation(self._console, options, spec)

        # 2. The names of the pictures, then the model
        count = options.num_images * preparation.num_prompts
        with reserved_names(options.output, count, self._overwrite) as names:
            pipeline = self._load(folder, options)
            if made is not None and made.model_key != pipeline.bundle.manifest.key:
                self._console.warn(
                    f"{options.like} was made by the bundle {made.model_key[:12]!r} of {made.model!r}, this is "
                    f"{pipeline.bundle.manifest.key[:12]!r} of {spec.name!r}: the picture can differ"
                )

            pipeline.content_checks = self._checks(options, pipeline)

            # 3. The prompt as it is drawn
            wording = preparation.word(pipeline.bundle.manifest, references, pipeline.content_checks)
            if made is not None and wording.prompts == (made.prompt,):
                told = carried(wording.upsampled, made.original_prompt, made.upsampled_by)
                wording = replace(wording, upsampled=told)

            # 4. Draw, and write what is drawn
            seed = secrets.randbits(SEED_BITS) if options.seed is None else options.seed
            parameters = _parameters_of(pipeline, options, wording, hashes)

            def imprinted(settings: PictureSettings, pixels: Pixels, format: str) -> File:
                return imprint(pixels, format, parameters(settings), wanted, ingredients)

            with self._console.clean_results():
                threads = 0 if pipeline.runtime.computes_on_host else THREADS
            with Writing(names, imprinted, on_written, self._console.warn, threads) as writing:
                output = self._draw(pipeline, options, wording, references, seed, writing)
            bits = writing.watermark_bits
        return self._report(pipeline, options, wording, output, names, bits)

    def open(self, options: RunOptions) -> Flux2Pipeline:
        """The pipeline that `options` ask for, kept until they ask for another. Raises Flux2Error."""
        self._introduce(options)
        folder, _ = self._locate(options)
        return self._load(folder, options)

    def close(self) -> None:
        """Frees what the pipeline holds; the next request loads it again."""
        if self._pipeline is not None:
            pipeline, self._pipeline = self._pipeline, None
            pipeline.close()

    def _checks(self, options: RunOptions, pipeline: Flux2Pipeline) -> ContentChecks | None:
        if self._own_checks is not None:
            return None if options.safety == "off" else self._own_checks
        asked = (options.safety, options.safety_model, pipeline.bundle.manifest.key)
        if asked != self._checks_asked:  # those of the last request remember what they have seen
            from flux2_trt.preparation import content_checks

            manifest = pipeline.bundle.manifest
            tested = manifest.model.name != TINY and SYNTHETIC not in manifest.source
            self._checks_asked, self._last_checks = asked, content_checks(options, manifest, tested)
        return self._last_checks

    def _introduce(self, options: RunOptions) -> None:
        if options.model is None and options.bundle is None and not self._introduced:
            self._console.note(
                f"using the built-in model {DEFAULT_MODEL}; it draws coloured shapes (--model for another)"
            )
            self._introduced = True

    def _locate(self, options: RunOptions) -> tuple[Path | None, ModelSpec]:
        """The bundle and the model in it; no bundle where tiny has yet to be built."""
        from flux2_trt.bundle import read_manifest
        from flux2_trt.models import FAMILY, published_spec
        from flux2_trt.runtime.choice import find_runnable
        from flux2_trt.runtime.engine import CPU
        from flux2_trt.store import Store

        if options.bundle is not None:
            if options.model is not None:
                raise UsageError(f"give a model ({options.model}) or a bundle ({options.bundle}), not both")
            return options.bundle, read_manifest(options.bundle).model
        model, store = options.model or DEFAULT_MODEL, Store()
        try:
            folder = find_runnable(store, model, options.backend)
        except BundleError:
            built = {bundle.model for bundle in store.list() if bundle.target == CPU}
            if model in built:
                raise
            if model == TINY:
                return None, published_spec(TINY)
            if model not in FAMILY:
                there = ", ".join(sorted(built)) or "none"
                known = ", ".join(FAMILY)
                raise UsageError(f"unknown model {model!r}; built are {there}; published are {known}") from None
            raise
        manifest = read_manifest(folder)
        if model == TINY and manifest.target == CPU and _is_outdated(manifest) and not _missing_to_build():
            return None, published_spec(TINY)
        return folder, manifest.model

    def _load(self, folder: Path | None, options: RunOptions) -> Flux2Pipeline:
        backend = options.backend
        if folder is None:
            folder = self._build_tiny()
        if options.lora:
            folder = self._with_loras(folder, options.lora)
        if self._pipeline is None or (folder, backend) != (self._folder, self._backend):
            self.close()  # the old one goes before the new one comes
            with self._console.clean_results():
                from flux2_trt.pipeline import Flux2Pipeline

                self._pipeline = Flux2Pipeline.from_bundle(folder, backend)
                self._folder, self._backend = folder, backend
            source = self._pipeline.bundle.manifest.source
            if SYNTHETIC in source:
                self._console.warn(f"{folder} has made-up weights (random:{source[SYNTHETIC]}): pictures mean nothing")
        return self._pipeline

    def _build_tiny(self) -> Path:
        if missing := _missing_to_build():
            raise BundleError(
                f"no bundle of {TINY} is there, and building one needs {', '.join(missing)}; install what is missing, "
                f"then: flux2-trt build {TINY} --target cpu"
            )
        self._console.note(f"building {TINY} for the cpu, once")
        return Path(build_bundle(self._console, model=TINY, target="cpu")["bundle"])

    def _with_loras(self, folder: Path, loras: tuple[LoraRequest, ...]) -> Path:
        """The bundle of `folder` with LoRAs in its weights, which is built where it is not there."""
        from flux2_trt.bundle import read_manifest
        from flux2_trt.lora.bundles import build_arguments, find_bundle, is_of
        from flux2_trt.lora.file import lora_identity
        from flux2_trt.store import Store

        stamps = tuple((lora.file.stat().st_mtime_ns if lora.file.exists() else 0) for lora in loras)
        if (known := self._folded.get((folder, loras, stamps))) and known.exists():
            return known
        base = read_manifest(folder)
        arguments = build_arguments(base, folder, loras)
        identities = [identity for lora in loras if (identity := lora_identity(lora))["strength"]]
        if not identities:
            return folder
        found = find_bundle(Store(), base, identities)
        if found is None:
            self._console.note(f"building {base.model.name} with {' and '.join(map(str, loras))}, once")
            found = Path(build_bundle(self._console, **arguments)["bundle"])
            if not is_of(read_manifest(found), base):
                raise BundleError(
                    f"the weights of {base.model.name} are not those that {folder} was built from; build it again: "
                    f"flux2-trt build {arguments['model']} --target {base.target}"
                )
        self._folded[folder, loras, stamps] = found
        return found

    def _draw(
        self,
        pipeline: Flux2Pipeline,
        options: RunOptions,
        wording: Wording,
        references: list[Image.Image],
        seed: int,
        writing: Writing,
    ) -> Output:
        steps = options.steps or (len(options.sigmas) if options.sigmas else pipeline.spec.sampling.num_inference_steps)
        console, count = self._console, -(-options.num_images * len(wording.prompts) // options.batch)
        asked: dict[str, Any] = {"prompt": wording.prompts[0]}
        if made := wording.embeds:
            asked = {"prompt_embeds": made.embeds, "negative_prompt_embeds": made.negative}
        with console.clean_results(), console.progress("drawing", steps * count) as advance:

            def on_step_end(*_: Any) -> None:
                advance()
                writing.tell()

            return pipeline(
                **asked,
                image=references or None,
                width=options.width,
                height=options.height,
                num_inference_steps=options.steps,
                sigmas=options.sigmas,
                guidance_scale=options.guidance,
                num_images_per_prompt=options.num_images,
                batch_size=options.batch,
                seed=seed,
                output_type="pil",
                callback_on_step_end=on_step_end,
                callback_on_picture=writing.put,
            )

    def _report(
        self,
        pipeline: Flux2Pipeline,
        options: RunOptions,
        wording: Wording,
        output: Output,
        names: list[Path],
        watermark_bits: list[int | None],
    ) -> RunReport:
        truncated = any(output.truncated)
        if truncated:
            limit = f" ({pipeline.spec.prompt.max_length} tokens)" if pipeline.spec.prompt else ""
            self._console.warn(f"the prompt is longer than {pipeline.spec.name} reads{limit}; its end was cut off")
        drawn = ", drawn" if options.seed is None else ""
        self._console.note(
            f"{output.width}x{output.height}, steps {output.num_inference_steps}, guidance {output.guidance_scale:g}, "
            f"seed {output.seed}{drawn}, {output.timings.get('total', 0.0):.2f} s"
        )
        kept = [index for index, reason in enumerate(output.refused) if not reason]
        return RunReport(
            images=[str(names[index]) for index in kept],
            seed=output.seed,
            seeds=[output.seeds[index] for index in kept],
            model=pipeline.spec.name,
            bundle=str(self._folder),
            width=output.width,
            height=output.height,
            num_inference_steps=output.num_inference_steps,
            guidance_scale=output.guidance_scale,
            prompt_truncated=truncated,
            watermark_bits=watermark_bits,
            timings=dict(output.timings),
            prompts=list(wording.prompts),
            original_prompt=wording.upsampled.original,
            upsampled_by=wording.upsampled.by,
            refused=[Refused(index + 1, reason) for index, reason in enumerate(output.refused) if reason],
        )


def _missing_to_build() -> list[str]:
    from importlib.util import find_spec

    return [package for package in BUILD_PACKAGES if find_spec(package) is None]


def _is_outdated(manifest: Manifest) -> bool:
    """Whether the package came with other weights of tiny after the bundle was built."""
    from flux2_trt.bundle import file_sha256
    from flux2_trt.models import TINY_ASSETS

    known = manifest.source.get("weights_sha256", {}).get("transformer", {})
    weights = TINY_ASSETS / "transformer.safetensors"
    if not known or weights.stat().st_mtime < datetime.fromisoformat(manifest.created).timestamp():
        return False
    return file_sha256(weights) not in known.values()


def build_bundle(console: Console, **request: Any) -> dict[str, Any]:
    """Build; the report as plain values. Arguments are those of `engines.build.BuildRequest`."""
    with _building(console):
        from engines.build import BuildRequest, build

        with console.building() as (note, on_phase):
            return build(BuildRequest(**request), on_progress=note, on_phase=on_phase).to_dict()


def calibrate_model(
    console: Console,
    output: Path,
    model: str,
    checkpoint: str | None,
    pictures: Path | None,
    samples: int,
    trajectories: int,
    device: str,
) -> dict[str, Any]:
    """Calibrate and write the file. Arguments are those of `engines.calibration.calibrate`."""
    with _building(console):
        from engines.calibration import calibrate

        if not output.absolute().parent.is_dir():
            raise UsageError(f"{output.parent} is no folder; give a file in one that exists")
        calibration = calibrate(model, checkpoint, pictures, samples, trajectories, device, console.note)
        calibration.write(output)
        return {
            "calibration": str(output),
            "model": calibration.model,
            "samples": calibration.samples,
            "trajectories": calibration.trajectories,
            "linears": len(calibration.input_scales),
        }


@contextmanager
def _building(console: Console) -> Iterator[None]:
    """What needs the packages of a build, and prints with them."""
    try:
        with console.clean_results():
            yield
    except ModuleNotFoundError as error:
        raise Flux2Error(
            f"building needs the package {error.name!r}, which is not installed; pip install torch onnx onnxscript"
        ) from error


def _load_references(options: RunOptions) -> tuple[list[Image.Image], list[str]]:
    """The references, decoded, and the SHA-256 of their files."""
    if not options.image:
        return [], []
    from flux2_trt.bundle import file_sha256
    from flux2_trt.images import load_reference

    return [load_reference(path) for path in options.image], [file_sha256(path) for path in options.image]


def _checked(options: RunOptions, spec: ModelSpec, references: list[Image.Image]) -> RunOptions:
    """The options with the size of the reference that is to be matched. Raises UsageError for what `spec` cannot do."""
    from flux2_trt.images import as_reference, check_size
    from flux2_trt.schedule import sigmas

    sampling, multiple = spec.sampling, spec.autoencoder.pixels_per_token
    if spec.text_encoder is None and options.prompt_embeds is None:
        raise UsageError(f"{spec.name} has no text encoder; give --prompt-embeds FILE in place of a prompt")
    if options.match_image is not None:
        if options.width or options.height:
            raise UsageError("give width and height, or match-image, not both")
        if options.match_image > len(references):
            raise UsageError(
                f"match-image {options.match_image} is not there; {len(references)} reference(s) were given"
            )
        height, width, _ = as_reference(references[options.match_image - 1], spec, len(references)).shape
        options = replace(options, width=width, height=height)
    check_size(options.width or sampling.width, options.height or sampling.height, sampling, multiple)
    if options.steps is not None and options.sigmas is not None:
        sigmas(options.steps, num_tokens=1, custom=options.sigmas)
    if sampling.fixed_guidance and options.guidance not in (None, sampling.guidance_scale):
        raise UsageError(f"{spec.name} is distilled to guidance {sampling.guidance_scale:g}; leave guidance out")
    return options


def _parameters_of(
    pipeline: Flux2Pipeline, options: RunOptions, wording: Wording, hashes: list[str]
) -> Callable[[PictureSettings], Parameters]:
    """What is said of each picture; `hashes`: of the references' files."""
    from flux2_trt.bundle import file_sha256
    from flux2_trt.provenance import Parameters, Reference, UsedLora

    loras = tuple(UsedLora(lora["file"], lora["sha256"], lora["strength"]) for lora in pipeline.bundle.manifest.loras)
    embeds_file = None
    if options.prompt_embeds is not None:
        embeds_file = Reference(options.prompt_embeds.name, file_sha256(options.prompt_embeds))
    references = tuple(Reference(path.name, sha256) for path, sha256 in zip(options.image, hashes, strict=True))

    def parameters(settings: PictureSettings) -> Parameters:
        return Parameters(
            prompt=wording.prompts[settings.index // options.num_images],
            seed=settings.seed,
            width=settings.width,
            height=settings.height,
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
            model=pipeline.spec.name,
            model_key=pipeline.bundle.manifest.key,
            version=own_version(),
            sigmas=options.sigmas,
            references=references,
            image_index=settings.index,
            original_prompt=wording.upsampled.original,
            upsampled_by=wording.upsampled.by,
            prompt_embeds=embeds_file,
            loras=loras,
        )

    return parameters
