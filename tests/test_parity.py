"""The pipeline against diffusers' pipelines, on small random models: the same embeds and noise, the same latents."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Pipeline
from diffusers_models import (
    QWEN_VOCABULARY,
    flow_scheduler,
    relative_error,
    small_autoencoder,
    small_language_model,
    small_tokenizer,
    small_transformer,
)
from numpy.typing import NDArray
from PIL import Image

from engines.build import BuildRequest, build
from flux2_trt.console import Console
from flux2_trt.embeds import encoder_identity, read_embeds
from flux2_trt.encoding import encode_file
from flux2_trt.errors import Interrupted, UsageError
from flux2_trt.options import RunOptions
from flux2_trt.pipeline import Flux2Pipeline as OurPipeline
from flux2_trt.pipeline import batches

Floats = NDArray[np.float32]

# fp32 on both sides, other kernels: 1e-6 to 1e-5, carried on from step to step. Embedded guidance is the worst at 2e-5:
# a scale of 2.5 becomes an angle of 2500, which fp32 knows to 2e-4 only.
FINAL_LATENTS = 1e-4
LAYERS = (1, 2)  # the hidden states of a small text encoder, see `spec_from_diffusers`


@dataclass(frozen=True)
class Pair:
    """A diffusers pipeline, and ours from the folder that it was saved to."""

    theirs: Any
    ours: OurPipeline
    components: tuple[str, ...]

    def expected(self, latents: Floats, height: int, width: int, **arguments: Any) -> Floats:
        """The final latents of diffusers, in the transformer's normalised space [B, C, h, w]."""
        arguments = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
        with torch.no_grad():
            result = self.theirs(
                latents=torch.from_numpy(latents), height=height, width=width, output_type="latent", **arguments
            ).images
        if isinstance(self.theirs, Flux2Pipeline):  # packed, and normalised still
            return result.permute(0, 2, 1).reshape(latents.shape).numpy()
        vae = self.theirs.vae
        deviation = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)[:, None, None]
        raw = Flux2KleinPipeline._patchify_latents(result)
        return ((raw - vae.bn.running_mean[:, None, None]) / deviation).numpy()


def _pair(theirs: Any, folder: Path) -> Pair:
    theirs.set_progress_bar_config(disable=True)
    theirs.save_pretrained(folder)
    report = build(BuildRequest(model=str(folder), output=folder / "store"), lambda message: None)
    return Pair(theirs, OurPipeline.from_bundle(report.bundle), tuple(part.name for part in report.components))


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    theirs = Flux2Pipeline(
        flow_scheduler(), small_autoencoder(1), None, None, small_transformer(2, guidance_embeds=True)
    )
    return _pair(theirs, tmp_path_factory.mktemp("dev") / "Small-dev")


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    theirs = Flux2KleinPipeline(
        flow_scheduler(), small_autoencoder(3), None, None, small_transformer(4), is_distilled=True
    )
    return _pair(theirs, tmp_path_factory.mktemp("klein") / "Small-klein")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """Klein base, with a text encoder: classifier-free guidance needs the embeds of the empty prompt."""
    theirs = Flux2KleinPipeline(
        flow_scheduler(),
        small_autoencoder(5),
        small_language_model("qwen3", 6, vocab_size=QWEN_VOCABULARY),
        small_tokenizer(),
        small_transformer(7),
    )
    return _pair(theirs, tmp_path_factory.mktemp("base") / "Small-base")


@pytest.fixture(params=["dev", "klein", "base"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return request.getfixturevalue(request.param)


def normal(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def text_tokens(pair: Pair) -> int:
    """With classifier-free guidance as many as the empty prompt has; any number without."""
    return 512 if pair.ours.spec.text_encoder else 40


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def guidance(pair: Pair) -> dict[str, Any]:
    """A guidance other than the default, where the model takes one."""
    return {} if pair.ours.spec.sampling.fixed_guidance else {"guidance_scale": 2.5}


def negative(pair: Pair, count: int = 1) -> dict[str, Any]:
    """What diffusers wants besides for classifier-free guidance: its own embeds of the empty prompt."""
    if pair.theirs.text_encoder is None:
        return {}
    with torch.no_grad():
        embeds, _ = pair.theirs.encode_prompt([""] * count, text_encoder_out_layers=LAYERS)
    return {"negative_prompt_embeds": embeds}


# --- final latents -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule",
    [{"num_inference_steps": 1}, {"num_inference_steps": 6}, {"sigmas": [1.0, 0.8, 0.35, 0.1]}],
    ids=["1 step", "6 steps", "sigmas"],
)
@pytest.mark.parametrize(("width", "height"), [(64, 64), (80, 112)])
def test_text_to_image(pair: Pair, width: int, height: int, schedule: dict[str, Any]) -> None:
    noise, embeds = normal(1, 16, height // 16, width // 16), normal(1, text_tokens(pair), 24, seed=1)
    arguments: dict[str, Any] = {
        "prompt_embeds": embeds,
        "height": height,
        "width": width,
        "latents": noise,
        **guidance(pair),
    }
    ours = pair.ours(output_type="latent", **arguments, **schedule)
    # diffusers computes the shift from the number of steps, also where it then takes the number from the sigmas
    schedule = {"num_inference_steps": len(schedule.get("sigmas", ())), **schedule}
    theirs = pair.expected(**arguments, **schedule, **negative(pair))
    assert ours.images.dtype == np.float32
    assert relative_error(ours.images, theirs) < FINAL_LATENTS
    assert relative_error(theirs, noise) > 0.1  # else agreement would mean nothing


@pytest.mark.parametrize("sizes", [[(96, 64)], [(75, 130), (64, 64)]], ids=["one", "two"])
def test_references(pair: Pair, sizes: list[tuple[int, int]]) -> None:
    """Sides that are no multiple of 16 are cropped around the centre on both sides."""
    images = [picture(*size, seed=i) for i, size in enumerate(sizes)]
    noise, embeds = normal(1, 16, 5, 7), normal(1, text_tokens(pair), 24, seed=1)
    arguments: dict[str, Any] = {
        "prompt_embeds": embeds,
        "height": 80,
        "width": 112,
        "latents": noise,
        "num_inference_steps": 3,
    }
    ours = pair.ours(image=images, output_type="latent", **arguments, **guidance(pair)).images
    theirs = pair.expected(image=list(images), **arguments, **guidance(pair), **negative(pair))
    assert relative_error(ours, theirs) < FINAL_LATENTS
    without = pair.ours(output_type="latent", **arguments, **guidance(pair)).images
    assert relative_error(without, theirs) > 0.01


def test_torch_gives_the_same_from_the_same_bundle(pair: Pair) -> None:
    """With a reference and guidance, and decoded."""
    arguments: dict[str, Any] = {
        "prompt_embeds": normal(1, text_tokens(pair), 24, seed=1),
        "image": picture(96, 64),
        "height": 80,
        "width": 64,
        "latents": normal(1, 16, 5, 4),
        "num_inference_steps": 3,
    } | guidance(pair)
    by_torch = OurPipeline.from_bundle(pair.ours.bundle.path, backend="torch")
    found = by_torch(output_type="latent", **arguments).images
    assert relative_error(found, pair.ours(output_type="latent", **arguments).images) < FINAL_LATENTS
    arguments["image"] = [arguments["image"]]
    assert relative_error(found, pair.expected(**arguments, **negative(pair))) < FINAL_LATENTS
    pixels = [np.asarray(each(**arguments).images[0], int) for each in (by_torch, pair.ours)]
    assert np.abs(pixels[0] - pixels[1]).max() <= 1


def test_two_prompts_share_references_and_have_noise_of_their_own(pair: Pair) -> None:
    noise, embeds = normal(2, 16, 4, 5), normal(2, text_tokens(pair), 24, seed=1)
    arguments: dict[str, Any] = {
        "prompt_embeds": embeds,
        "height": 64,
        "width": 80,
        "latents": noise,
        "num_inference_steps": 3,
    }
    arguments |= guidance(pair)
    ours = pair.ours(image=picture(64, 96), output_type="latent", **arguments).images
    theirs = pair.expected(image=[picture(64, 96)], **arguments, **negative(pair, 2))
    assert relative_error(ours, theirs) < FINAL_LATENTS


def test_guidance_of_one_is_no_guidance(base: Pair) -> None:
    arguments: dict[str, Any] = {
        "prompt_embeds": normal(1, 9, 24),
        "latents": normal(1, 16, 4, 4),
        "height": 64,
        "width": 64,
    }
    arguments |= {"guidance_scale": 1.0, "num_inference_steps": 3}
    ours = base.ours(output_type="latent", **arguments).images
    assert relative_error(ours, base.expected(**arguments)) < FINAL_LATENTS


def test_guidance_wants_embeds_as_long_as_those_of_the_empty_prompt(base: Pair) -> None:
    with pytest.raises(UsageError, match="9 tokens; with classifier-free guidance give 512"):
        base.ours(prompt_embeds=normal(1, 9, 24), height=64, width=64, guidance_scale=2.0)


def test_size_of_the_first_reference_is_the_default(klein: Pair) -> None:
    image, embeds = picture(75, 130), normal(1, 9, 24)
    ours = klein.ours(image=image, prompt_embeds=embeds, latents=normal(1, 16, 8, 4), output_type="latent")
    assert (ours.width, ours.height, ours.num_inference_steps) == (64, 128, 4)


def test_pictures(pair: Pair) -> None:
    """From noise to 8-bit pixels, decoder included."""
    noise, embeds = normal(1, 16, 5, 4), normal(1, text_tokens(pair), 24, seed=1)
    arguments: dict[str, Any] = {
        "prompt_embeds": embeds,
        "height": 80,
        "width": 64,
        "num_inference_steps": 2,
        **guidance(pair),
    }
    [ours] = pair.ours(latents=noise, **arguments).images
    arguments["prompt_embeds"] = torch.from_numpy(embeds)
    [theirs] = pair.theirs(latents=torch.from_numpy(noise), **arguments, **negative(pair)).images
    assert ours.size == theirs.size == (64, 80)
    difference = np.abs(np.asarray(ours, int) - np.asarray(theirs, int))
    # Latents that differ by 1e-6 can fall to either side of a rounding, no further.
    assert difference.max() <= 1 and (difference > 0).mean() < 1e-2
    scaled = pair.ours(latents=noise, output_type="np", **{**arguments, "prompt_embeds": embeds}).images
    np.testing.assert_array_equal((scaled * 255).round().astype(np.uint8)[0], np.asarray(ours))


# --- prompts -----------------------------------------------------------------------------------------------------


def test_prompts_equal_encode_prompt(base: Pair) -> None:
    """Padded positions too: the transformer reads all 512."""
    prompts = ["a red circle on a blue square", "x", "", "many words " * 100]
    with torch.no_grad():
        expected, _ = base.theirs.encode_prompt(prompts, text_encoder_out_layers=LAYERS)
    embeds, truncated = base.ours.encode_prompt(prompts)
    # hidden states after two layers in fp32, whose residuals add up rounding
    assert relative_error(embeds, expected) < 1e-4
    assert truncated == (False, False, False, True)


def test_from_prompts_to_latents(base: Pair) -> None:
    prompts, noise = ["a red circle", "a cat, asleep"], normal(2, 16, 4, 5)
    arguments: dict[str, Any] = {
        "height": 64,
        "width": 80,
        "num_inference_steps": 3,
        "guidance_scale": 3.0,
        "latents": noise,
    }
    ours = base.ours(prompts, output_type="latent", **arguments)
    theirs = base.expected(prompt=prompts, text_encoder_out_layers=LAYERS, **arguments)
    assert relative_error(ours.images, theirs) < FINAL_LATENTS
    assert ours.truncated == (False, False)


def test_without_a_text_encoder_embeds_are_wanted(dev: Pair) -> None:
    assert dev.components == ("conditioning", "transformer", "vae_encoder", "vae_decoder")
    with pytest.raises(UsageError, match="no text encoder; give prompt_embeds"):
        dev.ours("a red circle")


def test_a_distilled_model_takes_no_guidance(klein: Pair) -> None:
    with pytest.raises(UsageError, match=r"distilled to guidance 1\.0"):
        klein.ours(prompt_embeds=normal(1, 9, 24), guidance_scale=4.0)


# --- seeds, batches, callbacks -----------------------------------------------------------------------------------


def latents_of(pipeline: OurPipeline, **arguments: Any) -> Floats:
    defaults: dict[str, Any] = {"height": 64, "width": 80, "num_inference_steps": 2, "output_type": "latent"}
    return pipeline(**(defaults | arguments)).images


def test_a_seed_gives_the_same_latents_alone_and_in_a_batch(base: Pair) -> None:
    prompts = ["one", "another", "a third"]
    batch = base.ours(prompts, height=64, width=80, num_inference_steps=2, seed=7, output_type="latent")
    assert batch.seed == 7 and batch.seeds == [7, 8, 9]
    for index, prompt in enumerate(prompts):
        alone = latents_of(base.ours, prompt=prompt, seed=batch.seeds[index])
        np.testing.assert_array_equal(alone[0], batch.images[index])


@pytest.mark.parametrize("sizes", [[], [(96, 64), (64, 64)]], ids=["from text", "from two references"])
def test_pictures_that_are_denoised_together_are_those_of_diffusers(pair: Pair, sizes: list[tuple[int, int]]) -> None:
    """With guidance, which makes two rows of each."""
    noise, embeds = normal(3, 16, 5, 7), normal(3, text_tokens(pair), 24, seed=1)
    arguments: dict[str, Any] = {"height": 80, "width": 112, "num_inference_steps": 3, **guidance(pair)}
    images = [picture(*size, seed=i) for i, size in enumerate(sizes)] or None
    together = pair.ours(
        image=images, prompt_embeds=embeds, latents=noise, batch_size=2, output_type="latent", **arguments
    ).images
    for index in range(3):
        one = {"prompt_embeds": embeds[index : index + 1], "latents": noise[index : index + 1], **arguments}
        theirs = pair.expected(image=images and list(images), **one, **negative(pair))
        assert relative_error(together[index : index + 1], theirs) < FINAL_LATENTS


def test_only_pictures_with_references_of_the_same_sizes_are_denoised_together(base: Pair) -> None:
    assert batches("aaabba", 2) == [range(2), range(2, 3), range(3, 5), range(5, 6)]
    small, large = picture(64, 64, 1), picture(96, 64, 2)
    groups: list[list[Any]] = [[small], [picture(64, 64, 3)], [large], []]
    rows: list[int] = []

    def look(pipeline: OurPipeline, step: int, timestep: float, tensors: Any) -> None:
        rows.append(len(tensors["latents"]))

    asked: dict[str, Any] = {"prompt": list("abcd"), "image": groups, "seed": 1}
    together = latents_of(base.ours, **asked, batch_size=4, callback_on_step_end=look)
    assert rows == [2, 2, 1, 1, 1, 1]
    assert relative_error(together, latents_of(base.ours, **asked)) < FINAL_LATENTS
    with pytest.raises(UsageError, match="batch_size 0 is not possible"):
        latents_of(base.ours, **asked, batch_size=0)


def test_a_callback_changes_all_latents_of_a_batch(base: Pair) -> None:
    """And both rows of each that guidance makes."""
    asked: dict[str, Any] = {"prompt": ["a", "b"], "seed": 1, "num_inference_steps": 3}
    other = normal(2, 16, 4, 5, seed=9)

    def change(pipeline: OurPipeline, step: int, timestep: float, tensors: Any) -> Any:
        rows = slice(len(seen), len(seen) + len(tensors["latents"])) if step == 1 else slice(0)
        seen.extend(range(rows.start or 0, rows.stop))
        return {"latents": other[rows]} if step == 1 else None

    found = []
    for size in (1, 2):
        seen: list[int] = []
        found.append(latents_of(base.ours, **asked, batch_size=size, callback_on_step_end=change))
        assert seen == [0, 1]
    assert relative_error(found[1], found[0]) < FINAL_LATENTS
    assert relative_error(latents_of(base.ours, **asked), found[0]) > 0.01


def test_images_per_prompt(base: Pair) -> None:
    both = latents_of(base.ours, prompt=["one", "another"], num_images_per_prompt=2, seed=3)
    assert both.shape == (4, 16, 4, 5)
    for index, (prompt, seed) in enumerate([("one", 3), ("one", 4), ("another", 5), ("another", 6)]):
        np.testing.assert_array_equal(latents_of(base.ours, prompt=prompt, seed=seed)[0], both[index])


def test_references_per_prompt(base: Pair) -> None:
    first, second = picture(64, 64, 1), picture(96, 64, 2)
    groups: list[list[Any]] = [[first], [], [second, first]]
    batch = latents_of(base.ours, prompt=["a", "b", "c"], image=groups, seed=1)
    for index, (prompt, group) in enumerate(zip("abc", groups, strict=True)):
        alone = latents_of(base.ours, prompt=prompt, image=group or None, seed=1 + index)
        np.testing.assert_array_equal(alone[0], batch[index])
    with pytest.raises(UsageError, match="one per prompt"):
        latents_of(base.ours, prompt=["a", "b"], image=groups)


def test_callback_sees_and_replaces_latents(pair: Pair) -> None:
    """Ours and diffusers' have the same schedule of calls: after a step, with the latents that it made."""
    noise, embeds, other = normal(1, 16, 4, 4), normal(1, text_tokens(pair), 24, seed=1), normal(1, 16, 4, 4, seed=5)
    arguments: dict[str, Any] = {
        "prompt_embeds": embeds,
        "height": 64,
        "width": 64,
        "num_inference_steps": 3,
        "latents": noise,
    }
    arguments |= guidance(pair)
    ours: list[tuple[int, float]] = []
    theirs: list[tuple[int, float]] = []

    def our_callback(pipeline: Any, step: int, timestep: float, tensors: dict[str, Any]) -> dict[str, Any] | None:
        assert pipeline is pair.ours and tensors["latents"].shape == (1, 16, 4, 4)
        ours.append((step, timestep))
        return {"latents": other} if step == 1 else None

    def their_callback(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        theirs.append((step, float(timestep) / 1000))
        return {"latents": pipeline._pack_latents(torch.from_numpy(other))} if step == 1 else {}

    result = pair.ours(output_type="latent", callback_on_step_end=our_callback, **arguments).images
    expected = pair.expected(callback_on_step_end=their_callback, **arguments, **negative(pair))
    assert relative_error(result, expected) < FINAL_LATENTS
    assert [step for step, _ in ours] == [0, 1, 2]
    np.testing.assert_allclose([t for _, t in ours], [t for _, t in theirs], rtol=1e-6)  # fp32 times 1000
    assert relative_error(pair.ours(output_type="latent", **arguments).images, expected) > 0.01


def test_interrupt_stops_between_two_steps(klein: Pair) -> None:
    steps: list[int] = []

    def stop(pipeline: Any, step: int, timestep: float, tensors: dict[str, Any]) -> None:
        steps.append(step)
        if step == 1:
            pipeline.interrupt()

    with pytest.raises(Interrupted, match="2 of 5 steps"):
        latents_of(klein.ours, prompt_embeds=normal(1, 9, 24), num_inference_steps=5, callback_on_step_end=stop)
    assert steps == [0, 1]
    assert latents_of(klein.ours, prompt_embeds=normal(1, 9, 24), seed=0).shape == (1, 16, 4, 5)


def test_embeds_of_both_prompts_stand_in_for_them(base: Pair, tmp_path: Path) -> None:
    """And travel in the file that `flux2-trt encode` writes."""
    ours, size = base.ours, {"width": 64, "height": 64, "num_inference_steps": 2, "seed": 1, "output_type": "latent"}
    expected = ours("a cat", guidance_scale=4.0, **size).images
    path = tmp_path / "e.safetensors"
    encode_file(Console(quiet=True), ["a cat"], path, RunOptions(bundle=ours.bundle.path))
    made = read_embeds(path).checked(ours.spec, encoder_identity(ours.bundle.manifest), "the file")
    given: dict[str, Any] = {"prompt_embeds": made.embeds, "negative_prompt_embeds": made.negative, **size}
    np.testing.assert_array_equal(ours(guidance_scale=4.0, **given).images, expected)
    assert (ours(guidance_scale=1.0, **given).images != expected).any()
    assert made.negative is not None
    for wrong in (made.negative[0], made.negative[:, :, 1:], np.full_like(made.negative, np.nan)):
        with pytest.raises(UsageError, match="negative_prompt_embeds"):
            ours(guidance_scale=4.0, **{**given, "negative_prompt_embeds": wrong})
    with pytest.raises(UsageError, match="prompts have 512 tokens; with classifier-free guidance give 9"):
        ours("a cat", guidance_scale=4.0, negative_prompt_embeds=made.negative[:, :9], **size)
