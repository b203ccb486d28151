"""The tables of the roofline: `python -m benchmarks.roofline [MODEL...]`.

Everything is computed from the specs of models and the data sheets of devices: parameters, operations of a step, floors
a step and a picture, memory, and streaming. Nothing is measured; the numbers are what measurements are to be held
against. Prints markdown.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated

import typer

from engines.footprint import parameters, weight_bytes
from engines.forecast import Forecast, forecast
from engines.hardware import GIGA, HARDWARE, TERA
from engines.roofline import floor_of, moved_bytes
from engines.setting import Setting
from engines.targets import TARGETS
from engines.work import runs_of, work_of
from export.recipes import RECIPES
from flux2_trt.drawing import Drawing
from flux2_trt.errors import DeviceMemoryError
from flux2_trt.models import published_spec
from flux2_trt.spec import ModelSpec

MODELS = ("dev", "klein-9b", "klein-4b")
CASES = ((512, 512, 0), (1024, 1024, 0), (1360, 768, 0), (2048, 2048, 0), *((1024, 1024, n) for n in (1, 2, 4, 8)))
"""Width, height and the number of references of 1 MP."""
MEGAPIXEL_CASE = CASES[1]


def drawing_of(spec: ModelSpec, case: tuple[int, int, int], batch: int = 1) -> Drawing:
    width, height, references = case
    return Drawing.of(spec, width, height, batch, references)


def title_of(case: tuple[int, int, int]) -> str:
    width, height, references = case
    return f"{width}x{height}" + (f" + {references} ref" if references else "")


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a markdown table, and a blank line."""
    for row in (headings, ["---"] * len(headings), *rows):
        print(f"| {' | '.join(row)} |")
    print()


def sizes(specs: Sequence[ModelSpec]) -> None:
    print("Parameters, and gigabytes of weights in each precision\n")
    recipes = [recipe for recipe in RECIPES.values() if recipe.dtype == "bf16"]
    rows = [
        [spec.name, name, f"{parameters(name, spec):,}"]
        + [f"{weight_bytes(name, spec, recipe) / GIGA:.2f}" for recipe in recipes]
        for spec in specs
        for name in spec.components
    ]
    table(["model", "component", "parameters", *(recipe.name for recipe in recipes)], rows)


def operations(specs: Sequence[ModelSpec]) -> None:
    print("Operations of one step in 10^12, batch 1; other batches in proportion\n")
    rows = []
    for spec in specs:
        for case in CASES:
            drawing = drawing_of(spec, case)
            work = work_of("transformer", spec, drawing)
            share = f"{100 * work.attention_flops / work.flops:.1f} %"
            kinds = (work.linear_flops, work.attention_flops, work.flops)
            figures = [f"{flops / TERA / drawing.sequences:.2f}" for flops in kinds]
            rows.append([spec.name, title_of(case), str(drawing.all_tokens), *figures, share])
    table(["model", "picture", "tokens", "linear", "attention", "all", "attention's share"], rows)


def floors(spec: ModelSpec) -> None:
    print(f"Floors of {spec.name}: milliseconds a step at peak rates, batch 1, and seconds a picture at 1024x1024\n")
    rows = []
    for target, hardware in HARDWARE.items():
        for precision in TARGETS[target].precisions:
            recipe = RECIPES[precision]
            steps = [
                floor_of("transformer", spec, drawing_of(spec, case), recipe, hardware).seconds * 1000 for case in CASES
            ]
            drawing = drawing_of(spec, MEGAPIXEL_CASE)
            used = [name for name in spec.components if runs_of(name, drawing)]
            picture = sum(
                runs_of(name, drawing) * floor_of(name, spec, drawing, recipe, hardware).seconds for name in used
            )
            moved = moved_bytes("transformer", spec, drawing, recipe) / hardware.memory_bytes_per_second
            share = f"{100 * moved / floor_of('transformer', spec, drawing, recipe, hardware).compute_seconds:.0f} %"
            rows.append([target, precision, *(f"{step:.1f}" for step in steps), f"{picture:.2f}", share])
    steps_of = f"s for {spec.sampling.num_inference_steps} steps"
    table(["target", "precision", *map(title_of, CASES), steps_of, "memory traffic of compute, 1024x1024"], rows)


def memory(specs: Sequence[ModelSpec]) -> None:
    print("What fits at 1024x1024 with all of a device's memory free; bytes of scratch are estimates\n")
    rows = []
    for spec in specs:
        drawing = drawing_of(spec, MEGAPIXEL_CASE)
        for target, hardware in HARDWARE.items():
            for precision in TARGETS[target].precisions:
                setting = Setting(target, spec, RECIPES[precision], hardware, hardware.memory_bytes)
                try:
                    figures = residency_of(forecast(setting, drawing))
                except DeviceMemoryError as error:
                    figures = [f"{error.needed_bytes / GIGA:.1f}", "does not fit", "", "", "", ""]
                rows.append([spec.name, target, precision, *figures])
    headings = ["GB", "swapped", "GB streamed a step", "hidden", "ms a step", "bound by"]
    table(["model", "target", "precision", *headings], rows)


def residency_of(made: Forecast) -> list[str]:
    swapped = ", ".join(name for name, each in made.residency.placements.items() if each.moved_bytes)
    streamed = made.residency.placements["transformer"].streamed
    hidden = "" if streamed is None else "yes" if made.copies_hide else "no"
    return [
        f"{made.device_bytes / GIGA:.1f}",
        swapped,
        f"{streamed.bytes / GIGA:.1f}" if streamed else "",
        hidden,
        f"{made.step.seconds * 1000:.1f}",
        made.step.bound,
    ]


def main(models: Annotated[list[str] | None, typer.Argument(help="Published models.")] = None) -> None:
    """Print every table."""
    specs = [published_spec(name) for name in models or MODELS]
    sizes(specs)
    operations(specs)
    for spec in specs:
        floors(spec)
    memory(specs)


if __name__ == "__main__":
    typer.run(main)
