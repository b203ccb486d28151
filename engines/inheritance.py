"""Inheritance: what a bundle with LoRAs takes over from the bundle of the same request without them.

Plans that take their weights as inputs do not know them, so they are linked, and so are all weight files that no LoRA
touches; of the others, only the weights that differ are converted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from export.conversion import Scales
from export.rewriting import rewrite_weights
from export.tensor_source import TensorSource
from export.weights import read_spans
from flux2_trt.bundle import Bundle
from flux2_trt.draft import Draft
from flux2_trt.manifest import ComponentRecord
from flux2_trt.naming import FAMILY_OF
from flux2_trt.spec import Component


def inherit(
    draft: Draft,
    base: Bundle,
    component: Component,
    touched: frozenset[str],
    source: TensorSource,
    scales: Scales,
    on_progress: Callable[[str], None],
) -> list[ComponentRecord] | None:
    """The records of a component whose files are those of `base`, but for the weights `touched`, which are `source`'s.

    None where it has to be built, since `base` has its weights in its plan and a LoRA may touch them.
    """
    records = [record for record in base.manifest.components if record.name.partition(".")[0] == component]
    old, new = base.weights_path(records[0].name), draft.weights_path(component)
    weights = records[0].weights
    if old is None and FAMILY_OF[component] == "transformer":
        on_progress(f"the weights of {component} are in its plan: it is compiled again with the LoRAs")
        return None
    new.unlink(missing_ok=True)  # what an interrupted build left, which had no base
    if old and (names := touched & read_spans(old).keys()):
        on_progress(f"writing the weights of {component}: {len(names)} that LoRAs change, all others as they are")
        rewrite_weights(old, new, names, source, scales)
        weights = draft.record(new)
    elif old and weights:
        draft.adopt(weights, old)
    for record in records:
        draft.adopt(record.plan, base.plan_path(record.name))
    return [replace(record, weights=weights) for record in records]
