"""Console: results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.progress import Progress

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, errors too.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print no progress and no notes.")]


@dataclass(frozen=True)
class Console:
    """The two streams of a command, and what the user wants to see on them.

    `json`: stdout gets exactly one JSON object; `quiet`: stderr gets only warnings and errors.
    """

    json: bool = False
    quiet: bool = False
    results: IO[str] = field(default_factory=lambda: sys.stdout)
    notes: IO[str] = field(default_factory=lambda: sys.stderr)
    _bars: list[Progress] = field(default_factory=list, init=False, repr=False)

    @property
    def shows_bars(self) -> bool:
        """On a terminal, unless the user wants none of it."""
        return not self.json and not self.quiet and self.notes.isatty()

    def line(self, text: str | Path) -> None:
        """A line of a result; a path goes out byte for byte, whatever the encoding of the terminal."""
        if not self.json:
            with self._without_bar():
                typer.echo(os.fsencode(text), file=self.results)

    def object(self, values: Mapping[str, Any]) -> None:
        """The JSON object of a command, printed only with `json`."""
        if self.json:
            print(json.dumps(values, default=str), file=self.results, flush=True)

    def note(self, text: str) -> None:
        if not self.quiet:
            print(text, file=self.notes, flush=True)

    def warn(self, text: str) -> None:
        with self._without_bar():
            print(f"warning: {text}", file=self.notes, flush=True)

    def error(self, text: str, exit_code: int) -> None:
        """As the JSON object of the command, or as one line on stderr."""
        self.object({"error": text, "exit_code": exit_code})
        if not self.json:
            print(f"error: {text}", file=self.notes, flush=True)

    @contextmanager
    def clean_results(self) -> Iterator[None]:
        """Whatever a library prints inside goes to stderr."""
        with redirect_stdout(self.notes):
            yield

    @contextmanager
    def building(self) -> Iterator[tuple[Callable[[str], None], Callable[[str, int, int], bool]]]:
        """Two functions: one notes what is done, the other takes a phase of it, its steps done and all of them.

        The phase is a bar on a terminal, and nothing elsewhere.
        """
        if not self.shows_bars:
            yield self.note, lambda name, done, total: True
            return
        from rich.console import Console as Terminal
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        terminal = Terminal(file=self.notes)
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=terminal, transient=True, redirect_stdout=False) as bar:
            task = bar.add_task("", total=None, visible=False)

            def note(text: str) -> None:
                bar.update(task, visible=False)
                terminal.print(text, markup=False, highlight=False, soft_wrap=True)

            def show(name: str, done: int, total: int) -> bool:
                bar.update(task, description=name, completed=done, total=total, visible=True)
                return True

            yield note, show

    @contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[], None]]:
        """A bar on a terminal, nothing elsewhere; the function that it gives advances it by one."""
        if not self.shows_bars:
            yield lambda: None
            return
        from rich.console import Console as Terminal
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Terminal(file=self.notes), transient=True, redirect_stdout=False) as bar:
            task = bar.add_task(what, total=total)
            self._bars.append(bar)
            try:
                yield lambda: bar.advance(task)
            finally:
                self._bars.remove(bar)

    @contextmanager
    def _without_bar(self) -> Iterator[None]:
        """Two streams may be the same terminal: the bar leaves while a line is written there."""
        for bar in self._bars:
            bar.stop()
        yield
        for bar in self._bars:
            bar.start()


def console_for(json: bool, quiet: bool) -> Console:
    """The console of a command, with the program's log in it."""
    logging.basicConfig(level=logging.ERROR if quiet else logging.WARNING, format="%(message)s", force=True)
    return Console(json, quiet)
