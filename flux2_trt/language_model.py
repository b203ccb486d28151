"""LanguageModel: the whole model of which a text encoder is the lower part, run by transformers: to write and to judge.

Loaded when it is first asked and kept until it is released. Where a CUDA device has room for it, it computes there, and
it waits in host memory in between, so that the picture has the device to itself.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flux2_trt.download import ENVIRONMENT
from flux2_trt.errors import CheckpointError, Flux2Error, UsageError
from flux2_trt.images import one_line
from flux2_trt.sampling import Sampling
from flux2_trt.spec import ModelSpec
from flux2_trt.upsampling import Answer, UpsamplingError

if TYPE_CHECKING:
    from PIL import Image

CONFIG = "config.json"
IMAGE_TOKEN = "[IMG]"  # which in a prompt would stand for a picture that is not there; the reference takes it out too
ROOM = 1.2  # times its weights, for what it computes
OTHERWISE = "give the folder of one by --upsample-model"
GENERATION_PARAMETERS = ("top_p", "top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True)
class ModelPlace:
    """A folder or a repository of the Hugging Face hub: of the model, and of the processor or tokenizer."""

    model: str
    processor: str

    @property
    def name(self) -> str:
        """Without the folders above: for metadata."""
        return Path(self.model).name if Path(self.model).is_dir() else self.model


def place_of(
    spec: ModelSpec,
    given: str | None,
    environment: Mapping[str, str] = os.environ,
    otherwise: str | None = None,
) -> ModelPlace:
    """`given`, a folder or a repository; else the folder in `TEXT_ENCODER_PATH`; else the published text encoder.

    Raises UsageError, which says what to do `otherwise`, where there is none that could write.
    """
    if given:
        return _folder(Path(given)) if Path(given).is_dir() else ModelPlace(given, given)
    variable = ENVIRONMENT["text_encoder"]
    if path := environment.get(variable):
        if Path(path).expanduser().is_dir():
            return _folder(Path(path).expanduser())
        raise UsageError(
            f"{variable}={path} is no folder of a whole language model, with a {CONFIG}; {otherwise or OTHERWISE}"
        )
    if spec.source is None or not spec.source.text_encoder_repo:
        raise UsageError(
            f"the text encoder of {spec.name} is no language model that writes; "
            + (otherwise or f"{OTHERWISE}, or --upsample openrouter")
        )
    return ModelPlace(spec.source.text_encoder_repo, spec.source.tokenizer_repo)


def _folder(path: Path) -> ModelPlace:
    """Of transformers, or of diffusers with the model in `text_encoder`."""
    if (path / CONFIG).is_file():
        return ModelPlace(str(path), str(path))
    if (path / "text_encoder" / CONFIG).is_file():
        beside = next((name for name in ("processor", "tokenizer") if (path / name).is_dir()), "text_encoder")
        return ModelPlace(str(path / "text_encoder"), str(path / beside))
    raise UsageError(f"{path} has no {CONFIG}; give the folder of a language model, with its tokenizer")


class LanguageModel:
    """A `Rewriter`, and a judge that says yes or no; both as the reference does it (flux2 `text_encoder.py`)."""

    def __init__(self, place: ModelPlace, sampling: Sampling | None = None, otherwise: str = OTHERWISE) -> None:
        """`otherwise`: what else can be done, for messages. Raises UsageError for parameters that are unknown here."""
        self._place, self._sampling, self._otherwise = place, sampling or Sampling(), otherwise
        unknown = sorted(set(self._sampling.others) - set(GENERATION_PARAMETERS))
        if unknown:
            raise UsageError(
                f"a local language model has no parameter {', '.join(unknown)}; known are temperature, max_tokens, "
                f"{', '.join(GENERATION_PARAMETERS)}"
            )
        self._loaded: tuple[Any, Any] | None = None
        self._sees: bool | None = None

    @property
    def name(self) -> str:
        return f"local {self._place.name}"

    @property
    def sees(self) -> bool:
        """Whether it can be shown pictures, by its config alone."""
        if self._sees is None:
            with self._advice():
                import torch  # noqa: F401 (transformers imports without it, and then fails late)
                import transformers

                config = transformers.AutoConfig.from_pretrained(self._place.model)
            self._sees = type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        return self._sees

    def rewrite(self, instructions: str, prompt: str, picture: Image.Image | None) -> Answer:
        """Raises UpsamplingError where it fails, CheckpointError or Flux2Error where the model cannot be had."""
        with self._asked(instructions, [*([picture] if picture else []), prompt]) as (model, processor, inputs):
            import torch

            warm = self._sampling.temperature > 0
            try:
                with torch.inference_mode():
                    written = model.generate(
                        **inputs,
                        max_new_tokens=self._sampling.max_tokens,
                        do_sample=warm,
                        **({"temperature": self._sampling.temperature} if warm else {}),
                        **self._sampling.others,
                    )
            except (RuntimeError, ValueError, IndexError) as error:  # no memory left, or a picture that does not fit
                raise UpsamplingError(f"{self.name} failed: {one_line(error)}") from error
            new = written[0, inputs["input_ids"].shape[1] :]
            tokenizer = getattr(processor, "tokenizer", processor)
            return Answer(
                tokenizer.decode(new, skip_special_tokens=True), complete=len(new) < self._sampling.max_tokens
            )

    def says_yes(self, instructions: str, content: list[str | Image.Image]) -> bool:
        """Whether "yes" is likelier than "no" as the first word of the answer. Raises Flux2Error."""
        with self._asked(instructions, content) as (model, processor, inputs):
            import torch

            tokenizer = getattr(processor, "tokenizer", processor)
            yes, no = (tokenizer.encode(word, add_special_tokens=False)[0] for word in ("yes", "no"))
            try:
                with torch.inference_mode():
                    scores = model(**inputs, use_cache=False).logits[0, -1].float()
            except (RuntimeError, ValueError, IndexError) as error:
                raise Flux2Error(f"{self.name} could not be asked: {one_line(error)}") from error
            likely = {"yes": scores[yes].item(), "no": scores[no].item()}
            if yes == no or not torch.isfinite(scores[[yes, no]]).all():
                raise Flux2Error(f"{self.name} does not tell yes from no ({likely})")
            return likely["yes"] > likely["no"]

    def release(self) -> None:
        """Gives its memory back; it loads again when it is asked again."""
        if self._loaded is None:
            return
        self._loaded = None
        gc.collect()
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @contextmanager
    def _asked(self, instructions: str, content: list[Any]) -> Iterator[tuple[Any, Any, Any]]:
        model, processor = self._loaded or self._load()
        import torch

        device = "cpu"
        if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > ROOM * model.get_memory_footprint():
            device = "cuda"
        inputs = _inputs(processor, instructions, content, pictures=self.sees).to(device)
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        try:
            model.to(device)
            yield model, processor, inputs
        finally:
            model.to("cpu")

    def _load(self) -> tuple[Any, Any]:
        sees = self.sees
        import transformers

        kinds = (
            (transformers.AutoModelForImageTextToText, transformers.AutoProcessor)
            if sees
            else (transformers.AutoModelForCausalLM, transformers.AutoTokenizer)
        )
        with self._advice():
            # No code of a repository is run, and no pickle read.
            model = kinds[0].from_pretrained(self._place.model, dtype="auto", use_safetensors=True)
            processor = kinds[1].from_pretrained(self._place.processor)
        self._loaded = model.eval(), processor
        return self._loaded

    @contextmanager
    def _advice(self) -> Iterator[None]:
        try:
            yield
        except ImportError as error:  # a processor of pictures can need torchvision
            missing = one_line(error).partition(". ")[0]
            raise Flux2Error(f"{missing}; pip install 'flux2-trt[language]', or {self._otherwise}") from error
        except (OSError, ValueError, RuntimeError) as error:
            model = self._place.model
            raise CheckpointError(
                f"the language model {model} cannot be loaded ({one_line(error).partition('. ')[0]}); download it "
                f"where there is a network: hf download {model}, or {self._otherwise}"
            ) from error


def _inputs(processor: Any, instructions: str, content: list[Any], pictures: bool) -> Any:
    texts = [part.replace(IMAGE_TOKEN, "") if isinstance(part, str) else part for part in content]
    options: dict[str, Any] = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    if pictures:
        parts = [
            {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
            for part in texts
        ]
        messages = [
            {"role": "system", "content": [{"type": "text", "text": instructions}]},
            {"role": "user", "content": parts},
        ]
    else:
        messages = [
            {"role": "system", "content": instructions},
            {"role": "user", "content": "\n\n".join(part for part in texts if isinstance(part, str))},
        ]
        options["enable_thinking"] = False  # Qwen3; other templates do not look at it
    return processor.apply_chat_template(messages, return_tensors="pt", **options)
