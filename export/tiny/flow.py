"""Flow-matching training of the built-in model: text encoder, conditioning and transformer together."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export.modules.autoencoder import VaeEncoder
from export.modules.conditioning import Conditioning
from export.modules.text_encoder import TextEncoder
from export.modules.transformer import Transformer
from export.tiny.config import FlowConfig
from export.tiny.optimizer import Optimizer, schedule_factor
from export.tiny.pool import TOKEN_COLORS, TOKEN_SHAPES, Batch, Pool
from flux2_trt.latents import position_ids, rotary_tables
from flux2_trt.spec import ModelSpec
from flux2_trt.text import PromptTokenizer

QUERY_KEY_SCALE = 2.0


def has_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are faster than in fp32 on `device`."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # newer than the oldest torch that we take
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


class FlowModel(nn.Module):
    """The three trained components, and a head that is used for the training only.

    `layout` reads from the middle of the transformer what shape and colour every picture token will show. Its loss
    teaches early what the prompt asks for and where, which the error of the velocity says faintly.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.text_encoder
        self.spec = spec
        self.text_encoder = TextEncoder(spec.text_encoder)
        self.conditioning = Conditioning(spec.transformer)
        self.transformer = Transformer(spec.transformer)
        self.layout = nn.Linear(spec.transformer.hidden_size, len(TOKEN_SHAPES) + len(TOKEN_COLORS))
        self._initialize()

    def _initialize(self) -> None:
        """Small normal weights; modulations and the last projection are zero, so every block starts as identity.

        Scales of queries and keys start at two: attention that is sharp early learns sooner to copy from a reference.
        """
        for name, parameter in self.named_parameters():
            if "transformer" in name and name.endswith(("query_norm.scale", "key_norm.scale")):
                nn.init.constant_(parameter, QUERY_KEY_SCALE)
            elif "modulation" in name.lower() or name.endswith("final_layer.linear.weight"):
                nn.init.zeros_(parameter)
            elif name.endswith("embed_tokens.weight"):
                nn.init.normal_(parameter, std=1.0)
            elif parameter.ndim == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)

    def loss(self, batch: Batch, tables: tuple[Tensor, Tensor], config: FlowConfig) -> tuple[Tensor, Tensor]:
        """Weighted mean squared error of the velocity noise - picture at shifted uniform timesteps, and of the layout.

        The second is the cross-entropy of shape plus that of colour, with the same weights of tokens.
        """
        shift, device = config.timestep_shift, batch.target.device
        uniform = torch.rand(len(batch.target)).to(device)
        timestep = shift * uniform / (1 + (shift - 1) * uniform)
        noise = torch.randn(batch.target.shape).to(device)
        noisy = torch.lerp(batch.target, noise, timestep[:, None, None])
        tokens = torch.cat((noisy, batch.references), dim=1)

        middle: list[Tensor] = []
        block = self.transformer.single_blocks[self.spec.transformer.num_single_blocks // 2 - 1]
        hook = block.register_forward_hook(lambda _module, _inputs, output: middle.append(output))
        embeds = self.text_encoder(batch.input_ids, batch.attention_mask)
        modulation, text_tokens = self.conditioning(timestep, embeds)
        velocity = self.transformer.velocity(tokens, modulation, text_tokens, *tables)
        hook.remove()

        count = noise.shape[1]
        error = (velocity[:, :count].float() - (noise - batch.target)).square().mean(dim=-1)
        logits = self.layout(middle[0][:, text_tokens.shape[1] :][:, :count]).float().transpose(1, 2)
        shapes, colors = logits.split((len(TOKEN_SHAPES), len(TOKEN_COLORS)), dim=1)
        surprise = F.cross_entropy(shapes, batch.shape, reduction="none")
        surprise = surprise + F.cross_entropy(colors, batch.color, reduction="none")
        weight = torch.where(batch.drawn, config.drawn_weight, 1.0)
        weight = weight / weight.sum()
        return (error * weight).sum(), (surprise * weight).sum()


class FlowTrainer:
    """The state of a training that can be stopped and resumed at any step."""

    def __init__(self, spec: ModelSpec, config: FlowConfig, seed: int, encoder: VaeEncoder, tokenizer: PromptTokenizer):
        torch.manual_seed(seed)
        self.spec, self.config, self.encoder, self.tokenizer = spec, config, encoder, tokenizer
        self.rng = np.random.default_rng(seed)
        self.device = encoder.encoder.conv_in.weight.device
        self.bfloat16 = has_bfloat16(self.device)
        self.model = FlowModel(spec).to(self.device)
        self.average = {name: value.clone() for name, value in self.model.state_dict().items()}
        matrices = [p for n, p in self.model.named_parameters() if p.ndim == 2 and ("blocks." in n or "layers." in n)]
        self.optimizer = Optimizer(
            self.model.parameters(),
            matrices,
            config.muon_learning_rate,
            config.adam_learning_rate,
            torch.bfloat16 if self.bfloat16 else torch.float32,
        )
        self.pools: dict[tuple[str, tuple[int, int]], Pool] = {}
        self.step = 0
        self.seconds = 0.0

    @property
    def total_steps(self) -> int:
        return sum(phase.steps for phase in self.config.phases)

    def run(self, log: Callable[[str], None], save: Callable[[FlowTrainer], None], last: int) -> None:
        """Train until step `last`; `save` is called after every step and decides for itself."""
        first = 0
        for phase in self.config.phases:
            while first <= self.step < min(first + phase.steps, last):
                started = time.monotonic()
                losses = self.train_step(phase.sizes, dict(phase.batch))
                self.seconds += time.monotonic() - started
                if self.step % 20 == 0 or self.step == last:
                    values = " ".join(f"{kind} {value:.4f}" for kind, value in losses.items())
                    log(f"flow {self.step}/{self.total_steps} {self.seconds:.0f} s: {values}")
                save(self)
            first += phase.steps

    def train_step(self, sizes: tuple[tuple[int, int], ...], counts: dict) -> dict[str, float]:
        """One update from a batch of every kind."""
        losses = {}
        total = sum(counts.values())
        for kind, count in counts.items():
            size = sizes[int(self.rng.integers(len(sizes)))]
            pool = self.pools.setdefault(
                (kind, size), Pool(kind, size, self.config.pool_size, self.encoder, self.tokenizer)
            )
            batch = self._vary_prompts(pool.batch(self.rng, count, self.config.fresh_share))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
                error, surprise = self.model.loss(batch, self._tables(batch, size), self.config)
            ((error + self.config.layout_weight * surprise) * (count / total)).backward()
            losses[kind] = error.item()
            losses[f"{kind} layout"] = surprise.item()
        config = self.config
        self.optimizer.step(schedule_factor(self.step, self.total_steps, config.warmup_steps, config.decay_share))
        self.step += 1
        decay = min(config.ema_decay, self.step / (self.step + 10))
        for name, value in self.model.state_dict().items():
            self.average[name].lerp_(value, 1 - decay)
        return losses

    def _vary_prompts(self, batch: Batch) -> Batch:
        """Empty some prompts, for classifier-free guidance, and usually cut the padding that no prompt needs."""
        empty = self.tokenizer([""])
        dropped = torch.from_numpy(self.rng.random(len(batch.target)) < self.config.prompt_dropout)[:, None]
        dropped, empty_ids, empty_mask = (
            values.to(self.device)
            for values in (dropped, torch.from_numpy(empty.input_ids), torch.from_numpy(empty.attention_mask))
        )
        input_ids = torch.where(dropped, empty_ids, batch.input_ids)
        attention_mask = torch.where(dropped, empty_mask, batch.attention_mask)
        longest = int(attention_mask.sum(dim=1).max())
        length = int(self.rng.integers(longest, input_ids.shape[1] + 1)) if self.rng.random() < 0.3 else longest
        return replace(batch, input_ids=input_ids[:, :length], attention_mask=attention_mask[:, :length])

    def _tables(self, batch: Batch, size: tuple[int, int]) -> tuple[Tensor, Tensor]:
        width, height = (side // self.spec.autoencoder.pixels_per_token for side in size)
        references = [(height, width)] * (batch.references.shape[1] // (height * width))
        ids = position_ids(batch.input_ids.shape[1], height, width, references)
        transformer = self.spec.transformer
        cos, sin = rotary_tables(ids, transformer.axes_dim, transformer.theta)
        return torch.from_numpy(cos).to(self.device), torch.from_numpy(sin).to(self.device)

    def start_from(self, text_encoder: dict[str, Tensor], transformer: dict[str, Tensor]) -> None:
        """Take the weights of an earlier training; `transformer` holds those of the conditioning too."""
        self.model.text_encoder.load_state_dict(text_encoder)
        for part in (self.model.conditioning, self.model.transformer):
            part.load_state_dict({name: transformer[name] for name in part.state_dict()})
        self.average = {name: value.clone() for name, value in self.model.state_dict().items()}

    def averaged_model(self) -> FlowModel:
        model = FlowModel(self.spec)
        model.load_state_dict(self.average)
        return model.eval()

    def state(self) -> dict:
        return {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "rng": self.rng.bit_generator.state,
            "torch_rng": torch.get_rng_state(),
            "step": self.step,
            "seconds": self.seconds,
        }

    def load_state(self, state: dict) -> None:
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.rng.bit_generator.state = state["rng"]
        torch.set_rng_state(state["torch_rng"].cpu())
        self.step, self.seconds = state["step"], state["seconds"]
