"""What is refused and why, with transformers' classifiers and language models small enough to make here."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from language_models import save_classifier
from PIL import Image

from flux2_trt.errors import CheckpointError, Flux2Error
from flux2_trt.safety import Classifier, ContentChecks, ContentError, published_checks

BLACK, WHITE = (Image.new("RGB", (64, 48), colour) for colour in ("black", "white"))


class Judge:
    """Says yes to what holds a word, or to pictures of a colour."""

    def __init__(self, word: str = "\0", colour: tuple[int, int, int] | None = None, sees: bool = True) -> None:
        self.word, self.colour, self.sees = word, colour, sees
        self.asked: list[list] = []

    def says_yes(self, instructions: str, content: list) -> bool:
        self.asked.append(content)
        pictures = [part for part in content if not isinstance(part, str)]
        if pictures:
            assert pictures[0].width * pictures[0].height <= 512**2
            return pictures[0].getpixel((0, 0)) == self.colour
        return self.word in content[0]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("models") / "classifier")


def checks(classifier: Path, judge: Judge, **how: object) -> ContentChecks:
    return published_checks(judge, Classifier(str(classifier), **how))  # type: ignore[arg-type]


def test_the_classifier_refuses_above_its_threshold(classifier: Path) -> None:
    judge = Judge()
    found = checks(classifier, judge)
    assert found.picture(BLACK) is None and "0.88 of 1, above 0.85" in str(found.picture(WHITE))
    assert checks(classifier, judge, threshold=0.89).picture(WHITE) is None
    assert checks(classifier, judge, unsafe="normal").picture(BLACK)
    assert found.picture(BLACK.convert("L").convert("RGBA")) is None  # whatever kind of picture it is


def test_a_judge_is_asked_about_prompts_and_pictures(classifier: Path) -> None:
    judge = Judge("Mickey", (0, 0, 255))
    found = checks(classifier, judge)
    assert found.prompt("a cube") is None and "language model" in str(found.prompt("Mickey on a cube"))
    assert "language model" in str(found.picture(Image.new("RGB", (4000, 100), "blue")))
    assert found.picture(BLACK) is None and found.picture(WHITE)


def test_what_was_judged_is_remembered(classifier: Path) -> None:
    judge = Judge()
    found = checks(classifier, judge)
    for _ in range(3):
        found.prompt("a cube")
        found.picture(BLACK.copy())
    assert len(judge.asked) == 2
    found.picture(Image.new("RGB", (48, 64), "black"))  # the same bytes, in another shape
    assert len(judge.asked) == 3


def test_who_cannot_see_is_asked_about_prompts_only(classifier: Path) -> None:
    judge = Judge("Mickey", (0, 0, 0), sees=False)
    found = checks(classifier, judge)
    assert found.picture(BLACK) is None and found.picture(WHITE) and found.prompt("Mickey")


def test_a_percent_sign_is_a_part_of_a_prompt(classifier: Path) -> None:
    judge = Judge("100 % {cotton} %s")
    assert checks(classifier, judge).prompt("100 % {cotton} %s")


def test_any_function_is_a_check() -> None:
    own = ContentChecks(prompt=lambda prompt: "no cubes" if "cube" in prompt else None)
    own.require_prompt("a ball")
    own.require_references([WHITE])
    with pytest.raises(ContentError, match=r"the prompt was refused: no cubes; .*--safety off") as caught:
        own.require_prompt("a cube")
    assert caught.value.exit_code == 1
    own = ContentChecks(picture=lambda picture: "too bright" if picture.getpixel((0, 0))[0] else None)
    with pytest.raises(ContentError, match="reference 2 was refused: too bright"):
        own.require_references([BLACK, WHITE])


def test_a_classifier_that_does_not_answer_the_question_is_an_error(tmp_path: Path) -> None:
    other = save_classifier(tmp_path / "cats", ("cat", "dog"))
    with pytest.raises(Flux2Error, match="does not say how likely 'nsfw' is"):
        Classifier(str(other))(WHITE)


def test_what_cannot_be_loaded_is_an_error_and_no_consent(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="--safety off") as caught:
        published_checks(Judge()).picture(WHITE)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(Flux2Error, match="--safety off"):
        published_checks(Judge()).picture(WHITE)  # type: ignore[arg-type]
