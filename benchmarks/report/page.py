"""Page: one self-contained HTML file of one or several results. It asks for nothing, and runs no script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.harness.comparison import compare
from benchmarks.harness.result import Result
from benchmarks.report.growth import growth
from benchmarks.report.markup import ms, paragraph, percent, table
from benchmarks.report.published import PUBLISHED
from benchmarks.report.standing import floor, quality, resources
from benchmarks.report.timing import goals, latency, stages, throughput
from engines.hardware import HARDWARE
from engines.roofline import floor_of
from export.recipes import RECIPES
from flux2_trt.drawing import Drawing
from flux2_trt.errors import UsageError
from flux2_trt.models import published_spec

SECTIONS = (goals, latency, stages, quality, floor, throughput, resources, growth)
STYLE = Path(__file__).with_name("style.css")
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
BUSY_LOAD, BUSY_SHARE = 0.3, 0.1
"""Load average for a core before, and share of the machine that others took, from which figures are marked."""


def page_of(results: Sequence[Result]) -> str:
    """The first result in full, and how each of the others compares with it."""
    result = results[0]
    title = f"{result.identity['model']['name']} on {_device(result)}"
    body = [_head(result, title), *(section(result) for section in SECTIONS)]
    body += [_others(result, results[1:]), _published(result), _missing(result), _identity(result)]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>flux2-trt: {escape(title)}</title><style>{STYLE.read_text(encoding='utf-8')}</style></head>"
        f"<body>{''.join(body)}</body></html>\n"
    )


def _device(result: Result) -> str:
    machine = result.identity["machine"]
    gpu = machine.get("gpu")
    if gpu:
        return str(gpu["name"])
    cores = result.options.get("threads", machine["cores"])
    return f"{cores} core{'' if cores == 1 else 's'} of {machine['processor']}"


def _head(result: Result, title: str) -> str:
    git = result.identity["software"]["git"]
    commit = f", commit {git['commit'][:12]}{' with changes' if git['changed'] else ''}" if git else ""
    packages = result.identity["software"]["packages"]
    versions = ", ".join(
        f"{name} {packages[name]}" for name in ("onnxruntime", "torch", "diffusers") if packages.get(name)
    )
    lines = [f"<h1>{escape(title)}</h1>"]
    version = f"flux2-trt {packages.get('flux2-trt')}{commit}; {versions}"
    lines.append(paragraph(escape(f"Measured {result.created.replace('T', ' ')}. {version}."), "soft"))
    return "".join(lines) + "".join(paragraph(escape(text), "note") for text in _warnings(result))


def _warnings(result: Result) -> list[str]:
    warnings = []
    if result.stopped:
        warnings.append(f"Not complete: {result.stopped}. What was measured until then is here.")
    machine = result.identity["machine"]
    load = machine.get("load_average_before")
    if load is not None and load > BUSY_LOAD * machine["cores"]:
        warnings.append(f"The machine was busy: its load average was {load} on {machine['cores']} cores before.")
    shares = [each.others_share for each in result.measurements if each.others_share is not None]
    if shares and max(shares) > BUSY_SHARE:
        warnings.append(
            f"Others took part of the machine while this was measured: {percent(median(shares))} of its cores in the "
            f"median of the cases, {percent(max(shares))} in the worst. Ratios of systems hold better than seconds."
        )
    throttled = sorted({reason for each in result.measurements for reason in each.throttling})
    if throttled:
        warnings.append(f"The GPU was throttled: {', '.join(throttled)}.")
    return warnings


def _others(result: Result, others: Sequence[Result]) -> str:
    parts = []
    for other in others:
        named = f"The result of {escape(other.created.replace('T', ' '))} ({escape(_device(other))})"
        try:
            found = compare(result, other)
        except UsageError as error:
            parts.append(f"<h3>{named}</h3>{paragraph(escape(str(error)))}")
            continue
        rows = [
            ['<b class="bad">worse</b>' if each.worse else "same or better", escape(each.text)]
            for each in found.findings
        ]
        notes = "".join(f"<li>{escape(text)}</li>" for text in (*found.notes, *found.differences))
        verdict = f"{len(found.worse)} of {len(found.findings)} numbers are worse beyond the noise."
        parts.append(
            f"<h3>{named}, as B</h3>{paragraph(verdict)}"
            f"<details><summary>Every number</summary>{table(['', 'A is this page'], rows, texts=(1,))}</details>"
            f"<details><summary>What else differs</summary><ul>{notes}</ul></details>"
        )
    return f"<h2>Beside other results</h2>{''.join(parts)}" if parts else ""


def _published(result: Result) -> str:
    """Others' figures, with the part of the roofline that each reaches; ours above them where the model is the same."""
    name, rows = result.identity["model"]["name"], []
    same = [each for each in PUBLISHED if each.model == name]
    if same:
        for each in result.of("single-stream"):
            if each.step_seconds:
                cells = [name, "this page", escape(each.system), "", f"{each.case.width}x{each.case.height}"]
                cells += [str(each.case.steps), ms(median(each.step_seconds)), f"{median(each.seconds):.3g}"]
                sheet = each.work.floor_seconds
                cells += ["" if sheet is None else percent(sheet / median(each.step_seconds)), "measured here"]
                rows.append(cells)
    for found in PUBLISHED:
        spec = published_spec(found.model)
        drawing = Drawing.of(spec, found.width, found.height, num_references=found.references, steps=found.steps)
        least = floor_of("transformer", spec, drawing, RECIPES[found.precision], HARDWARE[found.target]).seconds
        rows.append(
            [
                found.model,
                found.target,
                escape(found.system),
                found.precision,
                f"{found.width}x{found.height}",
                str(found.steps),
                "" if found.step_seconds is None else ms(found.step_seconds),
                "" if found.seconds is None else f"{found.seconds:.3g}",
                "" if found.step_seconds is None else percent(least / found.step_seconds),
                f'published: <a href="{escape(found.source)}">{escape(found.source.split("//")[1].split("/")[2])}</a>',
            ]
        )
    heads = [
        "model",
        "device",
        "system",
        "precision",
        "size",
        "steps",
        "ms a step",
        "s a picture",
        "of the floor",
        "source",
    ]
    text = (
        "Published by others and not measured by this project; the floor is the least time by the data sheet "
        "(engines.roofline), with linears alone in fp8 where it says so. "
    )
    text += "" if same else f"None of these is for {name}, so there is nothing on this page to set beside them."
    return f"<h2>Published figures</h2>{table(heads, rows)}{paragraph(escape(text), 'soft')}"


def _missing(result: Result) -> str:
    if not result.missing:
        return ""
    rows = [[escape(each.name), escape(each.reason)] for each in result.missing]
    return f"<h2>What is missing</h2>{table(['what', 'why'], rows, texts=(0, 1))}"


def _identity(result: Result) -> str:
    values = {
        **result.identity,
        "options": result.options,
        "systems": {system.name: system.facts for system in result.systems},
        "schema": f"{result.schema} {result.version}",
    }
    rows = [[escape(name), f"<code>{escape(text)}</code>"] for name, text in _leaves(values)]
    return (
        "<h2>Identity</h2>"
        f"<details><summary>Machine, software, hashes, options: {len(rows)} entries</summary>"
        f"{table(['', ''], rows, texts=(1,))}</details>"
    )


def _leaves(values: Any, prefix: str = "") -> list[tuple[str, str]]:
    if not isinstance(values, Mapping):
        return [(prefix, "none" if values is None else str(values))]
    return [leaf for key, inner in values.items() for leaf in _leaves(inner, f"{prefix}.{key}" if prefix else str(key))]
