"""Flux2Pipeline: from prompts and reference pictures to pictures."""

from __future__ import annotations

import math
import os
import secrets
import shlex
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flux2_trt.bundle import Bundle
from flux2_trt.drawing import Drawing
from flux2_trt.errors import BundleError, DeviceError, Interrupted, UsageError
from flux2_trt.finishing import Ahead, Finished, Finishing, PictureCallback, PictureSettings
from flux2_trt.images import as_reference, check_size, load_reference
from flux2_trt.latents import pack, unpack
from flux2_trt.noise import noise_batch, picture_seeds
from flux2_trt.runtime.choice import find_runnable
from flux2_trt.runtime.engine import BACKENDS, CPU, PLANS, Backend, Engine, Runtime
from flux2_trt.runtime.host import HostRuntime
from flux2_trt.schedule import sigmas as schedule_sigmas
from flux2_trt.spec import Component, ModelSpec
from flux2_trt.store import Store
from flux2_trt.text import PromptTokenizer, TokenizedPrompts
from flux2_trt.trajectory import Start, trajectory_of

if TYPE_CHECKING:
    from flux2_trt.safety import ContentChecks

Floats = NDArray[np.float32]
Reference = str | Path | Image.Image | NDArray[np.uint8]
OutputType = Literal["pil", "np", "latent"]
StepCallback = Callable[["Flux2Pipeline", int, float, Mapping[str, Any]], Mapping[str, Any] | None]
UNCONDITIONAL = ""


@dataclass(frozen=True)
class Output:
    """Pictures, and what is needed to make each again.

    `images`: PIL pictures, or float32 [B, H, W, 3] in 0..1, or latents [B, C, h, w]. `seed` is the base seed and
    `seeds` each picture's own. `truncated` says of each prompt whether its end was cut. `timings` are seconds by stage.
    `refused`: why `content_checks` refused a picture, which is black then; None of one that they did not.
    """

    images: Any
    seed: int
    seeds: list[int]
    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    truncated: tuple[bool, ...]
    timings: dict[str, float]
    refused: tuple[str | None, ...]


@dataclass
class _Clock:
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started


class _StepLatents(Mapping[str, Any]):
    """{"latents": [b, C, h, w]}, read from the device only if somebody looks: the host then waits for it."""

    def __init__(self, read: Callable[[], Floats]) -> None:
        self._read = read

    def __getitem__(self, name: str) -> Floats:
        if name != "latents":
            raise KeyError(name)
        return self._read()

    def __iter__(self) -> Iterator[str]:
        return iter(("latents",))

    def __len__(self) -> int:
        return 1


class _Noise:
    """Noise [C, h, w] of each picture, drawn by a thread while the device is busy with other things."""

    def __init__(self, draw: Callable[[int], Floats], count: int) -> None:
        self._executor = ThreadPoolExecutor(1, "noise")
        self.drawn = [self._executor.submit(draw, index).result for index in range(count)]

    def __enter__(self) -> _Noise:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(cancel_futures=True)


class Flux2Pipeline:
    """A bundle, ready to make pictures. Engines load when they are first needed and stay.

    `backend`: "plans" runs what was compiled. "torch" and "torch-compile" run the graphs of a bundle that is prepared
    for this machine's GPU, in the same loop with the same memory; of any other bundle in fp32 or bf16 the modules that
    it was compiled from, with the same weights, to compare with.

    `content_checks` look at prompts, references and pictures (`flux2_trt.safety`); there are none unless they are set.
    """

    def __init__(self, bundle: Bundle, backend: Backend = PLANS, runtime: Runtime | None = None) -> None:
        """`runtime`: in place of the one that `backend` names."""
        if backend not in BACKENDS:
            raise UsageError(f"backend {backend!r} is not known; give {', '.join(BACKENDS)}")
        self.bundle, self.backend = bundle, backend
        self.spec: ModelSpec = bundle.manifest.model
        self._runtime = runtime
        self._at_the_end: weakref.finalize | None = None
        self._tokenizer: PromptTokenizer | None = None
        self._interrupted = False
        self.content_checks: ContentChecks | None = None

    @staticmethod
    def from_bundle(path: str | Path, backend: Backend = PLANS) -> Flux2Pipeline:
        """Raises BundleError for a bundle that is missing, damaged, or of another version."""
        return Flux2Pipeline(Bundle.open(path), backend)

    @staticmethod
    def from_pretrained(name: str, backend: Backend = PLANS) -> Flux2Pipeline:
        """The newest bundle of that model in the store, for a GPU of this machine before one for the CPU.

        Partial bundles and synthetic weights are passed over. Raises BundleError with the build command where there is
        none.
        """
        return Flux2Pipeline.from_bundle(find_runnable(Store(), name, backend), backend)

    def interrupt(self) -> None:
        """Stop the running call between two steps; it raises Interrupted."""
        self._interrupted = True

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: Reference | Sequence[Reference] | Sequence[Sequence[Reference]] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        batch_size: int = 1,
        seed: int | None = None,
        latents: Floats | None = None,
        prompt_embeds: Floats | None = None,
        negative_prompt_embeds: Floats | None = None,
        output_type: OutputType = "pil",
        callback_on_step_end: StepCallback | None = None,
        callback_on_picture: PictureCallback | None = None,
    ) -> Output:
        """Make `num_images_per_prompt` pictures of every prompt.

        `image`: one reference, a list that all prompts share, or one list per prompt. `height`, `width`: pixels; those
        of the first reference, else the model's default. `sigmas`: noise levels before the shift, one per step.
        `latents`: noise [B, C, h, w] fp32 in place of the seed's; `prompt_embeds` [B, T, context_dim] fp32 in place of
        prompts, and `negative_prompt_embeds` [1, T, context_dim] in place of the empty prompt's, where guidance takes
        them. Picture i, of prompt i // num_images_per_prompt, has seed + i as its own seed. `batch_size`: how many are
        denoised together, where their references have the same sizes: faster where weights are streamed, and no longer
        the same to the last bit as one by one.
        `callback_on_step_end(pipeline, step, timestep, {"latents": [b, C, h, w]})` may return other latents.
        `callback_on_picture(settings, picture, refused)` gets each picture, in order, once it is decoded and checked:
        from another thread while the next one is denoised, where the runtime overlaps. What it raises ends the call
        between two steps; after `interrupt` or a failure it is not called again.

        Raises UsageError (ImageError for a reference) for values that are not allowed, ContentError for a prompt or
        reference that `content_checks` refuse, Interrupted after `interrupt`.
        """
        clock = _Clock()
        self._interrupted = False
        with clock.stage("total"):
            # 1. Check what was asked
            prompts = self._check_prompts(prompt, prompt_embeds)
            count = len(prompts) if prompts is not None else len(np.asarray(prompt_embeds))
            guidance = self._check_guidance(guidance_scale)
            if output_type not in ("pil", "np", "latent"):
                raise UsageError(f"output_type {output_type!r} is not known; give 'pil', 'np' or 'latent'")
            for name, value in (("num_images_per_prompt", num_images_per_prompt), ("batch_size", batch_size)):
                if value < 1:
                    raise UsageError(f"{name} {value} is not possible; give 1 or more")
            steps = len(sigmas) if sigmas is not None and num_inference_steps is None else num_inference_steps
            steps = self.spec.sampling.num_inference_steps if steps is None else steps

            if self.content_checks is not None:
                for text in prompts or ():
                    self.content_checks.require_prompt(text)

            # 2. References and size; then what of the model is where, and whether it fits
            references = self._load_references(image, count)
            width, height = self._size(width, height, references, latents)
            levels = schedule_sigmas(steps, self._tokens(width) * self._tokens(height), sigmas)
            given = np.asarray(() if prompt_embeds is None else prompt_embeds, dtype=np.float32)
            tokens = None if prompts is None else self._tokenize(prompts)
            length = given.shape[1] if tokens is None else tokens.input_ids.shape[1]
            guided = self._uses_cfg(guidance)
            drawing = Drawing(
                width=width,
                height=height,
                batch=min(batch_size, count * num_images_per_prompt),
                references=_largest([[pixels.shape[0] * pixels.shape[1] for pixels in group] for group in references]),
                text_tokens=length,
                steps=steps,
                guided=guided,
                pixels_per_token=self.spec.autoencoder.pixels_per_token,
            )
            self.runtime.arrange(drawing, encodes=tokens is not None or (guided and negative_prompt_embeds is None))

            # 3. Noise, drawn by a thread
            total = count * num_images_per_prompt
            base_seed = secrets.randbits(32) if seed is None else seed
            seeds = picture_seeds(base_seed, total)
            with ExitStack() as stack:
                noise = stack.enter_context(self._noise(seeds, width, height, latents))

                # 4. What becomes of a picture's latents, one picture at a time
                def hand_on(index: int, values: NDArray[Any]) -> Finished:
                    refused = None if output_type == "latent" else self._refusal(values)
                    finished = Finished(np.zeros_like(values) if refused else values, refused)
                    if callback_on_picture is not None:
                        if self._interrupted:
                            raise Interrupted(f"stopped before picture {index + 1} of {total} was handed on")
                        settings = PictureSettings(index, seeds[index], width, height, steps, guidance)
                        callback_on_picture(settings, _as_output(finished.values.copy(), output_type)[0], refused)
                    return finished

                decode = (lambda latents: latents) if output_type == "latent" else self._decode
                finishing = stack.enter_context(Finishing(decode, hand_on, self.interrupt, self.runtime.overlaps))

                # 5. Encode: of several prompts each while the picture before it is denoised, where the runtime overlaps
                with clock.stage("text_encoder"):
                    unconditional = self._unconditional(negative_prompt_embeds) if guided else None
                    if tokens is None:
                        texts, truncated = Ahead(given.__getitem__, count), (False,) * count
                    else:
                        encode, truncated = partial(self._encode, tokens), tokens.truncated
                        texts = Ahead(encode, count, finishing.beside if self.runtime.overlaps else None)
                    if unconditional is not None and length != len(unconditional):
                        raise UsageError(
                            f"{'prompt_embeds' if prompts is None else 'prompts'} have {length} tokens; with "
                            f"classifier-free guidance give {len(unconditional)}, as many as negative_prompt_embeds or "
                            "the empty prompt have, or use guidance_scale 1"
                        )
                with clock.stage("vae_encoder"):
                    encoded = self._encode_references(references)

                # 6. Denoise and finish
                of_prompts = [index // num_images_per_prompt for index in range(total)]
                grids = [[latents.shape for latents in encoded[of]] for of in of_prompts]
                for together in batches(grids, batch_size):
                    with clock.stage("text_encoder"):
                        embeds = [texts[of_prompts[index]] for index in together]
                    starts = [
                        Start(noise.drawn[index](), text, encoded[of_prompts[index]])
                        for index, text in zip(together, embeds, strict=True)
                    ]
                    final = self._denoise(
                        starts, unconditional, guidance, levels, clock, callback_on_step_end, finishing
                    )
                    for index in range(len(together)):
                        with clock.stage("vae_decoder"):
                            finishing.decode(final[index : index + 1])
                        finishing.hand_on()
                with clock.stage("vae_decoder"):
                    finishing.wait_for_decoding()
                results = finishing.results()
        return Output(
            images=_as_output(np.concatenate([each.values for each in results]), output_type),
            seed=base_seed,
            seeds=seeds,
            width=width,
            height=height,
            num_inference_steps=steps,
            guidance_scale=guidance,
            truncated=truncated,
            timings=clock.seconds,
            refused=tuple(each.refused for each in results),
        )

    def engine(self, component: Component) -> Engine:
        """The engine of a component, loaded if it was not yet."""
        return self.runtime.engine(component)

    @property
    def runtime(self) -> Runtime:
        """What runs the bundle, made when it is first needed."""
        if self._runtime is None:
            self._runtime = self._made_runtime()
            self._at_the_end = weakref.finalize(self, _close_at_the_end, self._runtime, os.getpid())
        return self._runtime

    def close(self) -> None:
        """Frees what was loaded, as does the end of the last reference; the next call loads it again."""
        if self._runtime is not None:
            runtime, self._runtime = self._runtime, None
            if self._at_the_end:
                self._at_the_end.detach()
            runtime.close()

    def _made_runtime(self) -> Runtime:
        manifest = self.bundle.manifest
        if manifest.target == CPU or (self.backend != PLANS and (manifest.is_compiled or not torch_uses_a_gpu())):
            return HostRuntime(self.bundle, self.backend)
        if self.backend == PLANS and not manifest.is_compiled:
            raise BundleError(
                f"{self.bundle.path} is not compiled yet; on a machine with a GPU of target {manifest.target}: "
                f"flux2-trt build {shlex.quote(str(self.bundle.path))}, or run its graphs by torch: --backend torch"
            )
        from flux2_trt.runtime.kernels import FOLDER
        from flux2_trt.runtime.placement import runtime_on_this_machine

        return runtime_on_this_machine(self.bundle, self.backend, kernels=Store().root / FOLDER)

    def _tokens(self, side: int) -> int:
        return side // self.spec.autoencoder.pixels_per_token

    def _uses_cfg(self, guidance: float) -> bool:
        return self.spec.sampling.guidance_kind == "classifier_free" and guidance > 1.0

    def _check_prompts(self, prompt: str | Sequence[str] | None, embeds: Floats | None) -> list[str] | None:
        if (prompt is None) == (embeds is None):
            raise UsageError("give either a prompt or prompt embeds")
        if embeds is None:
            prompts = [prompt] if isinstance(prompt, str) else list(prompt or ())
            if not prompts:
                raise UsageError("the list of prompts is empty; give at least one")
            return prompts
        width = self.spec.transformer.context_dim
        shape = np.shape(embeds)
        if len(shape) != 3 or 0 in shape or shape[2] != width or not np.isfinite(embeds).all():
            raise UsageError(f"prompt_embeds {list(shape)} do not fit; give finite numbers of shape [B, T, {width}]")
        return None

    def _check_guidance(self, scale: float | None) -> float:
        sampling = self.spec.sampling
        if scale is None or scale == sampling.guidance_scale:
            return sampling.guidance_scale
        if sampling.fixed_guidance:
            raise UsageError(
                f"{self.spec.name} is distilled to guidance {sampling.guidance_scale}; leave guidance_scale out"
            )
        if not math.isfinite(scale) or not 0.0 <= scale <= 100.0:
            raise UsageError(f"guidance_scale {scale} is not allowed; give a number from 0 to 100")
        return float(scale)

    def _load_references(self, image: Any, count: int) -> list[list[NDArray[np.uint8]]]:
        """For every prompt its references as pixels, loaded and shrunk once each."""
        if image is None:
            return [[] for _ in range(count)]
        given = list(image) if isinstance(image, (list, tuple)) else [image]
        if given and all(isinstance(item, (list, tuple)) for item in given):
            if len(given) != count:
                raise UsageError(f"{len(given)} lists of references do not fit {count} prompts; give one per prompt")
            return [self._prepared(list(group)) for group in given]
        shared = self._prepared(given)
        return [shared for _ in range(count)]

    def _prepared(self, group: list[Reference]) -> list[NDArray[np.uint8]]:
        loaded = [load_reference(item) for item in group]
        if self.content_checks is not None:
            self.content_checks.require_references(loaded)
        return [as_reference(picture, self.spec, len(group)) for picture in loaded]

    def _size(
        self,
        width: int | None,
        height: int | None,
        references: list[list[NDArray[np.uint8]]],
        latents: Floats | None,
    ) -> tuple[int, int]:
        sampling, multiple = self.spec.sampling, self.spec.autoencoder.pixels_per_token
        default = (sampling.width, sampling.height)
        if latents is not None:
            if np.ndim(latents) != 4:
                raise UsageError(f"latents have shape {list(np.shape(latents))}; give noise [B, C, h, w]")
            default = (np.shape(latents)[3] * multiple, np.shape(latents)[2] * multiple)
        elif references[0]:
            default = (references[0][0].shape[1], references[0][0].shape[0])
        width, height = width or default[0], height or default[1]
        check_size(width, height, sampling, multiple)
        return width, height

    def _noise(self, seeds: list[int], width: int, height: int, latents: Floats | None) -> _Noise:
        channels = self.spec.transformer.in_channels
        shape = (len(seeds), channels, self._tokens(height), self._tokens(width))
        if latents is None:
            return _Noise(lambda index: noise_batch(seeds[index : index + 1], *shape[1:])[0], len(seeds))
        if np.shape(latents) != shape or not np.isfinite(latents).all():
            raise UsageError(
                f"latents {list(np.shape(latents))} do not fit; give finite numbers of shape {list(shape)}"
            )
        given = np.asarray(latents, dtype=np.float32)
        return _Noise(lambda index: given[index], len(given))

    def encode_prompt(self, prompts: Sequence[str]) -> tuple[Floats, tuple[bool, ...]]:
        """Prompt embeds [B, T, context_dim] fp32, and of each prompt whether its end was cut.

        Raises UsageError for a prompt that is not allowed, or without a text encoder.
        """
        tokens = self._tokenize(prompts)
        return np.stack([self._encode(tokens, index) for index in range(len(prompts))]), tokens.truncated

    def _tokenize(self, prompts: Sequence[str]) -> TokenizedPrompts:
        if self.spec.text_encoder is None or self.spec.prompt is None:
            raise UsageError(f"{self.spec.name} has no text encoder; give prompt_embeds instead of a prompt")
        if self._tokenizer is None:
            self._tokenizer = PromptTokenizer.from_file(self.bundle.asset_path("tokenizer.json"), self.spec.prompt)
            if self._tokenizer.vocab_size > self.spec.text_encoder.vocab_size:
                raise BundleError(
                    f"the tokenizer has {self._tokenizer.vocab_size} tokens, the text encoder "
                    f"{self.spec.text_encoder.vocab_size}; rebuild the bundle: {self.bundle.build_command}"
                )
        return self._tokenizer(prompts)

    def _encode(self, tokens: TokenizedPrompts, index: int) -> Floats:
        """Embeds [T, context_dim] of one prompt."""
        row = slice(index, index + 1)
        inputs = {"input_ids": tokens.input_ids[row], "attention_mask": tokens.attention_mask[row]}
        return self.engine("text_encoder").run(inputs)["prompt_embeds"][0]

    def _unconditional(self, given: Floats | None) -> Floats:
        """Embeds [T, context_dim] of the empty prompt."""
        if given is not None:
            width = self.spec.transformer.context_dim
            if np.ndim(given) != 3 or (len(given), np.shape(given)[2]) != (1, width) or not np.isfinite(given).all():
                raise UsageError(
                    f"negative_prompt_embeds {list(np.shape(given))} do not fit; give finite numbers of shape "
                    f"[1, T, {width}]"
                )
            return np.asarray(given[0], dtype=np.float32)
        if self.spec.text_encoder is None:
            raise UsageError(f"{self.spec.name} has no text encoder for the empty prompt; use guidance_scale 1")
        return self.encode_prompt([UNCONDITIONAL])[0][0]

    def _encode_references(self, references: list[list[NDArray[np.uint8]]]) -> list[tuple[Floats, ...]]:
        encoded: dict[int, Floats] = {}
        for pixels in (pixels for group in references for pixels in group):
            if id(pixels) not in encoded:
                encoded[id(pixels)] = self.engine("vae_encoder").run({"image": pixels[None]})["latents"][0]
        return [tuple(encoded[id(pixels)] for pixels in group) for group in references]

    def _denoise(
        self,
        starts: Sequence[Start],
        unconditional: Floats | None,
        guidance: float,
        levels: NDArray[np.float64],
        clock: _Clock,
        callback: StepCallback | None,
        finishing: Finishing,
    ) -> Floats:
        """The Euler loop of pictures that are made together; returns latents [B, C, h, w]."""
        trajectory = trajectory_of(self.spec, starts, levels, guidance, unconditional)
        count, (_, height, width) = len(starts), starts[0].noise.shape
        steps, image_tokens = trajectory.steps, height * width

        def latents_of(tokens: Floats) -> Floats:
            return unpack(tokens[:count, :image_tokens], height, width)

        def on_step(index: int, read: Callable[[], Floats]) -> Floats | None:
            changed = None
            if callback is not None:
                latents = _StepLatents(lambda: latents_of(read()))
                changed = (callback(self, index, float(levels[index]), latents) or {}).get("latents")
            finishing.require_sound()
            if self._interrupted and index + 1 < steps:
                raise Interrupted(f"stopped after {index + 1} of {steps} steps")
            if changed is None:
                return None
            tokens = np.array(read())
            rows = pack(np.asarray(changed, np.float32))
            tokens[:, :image_tokens] = np.tile(rows, (len(tokens) // count, 1, 1))
            return tokens

        if self._interrupted:
            raise Interrupted(f"stopped after 0 of {steps} steps")
        return latents_of(self.runtime.denoiser().run(trajectory, on_step, clock.stage))

    def _refusal(self, pixels: NDArray[Any]) -> str | None:
        """Why the checks refuse a picture, uint8 [1, H, W, 3]."""
        return self.content_checks.picture(Image.fromarray(pixels[0])) if self.content_checks else None

    def _decode(self, latents: Floats) -> NDArray[np.uint8]:
        """[1, C, h, w] to uint8 [1, H, W, 3]."""
        channels_last = np.ascontiguousarray(latents.transpose(0, 2, 3, 1))
        return self.engine("vae_decoder").run({"latents": channels_last})["image"]


def _close_at_the_end(runtime: Runtime, process: int) -> None:
    """A fork inherits the pipeline and not what is on the device; a device that is lost has nothing to free."""
    if os.getpid() == process:
        with suppress(DeviceError):
            runtime.close()


def torch_uses_a_gpu() -> bool:
    """False also where there is no torch."""
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


def batches(kinds: Sequence[Any], size: int) -> list[range]:
    """Numbers in order, in runs of the same kind and of `size` at most."""
    made: list[range] = []
    for index, kind in enumerate(kinds):
        if made and len(made[-1]) < size and kinds[made[-1].start] == kind:
            made[-1] = range(made[-1].start, index + 1)
        else:
            made.append(range(index, index + 1))
    return made


def _largest(groups: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The group whose references have the most pixels."""
    return tuple(max(groups, key=sum))


def _as_output(images: NDArray[Any], output_type: OutputType) -> Any:
    if output_type == "pil":
        return [Image.fromarray(image) for image in images]
    return images.astype(np.float32) / 255.0 if output_type == "np" else images
