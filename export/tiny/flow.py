"""Flow-matching training of the built-in model: conditioning and transformer, over a text encoder that can read."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from export.modules.autoencoder import VaeEncoder
from export.modules.conditioning import Conditioning
from export.modules.text_encoder import TextEncoder
from export.modules.transformer import Transformer
from export.tiny.batches import CELLS, TOKEN_COLORS, TOKEN_SHAPES, Batch, Drawing, FlowDrawings, drawn, encode
from export.tiny.config import FlowConfig
from export.tiny.dataset import Kind
from export.tiny.optimizer import Optimizer, has_bfloat16, schedule_factor
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

    def loss(self, batch: Batch, uniform: Tensor, noise: Tensor, config: FlowConfig) -> tuple[Tensor, Tensor]:
        """Weighted mean squared error of the velocity noise - picture at shifted timesteps, and of the layout.

        uniform [B] are numbers in 0..1, noise [B, N, C] is normal. The second is the cross-entropy of shape, colour and
        mean cell coverage added up, with the same weights of tokens.
        """
        shift = config.timestep_shift
        timestep = shift * uniform / (1 + (shift - 1) * uniform)
        noisy = torch.lerp(batch.target, noise, timestep[:, None, None])
        tokens = torch.cat((noisy, batch.references), dim=1)

        middle: list[Tensor] = []
        block = self.transformer.single_blocks[self.spec.transformer.num_single_blocks // 2 - 1]
        hook = block.register_forward_hook(lambda _module, _inputs, output: middle.append(output))
        embeds = self.text_encoder(batch.input_ids, batch.attention_mask)
        modulation, text_tokens = self.conditioning(timestep, embeds)
        velocity = self.transformer.velocity(tokens, modulation, text_tokens, *batch.tables)
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


class Part:
    """The losses of one drawing in a step, and their gradients, added to those of the parameters."""

    def __init__(self, trainer: FlowTrainer, drawing: Drawing, share: float) -> None:
        self.trainer, self.share = trainer, share
        self.drawing = drawing.map(lambda tensor: torch.empty_like(tensor, device=trainer.device))
        count, _, height, width, _ = drawing.pictures.shape
        tokens = height * width // trainer.spec.autoencoder.pixels_per_token**2
        self.uniform = torch.empty(count, device=trainer.device)
        self.noise = torch.empty(count, tokens, trainer.spec.transformer.in_channels, device=trainer.device)
        self.losses = torch.empty(2, device=trainer.device)

    def run(self, drawing: Drawing) -> tuple[Tensor, Tensor]:
        """Error of the velocity and of the layout, for `drawing` and newly drawn noise."""
        self._fill(drawing)
        self._launch()
        error, surprise = self.losses.clone()
        return error, surprise

    def _launch(self) -> None:
        self._compute()

    def _fill(self, drawing: Drawing) -> None:
        for mine, given in zip(self.drawing.tensors(), drawing.tensors(), strict=True):
            mine.copy_(given, non_blocking=True)
        self.uniform.uniform_()
        self.noise.normal_()

    def _compute(self) -> None:
        trainer = self.trainer
        with torch.autocast(trainer.device.type, torch.bfloat16, enabled=trainer.bfloat16):
            batch = encode(self.drawing, trainer.encoder)
            error, surprise = trainer.model.loss(batch, self.uniform, self.noise, trainer.config)
        ((error + trainer.config.layout_weight * surprise) * self.share).backward()
        self.losses.copy_(torch.stack((error.detach(), surprise.detach())))


class CapturedPart(Part):
    """The same as a CUDA graph: a step is thousands of small kernels, which cost a host more than the GPU."""

    pool: Any = None  # torch has no public name for its type
    """Memory that all graphs share, of which none is in use between two of them."""

    def __init__(self, trainer: FlowTrainer, drawing: Drawing, share: float) -> None:
        super().__init__(trainer, drawing, share)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._fill(drawing)
            self._compute()  # what libraries make once may not be captured
        torch.cuda.current_stream().wait_stream(stream)
        trainer.optimizer.clear()
        CapturedPart.pool = CapturedPart.pool or torch.cuda.graph_pool_handle()
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=CapturedPart.pool, capture_error_mode="thread_local"):
            self._compute()

    def _launch(self) -> None:
        self.graph.replay()


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
        self.spec, self.config, self.seed, self.encoder = spec, config, seed, encoder
        self.drawings = FlowDrawings(config, spec, tokenizer)
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
        for parameter in self.optimizer.parameters:
            parameter.grad = torch.zeros_like(parameter)  # graphs add to these
        self.parts: dict[tuple[torch.Size, ...], Part] = {}
        self.step = 0
        self.seconds = 0.0
        self.devices: list[str] = []

    def run(
        self, log: Callable[[str], None], workers: int = 0, goes_on: Callable[[FlowTrainer], bool] = lambda _: True
    ) -> None:
        """Train to the end, or until `goes_on`, which is asked after every step, says no."""
        steps = range(self.step, self.config.steps)
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type
        if steps and name not in self.devices:
            self.devices.append(name)
        started, before = time.monotonic(), self.seconds
        for drawings in drawn(self.drawings, self.seed, steps, self.device, workers):
            losses = self.train_step(drawings)
            self.seconds = before + time.monotonic() - started
            if self.step % 100 == 0 or self.step == self.config.steps:
                values = " ".join(f"{kind} {value.item():.4f}" for kind, value in losses.items())
                log(f"flow {self.step}/{self.config.steps} {self.seconds:.0f} s: {values}")
            if not goes_on(self):
                break

    def train_step(self, drawings: dict[Kind, Drawing]) -> dict[str, Tensor]:
        """One update from a drawing of every kind; returns its losses."""
        losses: dict[str, Tensor] = {}
        config = self.config
        parts = {kind: self._part(kind, drawing) for kind, drawing in drawings.items()}
        torch.manual_seed(self.seed + (self.step << 32))
        for kind, part in parts.items():
            error, surprise = part.run(drawings[kind])
            losses[kind], losses[f"{kind} layout"] = error, surprise
        self.optimizer.step(schedule_factor(self.step, config.steps, config.warmup_steps, config.decay_share))
        self.step += 1
        decay = min(config.ema_decay, self.step / (self.step + 10))
        for name, value in self.model.state_dict().items():
            self.average[name].lerp_(value, 1 - decay)
        return losses

    def _part(self, kind: Kind, drawing: Drawing) -> Part:
        """What trains on drawings of this shape; on a GPU, what is made for a shape is kept."""
        share = self.config.batch[kind] / sum(self.config.batch.values())
        if self.device.type != "cuda":
            return Part(self, drawing, share)
        key = tuple(tensor.shape for tensor in drawing.tensors())
        if key not in self.parts:
            self.parts[key] = CapturedPart(self, drawing, share)
        return self.parts[key]

    def start_from(self, transformer: dict[str, Tensor]) -> None:
        """Take the weights of an earlier training, those of the conditioning among them."""
        for part in (self.model.conditioning, self.model.transformer):
            part.load_state_dict({name: transformer[name] for name in part.state_dict()})
        self.average = {name: value.clone() for name, value in self.model.state_dict().items()}

    def averaged_model(self) -> FlowModel:
        """A model of its own, on the CPU, with the weights averaged over the last steps."""
        model = FlowModel(self.spec)
        model.load_state_dict(self.average)
        return model.eval()

    def state(self) -> dict:
        """What `load_state` goes on from."""
        return {
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "devices": self.devices,
        }

    def load_state(self, state: dict) -> None:
        """Go on from `state`, as if there had been no stop: all chance comes from the seed and the step."""
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds, self.devices = state["step"], state["seconds"], state["devices"]
