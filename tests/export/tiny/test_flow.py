"""What the training of the flow model learns from: labels of tokens, the loss, and a model that comes to fit."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from export.modules.autoencoder import VaeEncoder
from export.modules.text_encoder import TextEncoder
from export.tiny.batches import TOKEN_COLORS, TOKEN_SHAPES, FlowDrawings, draw_samples, drawn, encode, token_labels
from export.tiny.config import FlowConfig
from export.tiny.dataset import Sample, sample, vocabulary
from export.tiny.flow import FlowTrainer
from export.tiny.scenes import COLORS, Scene, Thing, render
from export.tiny.tokenizer import build_tokenizer, save
from flux2_trt.latents import position_ids, rotary_tables
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


def batch_of(samples, size, encoder, tokenizer, spec=TINY):
    sizes = [size] * len(samples[0].references)
    return encode(draw_samples(samples, size, sizes, spec, tokenizer), encoder)


def test_labels_name_the_shape_and_the_colour_that_a_token_shows(tokenizer):
    scene = Scene("gray", (Thing("square", "red", 0.2, 0.26, 0.5), Thing("star", "blue", 0.12, 0.74, 0.5)))
    side = 16
    pixels = render(scene, 256, 256).reshape(16, side, 16, side, 3).swapaxes(1, 2).reshape(256, -1, 3)
    shown = torch.from_numpy((pixels != COLORS["gray"]).any(axis=(1, 2)).reshape(1, 16, 16))
    drawing = draw_samples([Sample("text", "", (), scene, frozenset())], (256, 256), (), TINY, tokenizer)
    shape, color = token_labels(drawing, shown)
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
    batch = batch_of([each], SIZE, encoder, tokenizer)
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
    batch = batch_of([edit], (256, 256), encoder, tokenizer)
    new = batch.new.reshape(16, 16)
    assert new[8, 11]
    assert not new[:, :9].any()
    text = batch_of([replace(edit, kind="text", references=())], (256, 256), encoder, tokenizer)
    assert not text.new.any()


def test_the_loss_of_a_new_model_is_the_weighted_power_of_noise_minus_picture(tokenizer, encoder):
    config = FlowConfig()
    trainer = FlowTrainer(TINY, config, 0, encoder, TextEncoder(TINY.text_encoder), tokenizer)
    rng = np.random.default_rng(2)
    batch = batch_of([sample(rng, kind="edit") for _ in range(3)], SIZE, encoder, tokenizer)
    assert batch.references.shape == batch.target.shape
    torch.manual_seed(5)
    uniform, noise = torch.rand(3), torch.randn(batch.target.shape)
    error, surprise = trainer.model.loss(batch, uniform, noise, config)
    power = (noise - batch.target).square().mean(dim=-1)
    weight = torch.where(batch.drawn, config.drawn_weight, 1.0)
    weight[batch.drawn & batch.new] = config.new_weight
    assert error.item() == pytest.approx(((power * weight).sum() / weight.sum()).item(), rel=1e-5)
    assert surprise.item() > 2.0


def small_trainer(tokenizer, encoder, config):
    transformer = replace(TINY.transformer, num_heads=2, head_dim=16, axes_dim=(4, 4, 4, 4))
    spec = replace(TINY, transformer=transformer)
    torch.manual_seed(1)
    return FlowTrainer(spec, config, 0, encoder, TextEncoder(spec.text_encoder), tokenizer)


def test_a_few_samples_can_be_learned_by_heart(tokenizer, encoder):
    config = FlowConfig()
    trainer = small_trainer(tokenizer, encoder, config)
    rng = np.random.default_rng(3)
    batch = batch_of([sample(rng, kind="text") for _ in range(4)], SIZE, encoder, tokenizer, trainer.spec)
    errors, surprises = [], []
    for _ in range(80):
        error, surprise = trainer.model.loss(batch, torch.rand(4), torch.randn(batch.target.shape), config)
        (error + surprise).backward()
        trainer.optimizer.step(1.0)
        errors.append(error.item())
        surprises.append(surprise.item())
    assert np.mean(errors[-10:]) < 0.8 * np.mean(errors[:5])
    assert np.mean(surprises[-10:]) < 0.5 * np.mean(surprises[:5])


def test_references_of_another_size_have_tokens_and_positions_of_their_own(tokenizer, encoder):
    rng = np.random.default_rng(8)
    edits = [sample(rng, kind="edit") for _ in range(2)]
    shown = [edits[0], replace(edits[1], prompt="")]
    batch = encode(draw_samples(shown, (192, 128), [(128, 160)], TINY, tokenizer), encoder)
    assert batch.target.shape == (2, 12 * 8, 32)
    assert batch.references.shape == (2, 8 * 10, 32)
    length = batch.input_ids.shape[1]
    ids = position_ids(length, 8, 12, [(10, 8)])
    tables = rotary_tables(ids, TINY.transformer.axes_dim, TINY.transformer.theta)
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(batch.tables, tables, strict=True))
    pixels = torch.from_numpy(render(edits[0].references[0], 128, 160))[None]
    with torch.no_grad():
        expected = encoder(pixels).flatten(1, 2)
    assert torch.allclose(
        batch.references[:1], expected, atol=0.01
    )  # convolutions of two pictures differ from those of one
    assert np.array_equal(batch.input_ids.numpy(), tokenizer([edits[0].prompt, ""]).input_ids)


def test_what_a_step_is_shown_depends_on_seed_and_step_alone_and_fits_its_size(tokenizer):
    config = FlowConfig(batch={"text": 2, "edit": 8}, default_share=0.5, default_reference_share=0.5)
    draw, sizes = FlowDrawings(config, TINY, tokenizer), set()
    shown = (drawn(draw, seed, range(12), torch.device("cpu"), workers=0) for seed in (0, 0, 1))
    for drawings, again, other in zip(*shown, strict=True):
        for kind, count in config.batch.items():
            drawing = drawings[kind]
            pairs = zip(drawing.tensors(), again[kind].tensors(), strict=True)
            assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
            assert not torch.equal(drawing.input_ids[0], other[kind].input_ids[0]) or drawing.pictures.shape[0] == 1
            samples, _, height, width, _ = drawing.pictures.shape
            assert (width, height) in {config.size, *config.other_sizes}
            assert samples == max(1, round(count * 256 * 256 / (width * height)))
            sizes.add((width, height))
            for reference in drawing.references:
                assert reference.shape[1:3] in {(height, width), (256, 256)}
    assert config.size in sizes
    assert len(sizes) > 4


def test_training_that_was_stopped_ends_where_one_without_a_stop_does(tokenizer, encoder):
    config = FlowConfig(steps=3, batch={"text": 2, "combine": 1}, other_sizes=(SIZE,), size=SIZE)

    def trained(stop: int) -> FlowTrainer:
        trainer = small_trainer(tokenizer, encoder, config)
        trainer.run(lambda message: None, goes_on=lambda current: current.step < stop)
        return trainer

    whole, stopped = trained(3), trained(2)
    assert (whole.step, stopped.step) == (3, 2)
    resumed = small_trainer(tokenizer, encoder, config)
    resumed.load_state(stopped.state())
    resumed.run(lambda message: None)
    assert resumed.step == 3
    assert resumed.devices == ["cpu"]
    for name, value in whole.averaged_model().state_dict().items():
        assert torch.allclose(resumed.average[name], value, atol=1e-6), name

    model = whole.averaged_model()
    started = small_trainer(tokenizer, encoder, config)
    started.start_from({**model.conditioning.state_dict(), **model.transformer.state_dict()})
    assert started.step == 0
    for name, value in model.transformer.state_dict().items():
        assert torch.equal(started.model.transformer.state_dict()[name], value)
        assert torch.equal(started.average[f"transformer.{name}"], value)
