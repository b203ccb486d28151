"""Flow-matching training of the built-in model: conditioning and transformer, over a text encoder that can read."""

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
from export.tiny.config import FlowConfig, FlowPhase
from export.tiny.optimizer import Optimizer, has_bfloat16, schedule_factor
from export.tiny.pool import CELLS, TOKEN_COLORS, TOKEN_SHAPES, Batch, Pool
from flux2_trt.latents import position_ids, rotary_tables
from flux2_trt.spec import ModelSpec
from flux2_trt.text import PromptTokenizer

QUERY_KEY_SCALE = 2.0
LAYOUT_WIDTHS = (len(TOKEN_SHAPES), len(TOKEN_COLORS), CELLS**2)


class FlowModel(nn.Module):
    """The text encoder, which stays as it is, what is trained on it, and a head that is used for the training only.

    `layout` reads from the middle of the transformer what shape and colour every picture token will show, and how much
    of each of its cells is drawn. Its loss teaches early what the prompt asks for and where, which the error of the
    velocity says faintly.
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        assert spec.text_encoder
        self.spec = spec
        self.text_encoder = TextEncoder(spec.text_encoder).requires_grad_(False)
        self.conditioning = Conditioning(spec.transformer)
        self.transformer = Transformer(spec.transformer)
        self.layout = nn.Linear(spec.transformer.hidden_size, sum(LAYOUT_WIDTHS))
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
            elif parameter.ndim == 2 and parameter.requires_grad:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)

    def loss(self, batch: Batch, tables: tuple[Tensor, Tensor], config: FlowConfig) -> tuple[Tensor, Tensor]:
        """Weighted mean squared error of the velocity noise - picture at shifted uniform timesteps, and of the layout.

        The second is the cross-entropy of shape, colour and mean cell coverage added up, with the same weights of
        tokens.
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
        shapes, colors, cells = logits.split(LAYOUT_WIDTHS, dim=1)
        surprise = F.cross_entropy(shapes, batch.shape, reduction="none")
        surprise = surprise + F.cross_entropy(colors, batch.color, reduction="none")
        coverage = batch.coverage.transpose(1, 2)
        surprise = surprise + F.binary_cross_entropy_with_logits(cells, coverage, reduction="none").mean(dim=1)
        weight = torch.where(batch.drawn, config.drawn_weight, 1.0)
        weight = torch.where(batch.drawn & batch.new, config.new_weight, weight)
        weight = weight / weight.sum()
        return (error * weight).sum(), (surprise * weight).sum()


class FlowTrainer:
    """The state of a training that can be stopped and resumed at any step."""

    def __init__(
        self,
        spec: ModelSpec,
        config: FlowConfig,
        seed: int,
        encoder: VaeEncoder,
        text_encoder: TextEncoder,
        tokenizer: PromptTokenizer,
    ) -> None:
        torch.manual_seed(seed)
        self.spec, self.config, self.encoder, self.tokenizer = spec, config, encoder, tokenizer
        self.rng = np.random.default_rng(seed)
        self.device = encoder.encoder.conv_in.weight.device
        self.bfloat16 = has_bfloat16(self.device)
        self.model = FlowModel(spec).to(self.device)
        self.model.text_encoder.load_state_dict(text_encoder.state_dict())
        self.average = {name: value.clone() for name, value in self.model.state_dict().items()}
        matrices = [p for n, p in self.model.named_parameters() if p.ndim == 2 and "blocks." in n]
        self.optimizer = Optimizer(
            [p for p in self.model.parameters() if p.requires_grad],
            matrices,
            config.muon_learning_rate,
            config.adam_learning_rate,
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
                losses = self.train_step(phase)
                self.seconds += time.monotonic() - started
                if self.step % 20 == 0 or self.step == last:
                    values = " ".join(f"{kind} {value:.4f}" for kind, value in losses.items())
                    log(f"flow {self.step}/{self.total_steps} {self.seconds:.0f} s: {values}")
                save(self)
            first += phase.steps

    def train_step(self, phase: FlowPhase) -> dict[str, float]:
        """One update from a batch of every kind."""
        losses: dict[str, float] = {}
        total = sum(phase.batch.values())
        for kind, count in phase.batch.items():
            size = phase.sizes[int(self.rng.integers(len(phase.sizes)))]
            pool = self.pools.setdefault(
                (kind, size),
                Pool(kind, size, self.config.pool_size, self.config.pool_start, self.encoder, self.tokenizer),
            )
            batch = self._vary_prompts(pool.batch(self.rng, count, self.config.fresh_share), phase.padded)
            places = self._places(batch.target.shape[1], phase.tokens)
            tables = self._tables(batch, size, places)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
                error, surprise = self.model.loss(batch.at(places), tables, self.config)
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

    def _vary_prompts(self, batch: Batch, padded: float) -> Batch:
        """Empty some prompts, for classifier-free guidance, and in all but a share `padded` cut needless padding."""
        empty = self.tokenizer([""])
        dropped = torch.from_numpy(self.rng.random(len(batch.target)) < self.config.prompt_dropout)[:, None]
        dropped, empty_ids, empty_mask = (
            values.to(self.device)
            for values in (dropped, torch.from_numpy(empty.input_ids), torch.from_numpy(empty.attention_mask))
        )
        input_ids = torch.where(dropped, empty_ids, batch.input_ids)
        attention_mask = torch.where(dropped, empty_mask, batch.attention_mask)
        length = input_ids.shape[1] if self.rng.random() < padded else int(attention_mask.sum(dim=1).max())
        return replace(batch, input_ids=input_ids[:, :length], attention_mask=attention_mask[:, :length])

    def _places(self, count: int, tokens: int) -> Tensor:
        """The tokens of a picture that a step looks at, in order."""
        places = self.rng.choice(count, size=min(tokens, count), replace=False)
        return torch.from_numpy(np.sort(places)).to(self.device)

    def _tables(self, batch: Batch, size: tuple[int, int], places: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary tables of the prompt, and of the target and every reference at `places`."""
        width, height = (side // self.spec.autoencoder.pixels_per_token for side in size)
        references = [(height, width)] * (batch.references.shape[1] // (height * width))
        length = batch.input_ids.shape[1]
        ids = position_ids(length, height, width, references)
        pictures = ids[length:].reshape(-1, height * width, ids.shape[1])[:, places.cpu().numpy()]
        ids = np.concatenate([ids[:length], pictures.reshape(-1, ids.shape[1])])
        transformer = self.spec.transformer
        cos, sin = rotary_tables(ids, transformer.axes_dim, transformer.theta)
        return torch.from_numpy(cos).to(self.device), torch.from_numpy(sin).to(self.device)

    def start_from(self, transformer: dict[str, Tensor]) -> None:
        """Take the weights of an earlier training, those of the conditioning among them."""
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
