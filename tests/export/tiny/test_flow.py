"""What the training of the flow model learns from: labels of tokens, the loss, and a model that comes to fit."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from export.modules.autoencoder import VaeEncoder
from export.modules.text_encoder import TextEncoder
from export.tiny.config import FlowConfig, FlowPhase
from export.tiny.dataset import Sample, sample, vocabulary
from export.tiny.flow import FlowTrainer
from export.tiny.pool import TOKEN_COLORS, TOKEN_SHAPES, Pool, encode_samples, token_labels
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


def test_coverage_is_the_share_of_each_cell_that_is_not_background(tokenizer, encoder):
    rng = np.random.default_rng(6)
    each = sample(rng, kind="edit")
    batch = encode_samples([each], SIZE, encoder, tokenizer)
    differs = (render(each.target, *SIZE) != COLORS[each.target.background]).any(axis=2)
    for token in range(64):
        y, x = divmod(token, 8)
        patch = differs[16 * y : 16 * (y + 1), 16 * x : 16 * (x + 1)].reshape(4, 4, 4, 4).mean(axis=(1, 3))
        assert batch.coverage[0, token].numpy() == pytest.approx(patch.ravel())
    assert 0 < batch.coverage.mean() < 0.5


def test_what_an_edit_changes_is_new_and_the_rest_is_not(tokenizer, encoder):
    circle, square = Thing("circle", "red", 0.2, 0.26, 0.5), Thing("square", "blue", 0.12, 0.74, 0.5)
    source = Scene("white", (circle, square))
    target = Scene("white", (circle, replace(square, color="green")))
    edit = Sample("edit", "make the square green", (source,), target, frozenset())
    batch = encode_samples([edit], (256, 256), encoder, tokenizer)
    new = batch.new.reshape(16, 16)
    assert new[8, 11]
    assert not new[:, :9].any()
    text = encode_samples([replace(edit, kind="text", references=())], (256, 256), encoder, tokenizer)
    assert not text.new.any()


def test_the_loss_of_a_new_model_is_the_weighted_power_of_noise_minus_picture(tokenizer, encoder):
    config = FlowConfig()
    trainer = FlowTrainer(TINY, config, 0, encoder, TextEncoder(TINY.text_encoder), tokenizer)
    rng = np.random.default_rng(2)
    batch = encode_samples([sample(rng, kind="edit") for _ in range(3)], SIZE, encoder, tokenizer)
    assert batch.references.shape == batch.target.shape
    tables = trainer._tables(batch, SIZE, torch.arange(64))
    torch.manual_seed(5)
    error, surprise = trainer.model.loss(batch, tables, config)
    torch.manual_seed(5)
    torch.rand(3)
    power = (torch.randn(batch.target.shape) - batch.target).square().mean(dim=-1)
    weight = torch.where(batch.drawn, config.drawn_weight, 1.0)
    weight[batch.drawn & batch.new] = config.new_weight
    assert error.item() == pytest.approx(((power * weight).sum() / weight.sum()).item(), rel=1e-5)
    assert surprise.item() > 2.0


def test_a_step_can_look_at_some_tokens_the_same_ones_of_target_and_references(tokenizer, encoder):
    trainer = small_trainer(tokenizer, encoder, FlowConfig())
    rng = np.random.default_rng(4)
    batch = encode_samples([sample(rng, kind="combine") for _ in range(2)], SIZE, encoder, tokenizer)
    places = trainer._places(64, 10)
    assert len(places) == 10
    assert (places.diff() > 0).all()
    some, length = batch.at(places), batch.input_ids.shape[1]
    pictures = torch.cat((batch.target, batch.references), dim=1).unflatten(1, (3, 64))
    seen = torch.cat((some.target, some.references), dim=1).unflatten(1, (3, 10))
    assert torch.equal(seen, pictures[:, :, places])
    assert torch.equal(some.shape, batch.shape[:, places])
    assert torch.equal(some.coverage, batch.coverage[:, places])
    for all_rows, rows in zip(
        trainer._tables(batch, SIZE, torch.arange(64)), trainer._tables(batch, SIZE, places), strict=True
    ):
        assert torch.equal(rows[:length], all_rows[:length])
        assert torch.equal(rows[length:].unflatten(0, (3, 10)), all_rows[length:].unflatten(0, (3, 64))[:, places])


def test_a_pool_uses_its_start_once_and_then_mostly_what_it_has(tokenizer, encoder):
    pool, rng = Pool("text", SIZE, 12, 4, encoder, tokenizer), np.random.default_rng(5)
    seen = [pool.batch(rng, 3, fresh_share=0.0).input_ids for _ in range(3)]
    assert pool.filled == 6
    assert len(torch.cat(seen[:2]).unique(dim=0)) == 6
    assert all(any(torch.equal(row, old) for old in torch.cat(seen[:2])) for row in seen[2])
    for _ in range(5):
        pool.batch(rng, 3, fresh_share=1.0)
    assert pool.filled == 12
    assert pool.cursor == 9


def small_trainer(tokenizer, encoder, config):
    transformer = replace(TINY.transformer, num_heads=2, head_dim=16, axes_dim=(4, 4, 4, 4))
    spec = replace(TINY, transformer=transformer)
    return FlowTrainer(spec, config, 0, encoder, TextEncoder(spec.text_encoder), tokenizer)


def test_a_few_samples_can_be_learned_by_heart(tokenizer, encoder):
    config = FlowConfig()
    trainer = small_trainer(tokenizer, encoder, config)
    rng = np.random.default_rng(3)
    batch = encode_samples([sample(rng, kind="text") for _ in range(4)], SIZE, encoder, tokenizer)
    tables = trainer._tables(batch, SIZE, torch.arange(64))
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
    phase = FlowPhase(steps=6, sizes=(SIZE,), batch={"text": 2, "combine": 1}, tokens=40, padded=0.5)
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
    started.start_from({**model.conditioning.state_dict(), **model.transformer.state_dict()})
    assert started.step == 0
    for name, value in model.transformer.state_dict().items():
        assert torch.equal(started.model.transformer.state_dict()[name], value)
        assert torch.equal(started.average[f"transformer.{name}"], value)
