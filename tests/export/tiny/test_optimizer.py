"""Orthogonalization against the singular value decomposition, and the schedule."""

import pytest
import torch

from export.tiny.optimizer import Optimizer, orthogonalize, schedule_factor


@pytest.mark.parametrize("shape", [(24, 24), (16, 80), (80, 16)])
def test_singular_values_become_about_one_and_singular_vectors_stay(shape):
    torch.manual_seed(0)
    gradient = torch.randn(shape)
    update = orthogonalize(gradient)
    values = torch.linalg.svdvals(update)
    assert values.max() < 1.35
    assert values.median() > 0.6
    left, _, right = torch.linalg.svd(gradient, full_matrices=False)
    rotated = left.T @ update @ right.T
    off_diagonal = rotated - torch.diag(rotated.diagonal())
    assert off_diagonal.abs().max() < 1e-4


def test_optimizer_resumes_where_it_stopped():
    def make() -> tuple[torch.nn.Linear, Optimizer]:
        torch.manual_seed(1)
        layer = torch.nn.Linear(6, 4)
        return layer, Optimizer(layer.parameters(), [layer.weight], 0.02, 0.01)

    def advance(layer: torch.nn.Linear, optimizer: Optimizer) -> None:
        layer(torch.ones(3, 6)).square().sum().backward()
        optimizer.step(0.5)

    straight, optimizer = make()
    for _ in range(4):
        advance(straight, optimizer)
    stopped, first = make()
    for _ in range(2):
        advance(stopped, first)
    resumed, second = make()
    resumed.load_state_dict(stopped.state_dict())
    second.load_state_dict(first.state_dict())
    for _ in range(2):
        advance(resumed, second)
    assert torch.equal(straight.weight, resumed.weight)
    assert torch.equal(straight.bias, resumed.bias)


def test_learning_rate_rises_stays_and_falls_to_zero():
    factors = [schedule_factor(step, 100, warmup=10, decay_share=0.25) for step in (0, 9, 50, 75, 99)]
    assert factors == pytest.approx([0.1, 1.0, 1.0, 1.0, 0.04])
