"""Small random models of diffusers and transformers, and what the tests that use them share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from flux2_trt.checkpoint import Checkpoint
from flux2_trt.models import QWEN3_PROMPT, published_spec
from flux2_trt.naming import Family
from flux2_trt.spec import ModelSpec

Model = TypeVar("Model", bound=torch.nn.Module)

# What a user message becomes in Qwen3's published template, in our words.
QWEN_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
PAD_TOKEN = "<|endoftext|>"
QWEN_VOCABULARY = 151_936  # the padding token of Qwen3's prompt format, 151643, has to be in it


def randomised(model: Model, seed: int) -> Model:
    """The model with weights that keep activations near 1, and norms, biases and statistics that all matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point() or "inv_freq" in name:
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if tensor.ndim > 1:
                tensor.copy_(noise * tensor[0].numel() ** -0.5)
            elif name.endswith("running_var"):
                tensor.copy_(0.5 + noise.abs())
            else:
                tensor.copy_(noise * 0.3 + (0.0 if name.endswith(("bias", "running_mean")) else 1.0))
    return model.eval()


def small_transformer(seed: int = 0, **config: Any) -> Flux2Transformer2DModel:
    sizes: dict[str, Any] = {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 24,
        "axes_dims_rope": (4, 4, 4, 4),
        "guidance_embeds": False,
    }
    return randomised(Flux2Transformer2DModel(**(sizes | config)), seed)


def small_autoencoder(seed: int = 0, **config: Any) -> AutoencoderKLFlux2:
    """Four levels, so that a token is 16 x 16 pixels, as in the published one."""
    sizes: dict[str, Any] = {
        "block_out_channels": (8, 8, 16, 16),
        "decoder_block_out_channels": (4, 8, 8, 16),
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
    }
    return randomised(AutoencoderKLFlux2(**(sizes | config)), seed)


def small_language_model(kind: str, seed: int = 0, **config: Any) -> Qwen3ForCausalLM | MistralForCausalLM:
    """`kind`: "qwen3" or "mistral". One layer more than two hidden states need: the last one passes the final norm."""
    sizes: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 12,
        "intermediate_size": 20,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "tie_word_embeddings": True,
    }
    sizes |= config
    if kind == "qwen3":
        return randomised(Qwen3ForCausalLM(Qwen3Config(**sizes)), seed)
    return randomised(MistralForCausalLM(MistralConfig(sliding_window=None, **sizes)), seed)


def small_tokenizer() -> PreTrainedTokenizerFast:
    """Characters, with Qwen3's special tokens at the ids of the published tokenizer."""
    vocabulary = {chr(code): code for code in (10, *range(32, 127))} | {PAD_TOKEN: QWEN3_PROMPT.pad_token_id}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.add_special_tokens([AddedToken(token) for token in (PAD_TOKEN, "<|im_start|>", "<|im_end|>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD_TOKEN,
        eos_token="<|im_end|>",
        padding_side=QWEN3_PROMPT.padding_side,
        chat_template=QWEN_TEMPLATE,
    )


def flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """With the published `scheduler_config.json`."""
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, shift=3.0)


def load(module: Model, folder: Path, family: Family) -> Model:
    """Fill one of our modules from a folder that diffusers or transformers saved."""
    checkpoint = Checkpoint(folder, family)
    state = {name: torch.from_numpy(checkpoint.read(name)) for name in module.state_dict()}
    module.load_state_dict(state, strict=True)
    return module.eval()


class ModuleSource:
    """The state of a module, as `write_weights` takes it."""

    def __init__(self, state: dict[str, torch.Tensor]) -> None:
        self.state = state

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.state[name].shape)

    def read(self, name: str, first: int = 0, last: int | None = None) -> NDArray[np.float32]:
        return self.state[name][first:last].numpy().copy()

    def largest(self, name: str) -> float:
        return float(self.state[name].abs().max())


def small_spec() -> ModelSpec:
    """`tiny` in the sizes of the models above, so that a session that runs all tests traces once."""
    tiny = published_spec("tiny")
    assert tiny.text_encoder is not None
    text_encoder = replace(
        tiny.text_encoder,
        vocab_size=QWEN_VOCABULARY,
        hidden_size=12,
        intermediate_size=20,
        head_dim=8,
        hidden_states=(1, 2),
    )
    transformer = replace(
        tiny.transformer,
        num_heads=2,
        head_dim=16,
        axes_dim=(4, 4, 4, 4),
        num_double_blocks=1,
        num_single_blocks=1,
        context_dim=text_encoder.context_dim,
        in_channels=16,
    )
    autoencoder = replace(
        tiny.autoencoder,
        block_out_channels=(8, 8, 16, 16),
        decoder_block_out_channels=(4, 8, 8, 16),
        latent_channels=4,
        norm_num_groups=4,
    )
    return replace(tiny, name="small", text_encoder=text_encoder, transformer=transformer, autoencoder=autoencoder)


def relative_error(ours: torch.Tensor | np.ndarray, theirs: torch.Tensor | np.ndarray) -> float:
    """Largest difference over the largest value."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())
