"""Session: the dialogue in which options are set line by line and pictures are drawn, with the model kept loaded."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from flux2_trt.errors import Flux2Error, UsageError
from flux2_trt.options import OPTIONS, RunOptions, as_text, parse_assignment

PROMPT = "> "
ASSIGNMENT = re.compile(r"\s*[A-Za-z][\w-]*=")
GUIDE = """\
a line of text     draws it
key=value ...      sets options; key= goes back to the default, quotes hold spaces: prompt="a red cube" seed=7
run                draws the prompt again
show               prints the options
reset              goes back to the options that the session began with
help               prints this
quit, exit         ends the session, as do Ctrl-D and, at the prompt, Ctrl-C; Ctrl-C while drawing stops that picture
options:"""


class PictureRunner(Protocol):
    """What the session needs of `flux2_trt.runner.Runner`."""

    def run(self, options: RunOptions, on_written: Callable[[Path], None]) -> Any: ...


class Session:
    """One dialogue; lines come from `read_line` (EOFError ends it), answers go to `write` and `complain`."""

    def __init__(
        self,
        runner: PictureRunner,
        options: RunOptions,
        read_line: Callable[[str], str],
        write: Callable[[str], None],
        complain: Callable[[str], None],
        on_written: Callable[[Path], None],
    ) -> None:
        self.options = options
        self._initial = options
        self._runner = runner
        self._read_line = read_line
        self._write = write
        self._complain = complain
        self._on_written = on_written
        self._commands: dict[str, Callable[[], None]] = {
            "run": self._run,
            "show": self._show,
            "reset": self._reset,
            "help": self._help,
        }

    def loop(self) -> None:
        """Until quit, exit or the end of the input. KeyboardInterrupt at the prompt is the caller's to handle."""
        while True:
            try:
                line = self._read_line(PROMPT).strip()
            except EOFError:
                return
            if line in ("quit", "exit"):
                return
            try:
                self.answer(line)
            except KeyboardInterrupt:
                self._complain("stopped; the options stay as they are")
            except Flux2Error as error:
                self._complain(str(error))

    def answer(self, line: str) -> None:
        """One line that does not end the session. Raises Flux2Error; no assignment of a refused line is kept."""
        if not line:
            return
        if command := self._commands.get(line):
            command()
        elif ASSIGNMENT.match(line):
            self.options = _assigned(line, self.options)
        else:
            self.options = replace(self.options, prompt=line)
            self._run()

    def _run(self) -> None:
        if not self.options.asks:
            raise UsageError("there is no prompt yet; type what to draw")
        self._runner.run(self.options, self._on_written)

    def _show(self) -> None:
        for name in OPTIONS:
            self._write(f"{name}={shlex.quote(text) if (text := as_text(name, self.options)) else ''}")

    def _reset(self) -> None:
        self.options = self._initial

    def _help(self) -> None:
        self._write(GUIDE)
        width = max(map(len, OPTIONS))
        for name, option in OPTIONS.items():
            self._write(f"  {name:{width}}  {option.help}")


def _assigned(line: str, options: RunOptions) -> RunOptions:
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise UsageError(f'{line!r} cannot be read ({error}); close the quotes: prompt="a red cube"') from error
    for word in words:
        if not ASSIGNMENT.match(word):
            raise UsageError(f'{word!r} is no key=value; quote a value with spaces: prompt="a red cube"')
        options = parse_assignment(word, options)
    return options
