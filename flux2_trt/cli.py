"""The command line: parse, call, print. Results go to stdout, everything else to stderr.

Exit codes: 0 done, 1 failed, 2 usage, 3 no fitting bundle, 130 interrupted. Nothing heavy is imported before a command
needs it, so that the help answers at once.
"""

from __future__ import annotations

import functools
import inspect
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from flux2_trt.bench import bench
from flux2_trt.console import Console, Json, Quiet
from flux2_trt.console import console_for as _console
from flux2_trt.errors import Flux2Error, UsageError
from flux2_trt.options import OPTIONS, Option, RunOptions, flag_name, options_from_texts

INTERRUPTED = 130
TERMINATED = 143  # 128 + SIGTERM


class Commands(TyperGroup):
    """The root command: every failure ends here, as one text and an exit code."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        words = list(sys.argv[1:] if args is None else args)
        flags = words[: words.index("--")] if "--" in words else words
        console = Console(json="--json" in flags)
        try:
            code = super().main(words, prog_name, complete_var, standalone_mode=False, **extra)
        except Flux2Error as error:
            console.error(str(error), code := error.exit_code)
        except typer.TyperException as error:  # a word that is no option, or a value that is missing
            code = error.exit_code
            if console.json or not hasattr(error, "show"):
                console.error(error.format_message(), code)
            else:
                error.show()
        except typer.Abort:
            console.error("the input ended", code := 1)
        except Exception as error:  # a bug of ours: the traceback follows
            if console.json:
                console.error(f"{type(error).__name__}: {error}", 1)
            raise
        else:
            if code == INTERRUPTED:
                console.error("interrupted", code)
        if standalone_mode:
            sys.exit(code or 0)
        return code


app = typer.Typer(
    cls=Commands,
    help="FLUX.2 pictures from compiled engines: build them for a device, then run prompts.",
    no_args_is_help=True,
    rich_markup_mode=None,  # rich takes longer to load than the help to print
    pretty_exceptions_enable=False,
)
bundles = typer.Typer(help="The bundles of this machine.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(bundles, name="bundles")
app.add_typer(bench, name="bench")


def main() -> None:
    """The entry point of the `flux2-trt` program."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # so that nothing half-made stays behind
    app(prog_name="flux2-trt")


def _print_version(asked: bool) -> None:
    if asked:
        from flux2_trt.version import own_version

        print(f"flux2-trt {own_version()}", flush=True)
        raise typer.Exit()


Version = Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")]


@app.callback()
def _root(version: Version = False) -> None: ...


def takes_run_options(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command one flag for every field of `RunOptions`; it gets them as `options`, its first argument."""
    signature = inspect.signature(command, eval_str=True)
    own = list(signature.parameters.values())[1:]

    @functools.wraps(command)
    def with_flags(**values: Any) -> None:
        command(options_from_texts({name: values.pop(name) for name in OPTIONS}), **values)

    derived = [_parameter(name, option) for name, option in OPTIONS.items()]
    parameters = [*derived, *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own)]
    with_flags.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    with_flags.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_flags


def _parameter(name: str, option: Option) -> inspect.Parameter:
    flags = [flag_name(name), *([option.short] if option.short else [])]
    if option.switch:
        switch = Annotated[bool | None, typer.Option(*flags, help=option.help, show_default=False)]
        return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=switch)
    kind = list[str] | None if option.repeated else str | None
    given = (
        typer.Argument(help=option.help, show_default=False)
        if name == "prompt"
        else typer.Option(*flags, help=option.help, metavar=name.split("_")[-1].upper(), show_default=False)
    )
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, given])


@app.command()
def build(
    model: Annotated[
        str,
        typer.Argument(help="tiny, dev, ..., a diffusers folder, a .safetensors file, or a prepared bundle."),
    ],
    target: Annotated[str, typer.Option(help="Device type to compile for; auto takes what is here.")] = "auto",
    precision: Annotated[str | None, typer.Option(help="Number format (default: the target's).")] = None,
    components: Annotated[str | None, typer.Option(help="Only these, with commas between them.")] = None,
    checkpoint: Annotated[str | None, typer.Option(help="Weights from here; random:SEED makes some up.")] = None,
    weights: Annotated[str | None, typer.Option(help="bound or embedded: beside the plan, or in it.")] = None,
    plans: Annotated[str, typer.Option(help="whole, or blocks: plans for a device that streams weights.")] = "whole",
    prepare: Annotated[bool, typer.Option("--prepare", help="Stop at graphs and weights; compile later.")] = False,
    calibration: Annotated[Path | None, typer.Option(help="Ranges of activations, for FP8 and NVFP4.")] = None,
    lora: Annotated[
        list[str] | None, typer.Option(help="LoRA to fold in, FILE or FILE:STRENGTH; several add up.", metavar="LORA")
    ] = None,
    sizes: Annotated[str, typer.Option(help="any, or kernels of their own for each of 512,1mp,4mp.")] = "any",
    max_batch: Annotated[int, typer.Option(help="Most pictures in one batch.")] = 1,
    max_references: Annotated[int, typer.Option(help="Most reference pictures of 1 MP each.")] = 1,
    output: Annotated[Path | None, typer.Option(help="Bundle store to use (default: yours).")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Compile a model into a bundle and print its path.

    Plans for data-centre GPUs are compiled where one is: elsewhere this prepares a bundle, and says what is left.
    """
    from flux2_trt.lora.request import LoraRequest
    from flux2_trt.runner import build_bundle

    console = _console(json, quiet)
    names = None if components is None else _split(components)
    report = build_bundle(
        console,
        model=model,
        target=target,
        precision=precision,
        components=names,
        checkpoint=checkpoint,
        weights=weights,
        plans=plans,
        prepare=prepare,
        calibration=calibration,
        loras=tuple(map(LoraRequest.parse, lora or ())),
        sizes=_split(sizes),
        max_batch=max_batch,
        max_references=max_references,
        output=output,
    )
    verb = "prepared" if report["left"] else "built"
    how = "was there already" if report["reused"] else f"{verb} in {report['seconds']:.1f} s"
    console.note(f"{report['model']} for {report['target']} in {report['precision']}: {how}")
    if report["left"]:
        console.note(report["left"])
    console.line(Path(report["bundle"]))
    console.object(report)


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="tiny, dev, klein-4b, ..., a diffusers folder, or a .safetensors file.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file to write.")],
    pictures: Annotated[
        Path | None, typer.Option(help="Folder of pictures with prompts: cat.png and cat.txt (tiny has its own).")
    ] = None,
    samples: Annotated[int, typer.Option(help="Pictures to use.")] = 32,
    trajectories: Annotated[int, typer.Option(help="How many of their prompts to draw too, step by step.")] = 3,
    checkpoint: Annotated[str | None, typer.Option(help="Weights from here.")] = None,
    device: Annotated[str, typer.Option(help="Where to compute: cpu or cuda.")] = "cpu",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Measure the ranges of activations, which FP8 needs, and print the path of the file."""
    from flux2_trt.runner import calibrate_model

    console = _console(json, quiet)
    report = calibrate_model(console, output, model, checkpoint, pictures, samples, trajectories, device)
    console.line(output)
    console.object(report)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="tiny, dev, klein-4b, ..., a diffusers folder, or a bundle.")],
    target: Annotated[str, typer.Option(help="Device type; auto is the GPU here.")] = "auto",
    precision: Annotated[str | None, typer.Option(help="Number format (default: the target's).")] = None,
    memory: Annotated[float | None, typer.Option(help="Free device memory in GB (default: the device's).")] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels (default: the model's).")] = None,
    height: Annotated[int | None, typer.Option(help="Height in pixels (default: the model's).")] = None,
    num_references: Annotated[
        int, typer.Option("--num-references", "--images", help="Reference pictures of 1 MP each.")
    ] = 0,
    batch: Annotated[int, typer.Option(help="Pictures at once.")] = 1,
    steps: Annotated[int | None, typer.Option(help="Denoising steps (default: the model's).")] = None,
    text_encoder: Annotated[str, typer.Option(help="local, or remote: prompt embeds come from elsewhere.")] = "local",
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Say what of a model fits where on a device, and how fast it can be at best.

    Exits with 1 where it does not fit. Times are floors from peak rates: nothing is measured, nothing is run.
    """
    from engines.advice import preflight
    from engines.report import lines_of, values_of
    from engines.setting import resolve_setting
    from flux2_trt.drawing import Drawing

    console = _console(json, quiet)
    setting = resolve_setting(model, target, precision, memory, text_encoder)
    made = preflight(setting, Drawing.of(setting.spec, width, height, batch, num_references, steps))
    if json:
        console.object(values_of(made))
        return
    for line in lines_of(made):
        console.line(line)


def _split(names: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in names.split(","))


@app.command()
@takes_run_options
def run(
    options: RunOptions,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a picture that exists.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw pictures and print their paths.

    Without a prompt a terminal opens the interactive session.
    """
    from flux2_trt.runner import Runner

    console = _console(json, quiet)
    runner = Runner(console, overwrite)
    if not options.asks and not json and sys.stdin.isatty():
        from flux2_trt.session import Session

        console.note("type what to draw, or help")
        warn = functools.partial(print, file=sys.stderr, flush=True)
        Session(runner, options, _read_line, console.line, warn, console.line).loop()
        return
    if not options.asks:
        raise UsageError('there is no prompt; give one: flux2-trt run "a red cube", or start it on a terminal')
    report = runner.run(options, on_written=console.line)
    refused = [f"picture {picture.number} was refused: {picture.reason}" for picture in report.refused]
    console.object({**asdict(report), **({"error": "; ".join(refused), "exit_code": 1} if refused else {})})
    if refused:
        raise typer.Exit(1)


@app.command()
def encode(
    prompts: Annotated[list[str], typer.Argument(help="Texts, each a prompt.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .safetensors file to write.")],
    model: Annotated[str | None, typer.Option(help="Model, by name; its newest bundle is used.")] = None,
    bundle: Annotated[str | None, typer.Option(help="Bundle folder; one with only a text encoder will do.")] = None,
    text_encoder: Annotated[str | None, typer.Option(help="URL of a text encoder elsewhere.")] = None,
    endpoint_timeout: Annotated[str | None, typer.Option(help="Seconds to wait for its answer (default: 120).")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")] = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Encode prompts into a file for run --prompt-embeds, on this machine or another, and print its path.

    The file holds the prompts as text too.
    """
    from flux2_trt.encoding import encode_file

    console = _console(json, quiet)
    given = {"model": model, "bundle": bundle, "text_encoder": text_encoder, "endpoint_timeout": endpoint_timeout}
    report = encode_file(console, prompts, output, options_from_texts(given), overwrite)
    console.line(output)
    console.object(asdict(report))


@app.command("inspect")
def inspect_pictures(
    files: Annotated[list[Path], typer.Argument(help="PNG, JPEG or WEBP files.")],
    watermark: Annotated[str | None, typer.Option(help="Bits to look for (default: those it was made with).")] = None,
    trust: Annotated[Path | None, typer.Option(help="PEM certificates to trust as signers.")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what pictures say of themselves: parameters, watermark, credentials.

    Exits with 2 where one of the files is no picture.
    """
    from flux2_trt.credentials import read_pem
    from flux2_trt.errors import ImageError
    from flux2_trt.inspection import inspect_file
    from flux2_trt.watermark import parse_message

    console = _console(json, quiet)
    message = None if watermark is None else parse_message(watermark)
    anchors = None if trust is None else read_pem(trust)
    pictures: list[dict[str, Any]] = []
    problems = []
    for file in files:
        try:
            finding = inspect_file(file, message, anchors)
        except ImageError as error:
            problems.append(str(error))
            pictures.append({"file": str(file), "problem": str(error)})
            if not json:
                console.error(str(error), error.exit_code)
        else:
            pictures.append({**finding.to_dict(), "problem": None})
            for line in finding.lines():
                console.line(line)
    failure = {"error": f"{len(problems)} of {len(files)} files are no pictures", "exit_code": 2} if problems else {}
    console.object({"pictures": pictures, **failure})
    if problems:
        raise typer.Exit(2)


@app.command("dev-certificate")
def dev_certificate(
    folder: Annotated[Path, typer.Argument(help="Where to write its three files.")] = Path(),
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Make a certificate for trying out content credentials, which nobody trusts.

    Prints the paths of the certificate, its key, and the root to trust.
    """
    from flux2_trt.certificate import write_development_certificate

    console, files = _console(json, quiet), write_development_certificate(folder)
    for path in (files.certificate, files.key, files.root):
        console.line(path)
    console.note("for development only: readers show an unknown signer")
    console.object(asdict(files))


def _read_line(prompt: str) -> str:
    with suppress(ImportError):  # where there is none, the terminal edits lines itself
        import readline  # noqa: F401 (gives `input` its history and line editing)
    try:
        if sys.stdout.isatty():
            return input(prompt)
        print(prompt, end="", file=sys.stderr, flush=True)  # stdout goes to a file, which wants paths only
        return input()
    except EOFError:
        print(file=sys.stderr)  # what the shell says next begins on a line of its own
        raise


@bundles.command("list")
def list_bundles(json: Json = False, quiet: Quiet = False) -> None:
    """Every bundle, newest first, then unfinished ones."""
    from flux2_trt.doctor import size_text, summary_values
    from flux2_trt.store import Store

    console, store = _console(json, quiet), Store()
    found = store.list()
    for bundle in found:
        state = f"damaged: {bundle.problem}" if not bundle.ok else "ok" if bundle.compiled else "not compiled yet"
        state += f", with {' and '.join(bundle.loras)}" if bundle.loras else ""
        console.line(f"{bundle.path.name}  {size_text(bundle.bytes)}  {bundle.created or '?'}  {state}")
    left = store.unfinished()
    for unfinished in left:
        console.line(f"{unfinished.name}  {size_text(unfinished.bytes)}  ?  {unfinished.state}")
    if not found and not left:
        console.note(f"no bundles in {store.bundles}; build one: flux2-trt build tiny")
    console.object(
        {
            "store": str(store.root),
            "bundles": [summary_values(bundle) for bundle in found],
            "unfinished": [{"name": each.name, "bytes": each.bytes, "state": each.state} for each in left],
        }
    )


@bundles.command()
def verify(
    names: Annotated[list[str] | None, typer.Argument(help="Names, keys or folders (default: all).")] = None,
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Hash every file of bundles; exit 3 where one differs."""
    from flux2_trt.store import Store

    console, store = _console(json, quiet), Store()
    results: list[dict[str, Any]] = []
    for name in names or [bundle.path.name for bundle in store.list()]:
        try:
            store.verify(name)
        except Flux2Error as error:
            if isinstance(error, UsageError):
                raise
            results.append({"bundle": name, "ok": False, "problem": str(error)})
        else:
            results.append({"bundle": name, "ok": True, "problem": None})
        console.line(f"{name}  {results[-1]['problem'] or 'ok'}")
    damaged = sum(not result["ok"] for result in results)
    failure = {"error": f"{damaged} of {len(results)} bundles failed", "exit_code": 3} if damaged else {}
    console.object({"bundles": results, **failure})
    if damaged:
        raise typer.Exit(3)


@bundles.command()
def remove(
    names: Annotated[list[str], typer.Argument(help="Names, paths or the starts of keys.")],
    json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Remove bundles and print the paths that they had."""
    from flux2_trt.store import Store

    console, store = _console(json, quiet), Store()
    removed = []
    for name in names:
        removed.append(path := store.remove(name, on_wait=console.note))
        console.line(path)
    console.object({"removed": [str(path) for path in removed]})


@app.command()
def doctor(json: Json = False, quiet: Quiet = False) -> None:
    """Say what this machine has.

    Exits with 1 where pictures cannot even be drawn on the CPU.
    """
    from flux2_trt.doctor import examine

    console, found = _console(json, quiet), examine()
    for line in found.lines():
        console.line(line)
    console.object(found.to_dict())
    if found.cpu_problem:
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
