"""Report: a forecast as people read it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from engines.advice import improvements
from engines.forecast import MOST_BATCH, Forecast, largest
from engines.hardware import GIGA
from engines.work import runs_of
from flux2_trt.doctor import size_text
from flux2_trt.drawing import MEGAPIXEL
from flux2_trt.spec import Component


def lines_of(made: Forecast) -> Iterator[str]:
    """A table of the components, then what it takes, how fast it can be at best, and what would be faster."""
    setting, drawing = made.setting, made.drawing
    pictures = "1 picture" if drawing.batch == 1 else f"{drawing.batch} pictures at once"
    references = ""
    if drawing.references:
        count, megapixels = len(drawing.references), drawing.references[0] / MEGAPIXEL
        references = f", {count} reference{'s' if count > 1 else ''} of {megapixels:.2g} MP"
    yield (
        f"{setting.spec.name} in {setting.recipe.name} on {setting.target} with {size_text(setting.memory_bytes)}: "
        f"{pictures} of {drawing.width}x{drawing.height}{references}, {drawing.steps} steps"
    )
    yield ""
    yield from _table([("component", "weights", "where", "runs", "floor", "bound by"), *_rows(made)])
    yield ""
    items = made.items
    yield (
        f"Device memory: {size_text(made.device_bytes)} = weights {size_text(items['weights'])} + scratch "
        f"{size_text(items['scratch'])} ({_scratch_source(made)}) + buffers {size_text(items['buffers'])} + context "
        f"{size_text(items['context'])} (assumed)."
    )
    yield _movement(made)
    yield (
        f"At best {_duration(made.step.seconds)} a step, bound by {made.step.bound}, and "
        f"{_duration(made.picture_seconds)} a picture: floors from peak rates, not measured."
    )
    batch, side = largest(setting, drawing, made.residency)
    batches = f"{batch} or more" if batch == MOST_BATCH else batch
    yield f"Largest that fits so: batches of {batches} at this size, or one picture of {side}x{side}."
    ways = [f"{each.flags} ({_duration(each.forecast.picture_seconds)} a picture)" for each in improvements(made)]
    if ways:
        yield f"Lower floors: {', '.join(ways)}."


def values_of(made: Forecast) -> dict[str, Any]:
    """The same as JSON values, in bytes and seconds."""
    setting, drawing = made.setting, made.drawing
    batch, side = largest(setting, drawing, made.residency)
    return {
        "model": setting.spec.name,
        "target": setting.target,
        "precision": setting.recipe.name,
        "width": drawing.width,
        "height": drawing.height,
        "batch": drawing.batch,
        "num_references": len(drawing.references),
        "steps": drawing.steps,
        "memory_bytes": setting.memory_bytes,
        "device_bytes": made.device_bytes,
        "budget_bytes": made.items,
        "scratch_source": _scratch_source(made),
        "pinned_host_bytes": made.pinned_bytes,
        "hardware": asdict(setting.hardware),
        "components": [_component(made, component) for component in setting.spec.components],
        "step_floor_seconds": made.step.seconds,
        "step_bound": made.step.bound,
        "copies_hide": made.copies_hide,
        "swapping_seconds": made.moving_seconds,
        "picture_floor_seconds": made.picture_seconds,
        "largest": {"batch": batch, "side": side},
        "faster": [
            {"flags": each.flags, "picture_floor_seconds": each.forecast.picture_seconds} for each in improvements(made)
        ],
    }


def _component(made: Forecast, component: Component) -> dict[str, Any]:
    if component not in made.floors:
        return {"name": component, "kind": "remote" if component == "text_encoder" else "unused"}
    placement, floor = made.residency.placements[component], made.floors[component]
    return {
        "name": component,
        "kind": placement.kind,
        "weight_bytes": placement.weight_bytes,
        "device_bytes": placement.device_bytes,
        "streamed_bytes_per_step": placement.streamed.bytes if placement.streamed else 0,
        "swapped_bytes": placement.moved_bytes,
        "scratch_bytes": made.setting.scratch(component, made.drawing),
        "runs": runs_of(component, made.drawing),
        "floor_seconds": floor.seconds,
        "bound": floor.bound,
    }


def _scratch_source(made: Forecast) -> str:
    recorded = made.setting.recorded
    return "compiler" if recorded and made.scratch_bytes in recorded.scratch.values() else "estimate"


def _rows(made: Forecast) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for component in made.setting.spec.components:
        if component in made.floors:
            floor = made.floors[component]
            weights = size_text(made.residency.placements[component].weight_bytes)
            runs = str(runs_of(component, made.drawing))
            rows.append((component, weights, _where(made, component), runs, _duration(floor.seconds), floor.bound))
        elif component == "text_encoder":
            rows.append((component, "-", "remote", "-", "-", "-"))
    return rows


def _where(made: Forecast, component: Component) -> str:
    placement = made.residency.placements[component]
    if placement.streamed is None:
        return {"resident": "resident", "swapped": "swapped in for its stage"}[placement.kind]
    size, streamed = made.setting.spec.transformer, placement.streamed
    moved, all_blocks = streamed.doubles + streamed.singles, size.num_double_blocks + size.num_single_blocks
    return f"{moved} of {all_blocks} blocks streamed, {size_text(streamed.bytes)} a step"


def _movement(made: Forecast) -> str:
    if not made.pinned_bytes:
        return "Everything stays on the device."
    bus, streams = made.setting.hardware.bus, made.residency.placements["transformer"].streamed is not None
    parts = []
    if streams:
        how = "hides behind compute" if made.copies_hide else "does not hide behind compute"
        needs = " (needs flux2-trt build --plans blocks)" if made.setting.recorded is None else ""
        parts.append(f"streaming {how}{needs}")
    if made.moving_seconds:
        parts.append(f"swapping takes {_duration(made.moving_seconds)} a batch")
    return (
        f"Over {bus.name} at {bus.bytes_per_second / GIGA:g} GB/s (assumed), from {size_text(made.pinned_bytes)} of "
        f"pinned host memory: {'; '.join(parts)}."
    )


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1000:.3g} ms"
