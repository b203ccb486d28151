"""The dialogue: lines set options or draw, mistakes and Ctrl-C do not end it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from flux2_trt.errors import Flux2Error
from flux2_trt.options import OPTIONS, RunOptions
from flux2_trt.session import Session


class Painter:
    """Stands for the runner: keeps what it was asked for, or raises what comes next in `failures`."""

    def __init__(self) -> None:
        self.asked: list[RunOptions] = []
        self.failures: list[BaseException] = []

    def run(self, options: RunOptions, on_written: Callable[[Path], None]) -> None:
        self.asked.append(options)
        if self.failures:
            raise self.failures.pop()
        on_written(Path(f"flux2-{len(self.asked):04d}.png"))


class Dialogue:
    """A session whose user types `lines`, then ends the input."""

    def __init__(
        self, *lines: str, options: RunOptions | None = None, failures: tuple[BaseException, ...] = ()
    ) -> None:
        self.painter, self.written, self.complaints = Painter(), [], []
        self.painter.failures = list(failures)
        self._lines = iter(lines)
        self.session = Session(
            self.painter,
            options or RunOptions(),
            self._next_line,
            self.written.append,
            self.complaints.append,
            lambda path: self.written.append(str(path)),
        )
        self.session.loop()

    def _next_line(self, prompt: str) -> str:
        assert prompt == "> "
        for line in self._lines:
            if line == "^C":
                raise KeyboardInterrupt
            return line
        raise EOFError


def test_a_line_of_text_is_the_prompt_and_draws():
    dialogue = Dialogue("  a red cube, it's fine  ", "a cube with k=v inside")
    assert [options.prompt for options in dialogue.painter.asked] == ["a red cube, it's fine", "a cube with k=v inside"]
    assert dialogue.written == ["flux2-0001.png", "flux2-0002.png"] and not dialogue.complaints


def test_assignments_set_several_options_and_run_draws_again():
    dialogue = Dialogue('prompt="a red cube" width=128 height=256', "run", "seed=7 image=a.png,b.png", "run")
    first = RunOptions(prompt="a red cube", width=128, height=256)
    second = RunOptions(
        prompt="a red cube", width=128, height=256, seed=7, image=(Path("a.png"), Path("b.png"))
    )  # fmt: skip
    assert dialogue.painter.asked == [first, second]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("run", "no prompt yet"),
        ("width=huge", "whole number of pixels"),
        ("seed=1 colour=red", "unknown option 'colour'"),
        ("E=mc2", "unknown option 'E'"),
        ("prompt=a red cube", "quote a value with spaces"),
        ('prompt="a red', "close the quotes"),
    ],
)
def test_a_mistake_is_answered_and_changes_nothing(line, complaint):
    dialogue = Dialogue(line)
    [text] = dialogue.complaints
    assert complaint in text and dialogue.session.options == RunOptions() and not dialogue.painter.asked


def test_a_failed_run_does_not_end_the_session():
    dialogue = Dialogue("a cube", "run", failures=(Flux2Error("the disk is full"),))
    assert dialogue.complaints == ["the disk is full"] and len(dialogue.painter.asked) == 2


def test_ctrl_c_while_drawing_returns_to_the_prompt():
    dialogue = Dialogue("a cube", "run", failures=(KeyboardInterrupt(),))
    assert "stopped" in dialogue.complaints[0] and dialogue.written == ["flux2-0002.png"]


def test_ctrl_c_at_the_prompt_ends_it():
    with pytest.raises(KeyboardInterrupt):
        Dialogue("^C", "a cube")


@pytest.mark.parametrize("word", ["quit", "exit", " quit "])
def test_quit_and_exit_end_it(word):
    assert not Dialogue(word, "a cube").painter.asked


def test_reset_goes_back_to_the_options_of_the_start():
    start = RunOptions(model="tiny", width=128)
    assert Dialogue("width=256 seed=1", "reset", options=start).session.options == start


def test_show_and_help_name_every_option_and_blank_lines_do_nothing():
    dialogue = Dialogue("", "show", options=RunOptions(prompt="a cube", width=128))
    assert dialogue.written[:1] == ["prompt='a cube'"] and "width=128" in dialogue.written
    assert len(dialogue.written) == len(OPTIONS)
    text = "\n".join(Dialogue("help").written)
    assert all(name in text for name in OPTIONS)
