"""The commands `flux2-trt bench`: measure, compare two results, make a report. All else is in `benchmarks`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from flux2_trt.console import Json, Quiet, console_for
from flux2_trt.errors import Flux2Error, Interrupted, UsageError

bench = typer.Typer(
    help="Measure speed and quality beside baselines; compare results; make reports.",
    invoke_without_command=True,
    rich_markup_mode=None,
)
RESULT = "bench-{model}.json"


@bench.callback()
def measure(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="tiny, dev, ..., or a diffusers folder.")] = "tiny",
    checkpoint: Annotated[str | None, typer.Option(help="Weights from here; random:SEED makes some up.")] = None,
    target: Annotated[str, typer.Option(help="Device type whose plans are measured.")] = "auto",
    systems: Annotated[
        str | None, typer.Option(help="plans:PRECISION, torch, torch-compile, diffusers, ... (default: all).")
    ] = None,
    scenarios: Annotated[
        str, typer.Option(help="single-stream (latency), offline (throughput), sweep (growth).")
    ] = "single-stream,offline,sweep",
    width: Annotated[int | None, typer.Option(help="Width in pixels (default: the model's).")] = None,
    height: Annotated[int | None, typer.Option(help="Height in pixels (default: the model's).")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps (default: the model's).")] = None,
    offline_batch: Annotated[int, typer.Option(help="Pictures a call of offline.")] = 4,
    sizes: Annotated[str | None, typer.Option(help="Sizes of the sweep, like 256x256,512x512.")] = None,
    sweep_steps: Annotated[str | None, typer.Option(help="Steps of the sweep, like 4,8.")] = None,
    references: Annotated[str | None, typer.Option(help="Numbers of reference pictures of the sweep.")] = None,
    batches: Annotated[str | None, typer.Option(help="Batches of the sweep.")] = None,
    full_sweep: Annotated[bool, typer.Option("--full-sweep", help="All combinations, not one axis at a time.")] = False,
    repeats: Annotated[int, typer.Option(help="Timed calls of each system.")] = 30,
    sweep_repeats: Annotated[int, typer.Option(help="Timed calls of each case of the sweep.")] = 5,
    warmup: Annotated[int, typer.Option(help="Calls before, which do not count.")] = 2,
    min_seconds: Annotated[float, typer.Option(help="Go on with single-stream until so much time has gone by.")] = 0.0,
    quality_count: Annotated[int, typer.Option(help="Samples of every kind for quality; 0 for none.")] = 10,
    threads: Annotated[int | None, typer.Option(help="Cores that each system gets (default: all).")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the noise.")] = 1,
    python: Annotated[
        list[str] | None, typer.Option(help="SYSTEM=INTERPRETER of another environment, for example of SGLang.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The JSON file to write.")] = None,
    report: Annotated[bool, typer.Option(help="Write an HTML report beside it.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that exist.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure, and print the paths of the result and of its report.

    Bundles that are missing are built. Ctrl-C keeps what was measured.
    """
    if context.invoked_subcommand is not None:
        return
    console = console_for(json, quiet)
    with _needing_benchmarks():
        from benchmarks.harness.case import parse_counts, parse_scenarios, parse_sizes
        from benchmarks.harness.measure import Asked
        from benchmarks.harness.measure import measure as run
        from benchmarks.harness.summary import lines_of, values_of
        from flux2_trt.runner import build_bundle

        def counts(name: str, text: str | None, least: int) -> tuple[int, ...] | None:
            return None if text is None else parse_counts(name, text, least)

        asked = Asked(
            model=model,
            checkpoint=checkpoint,
            target=target,
            systems=None if systems is None else tuple(name.strip() for name in systems.split(",")),
            scenarios=parse_scenarios(scenarios),
            width=width,
            height=height,
            steps=steps,
            offline_batch=offline_batch,
            sizes=None if sizes is None else parse_sizes(sizes),
            sweep_steps=counts("sweep-steps", sweep_steps, 1),
            references=counts("references", references, 0),
            batches=counts("batches", batches, 1),
            full_sweep=full_sweep,
            repeats=repeats,
            sweep_repeats=sweep_repeats,
            warmup=warmup,
            min_seconds=min_seconds,
            quality_count=quality_count,
            threads=threads,
            seed=seed,
            pythons=dict(map(_assignment, python or ())),
        )
        result_path = output or Path(RESULT.format(model=Path(model).name))
        page_path = result_path.with_suffix(".html")
        _check_free([result_path, *([page_path] if report else [])], overwrite)

        def build(name: str, kind: str, precision: str, weights: str | None) -> Path:
            built = build_bundle(console, model=name, target=kind, precision=precision, checkpoint=weights)
            return Path(built["bundle"])

        with console.clean_results():
            result = run(asked, result_path, build, console.note)
        for text in lines_of(result):
            console.note(text)
        console.line(result_path)
        if report:
            _write_report([result_path], page_path)
            console.line(page_path)
    if result.stopped:
        raise Interrupted(f"{result.stopped}; {result_path} has what was measured until then")
    console.object(values_of(result) | {"result": str(result_path), "report": str(page_path) if report else None})


@bench.command()
def compare(
    a: Annotated[Path, typer.Argument(help="A result: what is to be held.")],
    b: Annotated[Path, typer.Argument(help="Another: what is looked at.")],
    threshold: Annotated[float, typer.Option(help="Percent slower that counts, beyond the noise.")] = 5.0,
    quality_threshold: Annotated[float, typer.Option(help="Percent more error of latents that counts.")] = 10.0,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what differs between two results; exit with 1 where B is slower or worse than A."""
    for name, value in (("threshold", threshold), ("quality-threshold", quality_threshold)):
        if not 0 <= value < float("inf"):
            raise UsageError(f"--{name} is {value:g}; give percent from 0, for example 5")
    console = console_for(json, quiet)
    with _needing_benchmarks():
        from benchmarks.harness.comparison import compare as compare_results
        from benchmarks.harness.comparison import values_of
        from benchmarks.harness.result import read_result

        found = compare_results(read_result(a), read_result(b), threshold / 100, quality_threshold / 100)
    for text in found.differences:
        console.line(f"differs: {text}")
    for text in found.notes:
        console.line(f"note: {text}")
    for finding in found.findings:
        console.line(f"{'WORSE' if finding.worse else 'same or better'}: {finding.text}")
    failure: dict[str, Any] = {}
    if found.worse:
        rest = f", and {len(found.worse) - 1} more" if len(found.worse) > 1 else ""
        failure = {"error": f"B is worse than A: {found.worse[0].text}{rest}", "exit_code": 1}
    console.object(values_of(found) | failure)
    if failure:
        if not json:
            console.error(failure["error"], 1)
        raise typer.Exit(1)


@bench.command()
def report(
    results: Annotated[list[Path], typer.Argument(help="Results of flux2-trt bench; the first is the subject.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The HTML file to write.")] = Path("report.html"),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make one page of results, which needs nothing but itself, and print its path."""
    console = console_for(json, quiet)
    _check_free([output], overwrite)
    with _needing_benchmarks():
        _write_report(results, output)
    console.line(output)
    console.object({"report": str(output)})


def _write_report(results: list[Path], output: Path) -> None:
    from benchmarks.harness.result import read_result
    from benchmarks.report.page import page_of
    from flux2_trt.outputs import write_file

    write_file(output, page_of([read_result(path) for path in results]).encode(), overwrite=True)


def _check_free(paths: list[Path], overwrite: bool) -> None:
    for path in paths:
        if not path.absolute().parent.is_dir():
            raise UsageError(f"{path.parent} is no folder; give a file in one that exists")
        if path.exists() and not overwrite:
            raise UsageError(f"{path} exists and is kept; give another name with -o, or --overwrite")


def _assignment(text: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if not name or not value:
        raise UsageError(f"--python {text!r} is no SYSTEM=INTERPRETER; give for example sglang=/opt/sglang/bin/python")
    return name, value


@contextmanager
def _needing_benchmarks() -> Iterator[None]:
    """What a measurement needs beyond a base install, named where it is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise Flux2Error(
            f"this needs the package {error.name!r}, which is not installed; pip install 'flux2-trt[benchmark]'"
        ) from error
