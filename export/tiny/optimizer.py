"""Muon for matrices and convolution kernels, AdamW for the rest.

Muon: https://kellerjordan.github.io/posts/muon. `torch.optim.Muon` always iterates in bfloat16, which is 30 times
slower on a CPU without such instructions, and always on the whole matrix.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def has_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are faster than in fp32 on `device`."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    able: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # newer than the oldest torch that we take
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))


def orthogonalize(gradient: Tensor) -> Tensor:
    """The nearest matrix [..., m, n] with singular values of about one, by Newton-Schulz iteration.

    The iteration multiplies the matrix by polynomials of its Gram matrix, all of which commute; so it runs on the
    short side squared alone.
    """
    a, b, c = NEWTON_SCHULZ
    tall = gradient.shape[-2] > gradient.shape[-1]
    x = gradient.mT if tall else gradient
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    gram = x @ x.mT
    product = identity = torch.eye(gram.shape[-1], device=gram.device)
    for _ in range(ITERATIONS):
        factor = b * gram + c * (gram @ gram) + a * identity
        product = factor @ product
        gram = factor @ factor @ gram
    x = product @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalized; a kernel counts as the matrix [out, in * height * width]."""

    def __init__(self, parameters: Iterable[Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Apply one update; no closure. Parameters of one shape are orthogonalized together."""
        for group in self.param_groups:
            updates: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                momentum = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(momentum, group["momentum"]).flatten(1)
                updates.setdefault(parameter.shape, []).append((parameter, update))
            for pairs in updates.values():
                together = orthogonalize(torch.stack([update for _, update in pairs]))
                scale = max(1.0, together.shape[1] / together.shape[2]) ** 0.5
                for (parameter, _), update in zip(pairs, together, strict=True):
                    parameter.add_(update.view_as(parameter), alpha=-group["lr"] * scale)


class Optimizer:
    """Muon for `matrices`, AdamW for the other `parameters`, with one factor on both learning rates."""

    def __init__(
        self,
        parameters: Iterable[Tensor],
        matrices: Iterable[Tensor],
        muon_learning_rate: float,
        adam_learning_rate: float,
    ) -> None:
        matrices = list(matrices)
        taken = {id(matrix) for matrix in matrices}
        others = [parameter for parameter in parameters if id(parameter) not in taken]
        self.parameters = [*matrices, *others]
        self.parts: tuple[tuple[torch.optim.Optimizer, float], ...] = (
            (Muon(matrices, lr=muon_learning_rate), muon_learning_rate),
            (torch.optim.AdamW(others, lr=adam_learning_rate, betas=(0.9, 0.98), weight_decay=0.0), adam_learning_rate),
        )

    def step(self, factor: float) -> None:
        """Clip the gradients, apply them at `factor` times the learning rates, and clear them."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part, learning_rate in self.parts:
            for group in part.param_groups:
                group["lr"] = learning_rate * factor
            part.step()
        self.clear()

    def clear(self) -> None:
        """Set the gradients to zero where they are."""
        for part, _ in self.parts:
            part.zero_grad(set_to_none=False)

    def state_dict(self) -> list[dict]:
        return [part.state_dict() for part, _ in self.parts]

    def load_state_dict(self, states: list[dict]) -> None:
        for (part, _), state in zip(self.parts, states, strict=True):
            part.load_state_dict(state)


def schedule_factor(step: int, total: int, warmup: int, decay_share: float) -> float:
    """Linear warm-up, constant, linear decay to zero over the last `decay_share` of the steps."""
    return min(1.0, (step + 1) / warmup, (total - step) / (total * decay_share))
