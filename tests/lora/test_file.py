"""Files that are no LoRA of the model: all that is wrong with them is said in one error, by name."""

import json

import pytest
import torch
from diffusers_models import small_spec, small_transformer
from lora_files import Tensors, bfl_linears, kohya_keys, linears, named, peft_keys, random_layers, write

from flux2_trt.errors import CheckpointError
from flux2_trt.inventory import expected_tensors
from flux2_trt.lora.file import Lora, lora_identity
from flux2_trt.lora.request import LoraRequest
from flux2_trt.models import published_spec

MODEL = small_transformer(0)
SPEC = small_spec()
QKV, PROJ = "diffusion_model.double_blocks.0.img_attn.qkv", "diffusion_model.double_blocks.0.img_attn.proj"


def sound() -> Tensors:
    return named(random_layers(bfl_linears(MODEL), 0), peft_keys("diffusion_model."))


def refusal(tmp_path, tensors, spec=SPEC, metadata=None) -> str:
    path = write(tmp_path / "lora.safetensors", tensors, metadata)
    with pytest.raises(CheckpointError) as caught:
        Lora.open(LoraRequest(path), spec)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({f"{QKV}.dora_scale": torch.ones(96, 1)}, f"  DoRA: {QKV}.dora_scale"),
        ({f"{QKV}.lora_magnitude_vector": torch.ones(96)}, f"  DoRA: {QKV}.lora_magnitude_vector"),
        ({f"{QKV}.lokr_w1": torch.ones(4, 4)}, f"  LoKr: {QKV}.lokr_w1"),
        ({f"{QKV}.hada_w1_a": torch.ones(4, 4)}, f"  LoHa: {QKV}.hada_w1_a"),
        ({f"{QKV}.oft_diag": torch.ones(4, 4)}, f"  OFT: {QKV}.oft_diag"),
        ({f"{QKV}.lora_mid.weight": torch.ones(4, 4)}, f"  Tucker decomposition: {QKV}.lora_mid.weight"),
        ({f"{QKV}.diff_b": torch.ones(96)}, f"  bias, which FLUX.2 has nowhere: {QKV}.diff_b"),
        ({f"{QKV}.lora_B.bias": torch.ones(96)}, f"  bias, which FLUX.2 has nowhere: {QKV}.lora_B.bias"),
        ({f"{QKV}.set_weight": torch.ones(96, 32)}, f"  weight in place of another: {QKV}.set_weight"),
        ({"lora_te1_x.lora_up.weight": torch.ones(4, 4)}, "  LoRA of a text encoder: lora_te1_x.lora_up.weight"),
        ({f"{QKV}.lora_C.weight": torch.ones(4, 4)}, f"  not known: {QKV}.lora_C.weight"),
        ({f"{QKV}.weight": torch.ones(4, 4)}, f"  not known: {QKV}.weight"),
        ({"x.lora_A.weight": torch.ones(4, 4)}, "  not known: x.lora_A.weight"),
        ({f"{QKV}.lora_A.weight": torch.ones(0, 32)}, f"  of rank 0: {QKV}.lora_A.weight"),
        (
            {f"{QKV}.lora_A.weight": torch.ones(4, 31)},
            f"  other shape: {QKV}.lora_A.weight [4, 31] instead of [4, 32]",
        ),
        (
            {f"{QKV}.lora_A.weight": torch.ones(5, 32)},
            f"  other shape: {QKV}.lora_B.weight [96, 4] instead of [96, 5]",
        ),
        ({f"{QKV}.alpha": torch.ones(2)}, f"  other shape: {QKV}.alpha [2] instead of []"),
        ({f"{QKV}.lora_A.weight": torch.full((4, 32), torch.nan)}, f"  NaN or infinity: {QKV}.lora_A.weight"),
        ({f"{QKV}.alpha": torch.tensor(torch.inf)}, f"  NaN or infinity: {QKV}.alpha"),
        (
            {f"{QKV}.lora_A.weight": torch.ones(4, 32, dtype=torch.float8_e4m3fn)},
            f"  not BF16, F16, F32, F64: {QKV}.lora_A.weight F8_E4M3",
        ),
        (
            {f"{QKV}.diff": torch.ones(96, 32)},
            f"  not a down with an up, nor a diff: {QKV}.diff, {QKV}.lora_A.weight, {QKV}.lora_B.weight",
        ),
        (
            {"lora_unet_double_blocks_0_img_attn_proj.lora_down.weight": torch.ones(4, 32)},
            "  the same twice: ",
        ),
    ],
)
def test_one_wrong_key_among_sound_ones(tmp_path, changes, line):
    text = refusal(tmp_path, sound() | changes)
    assert "cannot be folded into small: " in text.splitlines()[0]
    [found] = [found for found in text.splitlines() if found.startswith(line)]
    if line.startswith("  the same twice"):
        assert f"{PROJ}.lora_A.weight" in found and "lora_unet_double_blocks_0_img_attn_proj" in found
    else:
        assert found == line
    assert len(text.splitlines()) == 2


def test_all_that_is_wrong_is_said_at_once(tmp_path):
    tensors = sound() | {
        f"{QKV}.dora_scale": torch.ones(96, 1),
        f"{PROJ}.lora_A.weight": torch.full((4, 32), torch.nan),
        **{f"x{index}.lora_A.weight": torch.ones(1, 1) for index in range(20)},
    }
    del tensors["diffusion_model.img_in.lora_B.weight"]
    lines = refusal(tmp_path, tensors).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "DoRA",
        "not known",
        "not a down with an up, nor a diff",
        "NaN or infinity",
    ]
    assert lines[2].endswith(" and 12 more") and "img_in.lora_A.weight" in lines[3]


def test_the_same_layer_in_two_formats_is_refused(tmp_path):
    """Whose sum would be twice what was meant; q, k and v beside the fused one are different layers."""
    layers = random_layers({"double_blocks.0.img_attn.proj": (32, 32)}, 0)
    twice = named(layers, kohya_keys) | named(layers, peft_keys("diffusion_model."))
    assert "the same twice" in refusal(tmp_path, twice)
    other_name = random_layers({"transformer_blocks.0.attn.to_out.0": (32, 32)}, 0)
    assert "the same twice" in refusal(tmp_path, twice | named(other_name, peft_keys("transformer.")))


def shapes_of(name: str) -> dict[str, tuple[int, int]]:
    """[N, K] of some linears of a published model, as wide as they are."""
    shapes = expected_tensors(published_spec(name), "transformer")
    chosen = ("double_blocks.3.img_attn.qkv.weight", "single_blocks.19.linear2.weight")
    return {weight.removesuffix(".weight"): shapes[weight] for weight in chosen}  # type: ignore[misc]


def test_a_lora_of_another_size_is_recognised(tmp_path):
    tensors = named(random_layers(shapes_of("klein-9b"), 0, rank=1), kohya_keys)
    text = refusal(tmp_path, tensors, published_spec("klein-4b"))
    assert "it looks like a LoRA of klein-9b or klein-base-9b; give it to that" in text
    assert "lora_down.weight [1, 4096] instead of [1, 3072]" in text


@pytest.mark.parametrize(
    ("modules", "model"),
    [
        ({"double_blocks.0.img_attn.qkv": (9216, 3072), "double_blocks.0.img_mod.lin": (18432, 3072)}, "FLUX.1"),
        ({"double_blocks.0.img_attn.qkv": (9216, 3072), "double_blocks.18.img_attn.qkv": (9216, 3072)}, "FLUX.1"),
        ({"single_transformer_blocks.0.proj_mlp": (12288, 3072)}, "FLUX.1"),
        ({"transformer_blocks.0.ff.net.0.proj": (12288, 3072)}, "FLUX.1"),
        ({"down_blocks.1.attentions.0.proj_in": (640, 640)}, "Stable Diffusion"),
        ({"input_blocks.4.1.proj_in": (640, 640)}, "Stable Diffusion"),
    ],
)
@pytest.mark.parametrize("keys", [kohya_keys, peft_keys("transformer.")], ids=["kohya", "peft"])
def test_loras_of_other_models_are_recognised(tmp_path, modules, model, keys):
    """klein-4b is as wide as FLUX.1, so that a part of such a file would fit."""
    text = refusal(tmp_path, named(random_layers(modules, 0, rank=1), keys), published_spec("klein-4b"))
    assert f"it looks like a LoRA of {model}, which has other layers; give one that was trained on klein-4b" in text


def test_modulations_of_flux2_are_none_of_flux1(tmp_path):
    tensors = sound() | {f"{QKV}.dora_scale": torch.ones(96, 1)}
    assert "FLUX.1" not in refusal(tmp_path, tensors)


def test_a_checkpoint_is_no_lora(tmp_path):
    text = refusal(
        tmp_path, {f"transformer.{name}.weight": torch.ones(shape) for name, shape in linears(MODEL).items()}
    )
    assert "not known: transformer." in text and " more" in text


@pytest.mark.parametrize("used", ["use_dora", "lora_bias"])
def test_what_peft_says_besides_alpha_is_not_ignored(tmp_path, used):
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 4, f"transformer.{used}": True})}
    assert f"says {used}, which is not folded" in refusal(tmp_path, sound(), metadata=metadata)


@pytest.mark.parametrize(
    "config",
    ["{", "{}", "[]", '{"lora_alpha": NaN}', '{"lora_alpha": 1, "alpha_pattern": {"(": 1}}', '{"lora_alpha": []}'],
)
def test_what_peft_cannot_have_written_is_refused(tmp_path, config):
    assert "cannot be read" in refusal(tmp_path, sound(), metadata={"lora_adapter_metadata": config})


def test_files_that_are_none(tmp_path):
    for content, message in ((None, "is missing"), (b"", "is empty"), (b"PK\x03\x04" * 20, r"is not a \.safetensors")):
        path = tmp_path / "lora.safetensors"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(CheckpointError, match=rf"the LoRA .*{message}"):
            Lora.open(LoraRequest(path), SPEC)


def test_identity_is_of_all_that_counts(tmp_path):
    """peft's configuration has alpha in it, which other bytes of the tensors would not show."""
    path = write(tmp_path / "adapter_model.safetensors", sound())
    first = lora_identity(LoraRequest(tmp_path, 0.5))
    assert first["file"] == "adapter_model.safetensors" and first["strength"] == 0.5
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 8}')
    second = lora_identity(LoraRequest(path, 0.5))
    assert first["sha256"] == second["sha256"] and first != second
