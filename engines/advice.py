"""Advice: what to type for a model to fit, or to be faster, found by asking for the forecast of each change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from engines.forecast import Forecast, forecast
from engines.setting import Setting
from engines.targets import TARGETS
from export.recipes import RECIPES
from flux2_trt.drawing import Drawing
from flux2_trt.errors import DeviceMemoryError

Asked = tuple[Setting, Drawing]
SMALLER_SIDES = (1024, 512)
BATCHES = (2, 4, 8)
MOST_SUGGESTIONS = 3
PLANS_OF_BLOCKS = "plans of blocks (flux2-trt build --plans blocks)"
WORTHWHILE = 0.97  # of the time that it takes as it is


@dataclass(frozen=True)
class Change:
    """Flags that ask for something else, or words for what else to build, and what they do."""

    flags: str
    apply: Callable[[Asked], Asked]

    @property
    def subject(self) -> str:
        return self.flags.split()[0]


@dataclass(frozen=True)
class Suggestion:
    """Flags to type, and what comes of them."""

    flags: str
    forecast: Forecast


def preflight(setting: Setting, drawing: Drawing) -> Forecast:
    """The forecast; to be asked before any memory is taken.

    Raises DeviceMemoryError with what is needed, what is free, and what to type for it to fit.
    """
    try:
        return forecast(setting, drawing)
    except DeviceMemoryError as error:
        found = remedies(setting, drawing)
        advice = f"it fits with {' or with '.join(found)}" if found else "take another --target"
        raise DeviceMemoryError(f"{error}; {advice}", error.needed_bytes, error.free_bytes) from None


def remedies(setting: Setting, drawing: Drawing) -> list[str]:
    """Flags with each of which it fits: as few changes as it takes, and a few of the ways."""
    changes = [*_other_settings(setting), *_smaller_drawings(setting, drawing)]
    for count in range(1, 4):
        found = []
        for combined in combinations(changes, count):
            apart = len({change.subject for change in combined}) == count
            if apart and (made := _of(combined, (setting, drawing))):
                found.append(Suggestion(" ".join(change.flags for change in combined), made))
        if found:
            return [each.flags for each in sorted(found, key=_picture_seconds)[:MOST_SUGGESTIONS]]
    return []


def improvements(made: Forecast) -> list[Suggestion]:
    """Settings with lower floors, the fastest first."""
    asked = (made.setting, made.drawing)
    tried = [(change.flags, _of([change], asked)) for change in _other_settings(made.setting)]
    tried += [(f"--batch {other.drawing.batch}", other) for other in _larger_batches(made)]
    limit = made.picture_seconds * WORTHWHILE
    faster = [Suggestion(flags, other) for flags, other in tried if other and other.picture_seconds < limit]
    return sorted(faster, key=_picture_seconds)[:MOST_SUGGESTIONS]


def _larger_batches(made: Forecast) -> list[Forecast]:
    """The smallest batch that is about as fast as any; none where there is no larger one."""
    recorded, drawing = made.setting.recorded, made.drawing
    most = recorded.max_batch if recorded and recorded.max_batch else max(BATCHES)
    sizes = [size for size in BATCHES if drawing.batch < size <= most]
    found = [other for size in sizes if (other := _of([], (made.setting, replace(drawing, batch=size))))]
    least = min((other.picture_seconds for other in found), default=0.0)
    return [other for other in found if other.picture_seconds * WORTHWHILE <= least][:1]


def _picture_seconds(suggestion: Suggestion) -> float:
    return suggestion.forecast.picture_seconds


def _of(changes: Sequence[Change], asked: Asked) -> Forecast | None:
    """The forecast with changes; None where it does not fit."""
    for change in changes:
        asked = change.apply(asked)
    try:
        return forecast(*asked)
    except DeviceMemoryError:
        return None


def _other_settings(setting: Setting) -> Iterator[Change]:
    if setting.text_encoder == "local" and setting.spec.text_encoder:
        yield Change("--text-encoder remote", lambda asked: (replace(asked[0], text_encoder="remote"), asked[1]))
    if setting.recorded:  # its precision is settled
        if not setting.can_stream and "bound" in setting.recipe.placements:
            yield Change(PLANS_OF_BLOCKS, _with_blocks)
        return
    for name in TARGETS[setting.target].precisions:
        if name != setting.recipe.name:
            yield Change(f"--precision {name}", _with_precision(name))


def _with_blocks(asked: Asked) -> Asked:
    assert asked[0].recorded
    return replace(asked[0], recorded=replace(asked[0].recorded, streams=True)), asked[1]


def _with_precision(name: str) -> Callable[[Asked], Asked]:
    recipe = RECIPES[name]
    return lambda asked: (replace(asked[0], recipe=replace(recipe, fp8_layout=asked[0].recipe.fp8_layout)), asked[1])


def _smaller_drawings(setting: Setting, drawing: Drawing) -> Iterator[Change]:
    if drawing.batch > 1:
        yield Change("--batch 1", lambda asked: (asked[0], replace(asked[1], batch=1)))
    if drawing.references:
        yield Change("--num-references 0", lambda asked: (asked[0], replace(asked[1], references=())))
    for side in (*SMALLER_SIDES, setting.spec.sampling.min_side):
        if side**2 < drawing.pixels and side >= setting.spec.sampling.min_side:
            yield Change(f"--width {side} --height {side}", _with_side(side))


def _with_side(side: int) -> Callable[[Asked], Asked]:
    return lambda asked: (asked[0], replace(asked[1], width=side, height=side))
