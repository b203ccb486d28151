"""What the built-in model can do: `python -m benchmarks.tiny`.

Scores of held-out prompts, edits and combinations, made by the pipeline itself from the built bundle and judged
without a network, and the pictures in the README. Writes `results/tiny.json`, `results/tiny.png` and
`results/tiny_sizes.png`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image, ImageDraw, ImageFont, ImageOps

from export.tiny.config import EvaluationConfig
from export.tiny.dataset import Sample
from export.tiny.evaluate import Pictures, held_out_scores
from export.tiny.scenes import render
from flux2_trt.pipeline import Flux2Pipeline, StepCallback

RESULTS = Path(__file__).parent / "results"
SIDE, CAPTION, GAP = 192, 56, 12

TEXT = (
    "a large red circle on a blue background",
    "a green triangle to the left of a yellow square on a white background",
    "a small purple star in the top right corner, gray background",
    "pink diamond above a black cross, on orange",
)
EDITS = (
    (TEXT[0], "make the circle green"),
    (TEXT[1], "replace the square with a star"),
)
COMBINE = (("a large orange star on white", "a blue square on a yellow background"),)
OTHER_SIZES = ((128, 128), (320, 192), (192, 320), (384, 384), (512, 512))
COMBINE_PROMPT = "the shape of image 1 in the colour of image 2"


def draw(
    pipeline: Flux2Pipeline,
    each: Sample,
    seed: int,
    config: EvaluationConfig,
    on_step_end: StepCallback | None = None,
    guidance: float | None = None,
) -> Pictures:
    """The picture of a sample, uint8 [H, W, 3]; without `guidance` at the model's default."""
    width, height = config.size
    output = pipeline(
        each.prompt,
        image=[render(scene, width, height) for scene in each.references] or None,
        width=width,
        height=height,
        num_inference_steps=config.num_inference_steps,
        guidance_scale=guidance,
        seed=seed,
        callback_on_step_end=on_step_end,
    )
    return np.asarray(output.images[0])


def product_scores(pipeline: Flux2Pipeline, config: EvaluationConfig, guidance: float | None) -> dict[str, float]:
    """Held-out scores of pictures that the pipeline made."""

    def generate(samples: Sequence[Sample], seeds: Sequence[int]) -> Pictures:
        pairs = zip(samples, seeds, strict=True)
        return np.stack([draw(pipeline, each, seed, config, guidance=guidance) for each, seed in pairs])

    return held_out_scores(generate, config)


def make_grid(pipeline: Flux2Pipeline) -> Image.Image:
    """Text to image, edits of those pictures, and two references combined, each with its prompt."""
    made = {prompt: pipeline(prompt, seed=3).images[0] for prompt in dict.fromkeys((*TEXT, *COMBINE[0]))}
    cells = [(prompt, made[prompt]) for prompt in TEXT]
    for source, instruction in EDITS:
        cells += [(source, made[source]), (instruction, pipeline(instruction, image=made[source], seed=3).images[0])]
    for first, second in COMBINE:
        references = [made[first], made[second]]
        combined = pipeline(COMBINE_PROMPT, image=references, seed=3).images[0]
        cells += [(first, made[first]), (second, made[second]), (COMBINE_PROMPT, combined)]
    return _sheet(cells)


def make_sizes_grid(pipeline: Flux2Pipeline) -> Image.Image:
    """The same prompts at other sizes."""
    cells = []
    for prompt in (TEXT[0], TEXT[3]):
        for width, height in OTHER_SIZES:
            picture = pipeline(prompt, width=width, height=height, seed=3).images[0]
            cells.append((f"{width}x{height}: {prompt}", picture))
    return _sheet(cells, columns=len(OTHER_SIZES))


def _sheet(cells: list[tuple[str, Image.Image]], columns: int = 4) -> Image.Image:
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * (SIDE + GAP) + GAP, rows * (SIDE + CAPTION + GAP) + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for index, (prompt, picture) in enumerate(cells):
        x, y = GAP + index % columns * (SIDE + GAP), GAP + index // columns * (SIDE + CAPTION + GAP)
        fitted = ImageOps.contain(picture, (SIDE, SIDE))
        draw.rectangle((x - 1, y - 1, x + fitted.width, y + fitted.height), outline="lightgray")
        sheet.paste(fitted, (x, y))
        draw.text((x, y + SIDE + 4), _wrapped(prompt), fill="black", font=font)
    return sheet


def _wrapped(prompt: str, width: int = 28) -> str:
    lines = [""]
    for word in prompt.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def main(
    count: Annotated[int, typer.Option(help="Held-out samples of every kind; 0 makes only the grids.")] = 100,
    other_count: Annotated[int, typer.Option(help="The same at each of some other sizes.")] = 20,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale of the scores (default: the model's).")] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps of the scores.")] = EvaluationConfig.num_inference_steps,
    output: Annotated[Path, typer.Option(help="Folder for the result.")] = RESULTS,
) -> None:
    """Score the built `tiny` and draw the grid, which is always made with the model's defaults."""
    pipeline = Flux2Pipeline.from_pretrained("tiny")
    output.mkdir(parents=True, exist_ok=True)
    make_grid(pipeline).save(output / "tiny.png", optimize=True)
    make_sizes_grid(pipeline).save(output / "tiny_sizes.png", optimize=True)
    if count:
        config = EvaluationConfig(count=count, num_inference_steps=steps)
        result = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "bundle": pipeline.bundle.manifest.key,
            "samples_of_every_kind": count,
            "num_inference_steps": config.num_inference_steps,
            "guidance_scale": pipeline.spec.sampling.guidance_scale if guidance is None else guidance,
            "size": config.size,
            "scores": product_scores(pipeline, config, guidance),
            "samples_at_other_sizes": other_count,
            "scores_at_other_sizes": {
                f"{width}x{height}": product_scores(
                    pipeline, replace(config, count=other_count, size=(width, height)), guidance
                )
                for width, height in (OTHER_SIZES if other_count else ())
            },
        }
        (output / "tiny.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        print(json.dumps(result, indent=2))


if __name__ == "__main__":
    typer.run(main)
