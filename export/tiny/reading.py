"""The text encoder of the built-in model learns to read: what a prompt says, before any picture is drawn.

As in FLUX.2, the flow model finds a text encoder that understands prompts and stays as it is. A linear head, dropped
afterwards, reads the facts of a prompt from the embeds at its last token and at the padding that follows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export.modules.text_encoder import TextEncoder
from export.tiny.batches import drawn
from export.tiny.config import TextConfig
from export.tiny.dataset import OPERATIONS, Sample, sample
from export.tiny.optimizer import Optimizer, has_bfloat16, schedule_factor
from export.tiny.prompts import COLOR_WORDS, SHAPE_WORDS, tokens
from export.tiny.scenes import COLORS, POSITIONS, SHAPES, SIZES, Thing
from flux2_trt.spec import TextEncoderSpec
from flux2_trt.text import PromptTokenizer

_THING = {"shape": (*SHAPES,), "color": (*COLORS,), "size": (*SIZES,), "position": (*POSITIONS,)}
FACTS: dict[str, tuple[str, ...]] = {
    "operation": ("text", *OPERATIONS),
    "image": ("first", "second"),
    "background": tuple(COLORS),
    **{f"{name} 1": values for name, values in _THING.items()},
    **{f"{name} 2": values for name, values in _THING.items()},
}
"""What a prompt may say. A text describes things 1 and 2; an edit names thing 1 and says what it becomes as thing 2."""


def facts(sample: Sample) -> dict[str, str]:
    """What `sample.prompt` says; what it leaves open is absent, but for a text the defaults are there."""
    target = sample.target
    if sample.kind == "text":
        said = {"operation": "text", "background": target.background}
        for index, thing in enumerate(target.things, start=1):
            said |= _thing(thing, index)
        return said
    said = {"operation": sample.operation}
    if sample.kind == "combine":
        return said | {"image": FACTS["image"][sample.source_index]}
    (source,) = sample.references
    if sample.operation == "backdrop":
        return said | {"background": target.background}
    index = next(i for i, thing in enumerate(source.things) if thing not in target.things)
    before, words = source.things[index], set(tokens(sample.prompt))
    if words.intersection(SHAPE_WORDS[before.shape]):
        said["shape 1"] = before.shape
    if words.intersection(COLOR_WORDS[before.color]):
        said["color 1"] = before.color
    if sample.operation != "remove":
        after = _thing(target.things[index], 2)
        said |= {name: value for name, value in after.items() if value != _thing(before, 2)[name]}
    return said


def _thing(thing: Thing, index: int) -> dict[str, str]:
    return {f"{name} {index}": getattr(thing, "size_name" if name == "size" else name) for name in _THING}


def _labels(samples: list[Sample]) -> Tensor:
    """[B, len(FACTS)] int64: 0 for what is not said, else 1 + the index in `FACTS`."""
    said = [facts(each) for each in samples]
    rows = [[1 + values.index(each[name]) if name in each else 0 for name, values in FACTS.items()] for each in said]
    return torch.tensor(rows)


class Reader(nn.Module):
    """The text encoder under a head for every fact."""

    def __init__(self, spec: TextEncoderSpec) -> None:
        super().__init__()
        self.text_encoder = TextEncoder(spec)
        self.head = nn.Linear(spec.context_dim, sum(1 + len(values) for values in FACTS.values()))
        for name, parameter in self.text_encoder.named_parameters():
            if name == "embed_tokens.weight":
                nn.init.normal_(parameter, std=1.0)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
        """Logits [B, 1 + values, T] of every fact."""
        logits = self.head(self.text_encoder(input_ids, attention_mask)).float().transpose(1, 2)
        return list(logits.split([1 + len(values) for values in FACTS.values()], dim=1))


def train_text_encoder(
    spec: TextEncoderSpec,
    config: TextConfig,
    seed: int,
    tokenizer: PromptTokenizer,
    log: Callable[[str], None],
    device: torch.device,
    workers: int = 0,
) -> TextEncoder:
    """The text encoder, trained on the facts of prompts from the training side of the split."""
    torch.manual_seed(seed)
    reader = Reader(spec).to(device)
    bfloat16 = has_bfloat16(device)
    matrices = [p for n, p in reader.named_parameters() if p.ndim == 2 and "layers." in n]
    optimizer = Optimizer(reader.parameters(), matrices, config.muon_learning_rate, config.adam_learning_rate)
    draw = partial(_draw, config.batch, tokenizer)
    for step, batch in enumerate(drawn(draw, seed, range(config.steps), device, workers), start=1):
        input_ids, attention_mask, labels, summary = (values.to(device, non_blocking=True) for values in batch)
        with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
            logits = reader(input_ids, attention_mask)
            surprise = torch.stack(
                [
                    F.cross_entropy(each, labels[:, index : index + 1].expand_as(summary), reduction="none")
                    for index, each in enumerate(logits)
                ]
            )
        loss = (surprise.sum(dim=0) * summary).sum() / summary.sum()
        loss.backward()
        optimizer.step(schedule_factor(step - 1, config.steps, config.warmup_steps, config.decay_share))
        if step % 100 == 0 or step == config.steps:
            log(f"text encoder {step}/{config.steps} loss {loss.item():.4f}")
    log(f"text encoder reads {reading_share(reader, tokenizer, config.held_out, seed):.4f} of held-out prompts right")
    return reader.text_encoder.eval()


def _draw(count: int, tokenizer: PromptTokenizer, rng: np.random.Generator, _step: int) -> tuple[Tensor, ...]:
    return _batch([sample(rng) for _ in range(count)], tokenizer)


def _batch(samples: list[Sample], tokenizer: PromptTokenizer) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Token ids, mask [B, T], labels [B, len(FACTS)], and [B, T] bool: the last token of a prompt and its padding."""
    prompts = tokenizer([each.prompt for each in samples])
    mask = torch.from_numpy(prompts.attention_mask)
    summary = torch.arange(mask.shape[1]) >= mask.sum(dim=1, keepdim=True) - 1
    return torch.from_numpy(prompts.input_ids), mask, _labels(samples), summary


@torch.no_grad()
def reading_share(reader: Reader, tokenizer: PromptTokenizer, count: int, seed: int) -> float:
    """The share of held-out prompts of which every fact is read right at every place that the head reads."""
    rng = np.random.default_rng(seed)
    batch = _batch([sample(rng, held_out=True) for _ in range(count)], tokenizer)
    device = reader.head.weight.device
    input_ids, attention_mask, labels, summary = (values.to(device) for values in batch)
    read = torch.stack([logits.argmax(dim=1) for logits in reader(input_ids, attention_mask)], dim=-1)
    return float(((read == labels[:, None]).all(dim=-1) | ~summary).all(dim=1).float().mean())
