"""What the training of the flow model learns from: labels of tokens, the loss, and a model that comes to fit."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from export.modules.autoencoder import VaeEncoder
from export.tiny.config import FlowConfig, FlowPhase
from export.tiny.dataset import sample, vocabulary
from export.tiny.flow import FlowTrainer
from export.tiny.pool import TOKEN_COLORS, TOKEN_SHAPES, encode_samples, token_labels
from export.tiny.scenes import COLORS, Scene, Thing, render
from export.tiny.tokenizer import build_tokenizer, save
from flux2_trt.models import published_spec
from flux2_trt.text import PromptTokenizer

SIZE = (128, 128)
TINY = published_spec("tiny")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    file = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    save(build_tokenizer(vocabulary()), file)
    return PromptTokenizer.from_file(file, TINY.prompt)


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return VaeEncoder(TINY.autoencoder).eval()


def test_labels_name_the_shape_and_the_colour_that_a_token_shows():
    scene = Scene("gray", (Thing("square", "red", 0.2, 0.26, 0.5), Thing("star", "blue", 0.12, 0.74, 0.5)))
    side = 16
    pixels = render(scene, 256, 256).reshape(16, side, 16, side, 3).swapaxes(1, 2).reshape(256, -1, 3)
    shown = torch.from_numpy((pixels != COLORS["gray"]).any(axis=(1, 2)).reshape(1, 16, 16))
    shape, color = token_labels([scene], shown)
    plain = 0
    for token, patch in enumerate(pixels):
        if (patch == patch[0]).all():
            plain += 1
            assert COLORS[TOKEN_COLORS[color[0, token]]] == tuple(patch[0])
    assert plain > 100
    grid = shape.reshape(16, 16)
    assert TOKEN_SHAPES[grid[8, 4]] == "square"
    assert TOKEN_SHAPES[grid[8, 11]] == "star"
    assert TOKEN_SHAPES[grid[0, 0]] == "background"


def test_the_loss_of_a_new_model_is_the_weighted_power_of_noise_minus_picture(tokenizer, encoder):
    config = FlowConfig()
    trainer = FlowTrainer(TINY, config, 0, encoder, tokenizer)
    rng = np.random.default_rng(2)
    batch = encode_samples([sample(rng, kind="edit") for _ in range(3)], SIZE, encoder, tokenizer)
    assert batch.references.shape == batch.target.shape
    tables = trainer._tables(batch, SIZE)
    torch.manual_seed(5)
    error, surprise = trainer.model.loss(batch, tables, config)
    torch.manual_seed(5)
    torch.rand(3)
    power = (torch.randn(batch.target.shape) - batch.target).square().mean(dim=-1)
    weight = torch.where(batch.drawn, config.drawn_weight, 1.0)
    assert error.item() == pytest.approx(((power * weight).sum() / weight.sum()).item(), rel=1e-5)
    assert surprise.item() > 2.0


def small_trainer(tokenizer, encoder, config):
    transformer = replace(TINY.transformer, num_heads=2, head_dim=16, axes_dim=(4, 4, 4, 4))
    return FlowTrainer(replace(TINY, transformer=transformer), config, 0, encoder, tokenizer)


def test_a_few_samples_can_be_learned_by_heart(tokenizer, encoder):
    config = FlowConfig()
    trainer = small_trainer(tokenizer, encoder, config)
    rng = np.random.default_rng(3)
    batch = encode_samples([sample(rng, kind="text") for _ in range(4)], SIZE, encoder, tokenizer)
    tables = trainer._tables(batch, SIZE)
    errors, surprises = [], []
    for _ in range(80):
        error, surprise = trainer.model.loss(batch, tables, config)
        (error + surprise).backward()
        trainer.optimizer.step(1.0)
        errors.append(error.item())
        surprises.append(surprise.item())
    assert np.mean(errors[-10:]) < 0.8 * np.mean(errors[:5])
    assert np.mean(surprises[-10:]) < 0.5 * np.mean(surprises[:5])


def test_training_resumes_from_its_state_and_starts_from_an_earlier_model(tokenizer, encoder):
    phase = FlowPhase(steps=6, sizes=(SIZE,), batch={"text": 2, "combine": 1})
    config = FlowConfig(phases=(phase,), pool_size=4)
    trainer = small_trainer(tokenizer, encoder, config)
    trainer.run(lambda message: None, lambda current: None, last=2)

    resumed = small_trainer(tokenizer, encoder, config)
    resumed.load_state(trainer.state())
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value)
    saved: list[int] = []
    resumed.run(lambda message: None, lambda current: saved.append(current.step), last=4)
    assert saved == [3, 4]

    model = trainer.averaged_model()
    started = small_trainer(tokenizer, encoder, config)
    started.start_from(
        model.text_encoder.state_dict(), {**model.conditioning.state_dict(), **model.transformer.state_dict()}
    )
    assert started.step == 0
    for name, value in model.transformer.state_dict().items():
        assert torch.equal(started.model.transformer.state_dict()[name], value)
        assert torch.equal(started.average[f"transformer.{name}"], value)
