"""Quantized checkpoints, written by torch, diffusers and comfy-kitchen, are read as those libraries read them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.quantizers.bfl import utils as diffusers_bfl
from safetensors.torch import save_file

from flux2_trt.checkpoint import Checkpoint
from flux2_trt.errors import CheckpointError
from flux2_trt.quantized import e2m1_values, e4m3_values

Tensors = dict[str, torch.Tensor]

LINEAR = "single_blocks.0.linear2"  # [N, K] = [160, 96]: no multiples of 128 and 64, so blocks of scales are padded
WEIGHT = torch.randn(160, 96, generator=torch.Generator().manual_seed(0)) * torch.logspace(-2, 1, 160)[:, None]


def opened(folder: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Checkpoint:
    path = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    return Checkpoint(path, "transformer")


def fp8(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)


def bfl_header(format_name: str, *linears: str) -> dict[str, str]:
    layers = {name: {"format": format_name} for name in linears or (LINEAR,)}
    return {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}


def test_every_code_has_torchs_value() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(e4m3_values(), codes.view(torch.float8_e4m3fn).float().numpy())
    np.testing.assert_array_equal(e2m1_values(), diffusers_bfl.E2M1_LUT.numpy())


@pytest.mark.parametrize("names", [("weight_scale", "input_scale"), ("scale_weight", "scale_input")])
@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_fp8_with_one_scale(tmp_path: Path, names: tuple[str, str], shape: tuple[int, ...], prefix: str) -> None:
    scale = WEIGHT.abs().max() / 448
    stored = {
        f"{prefix}{LINEAR}.weight": fp8(WEIGHT, scale),
        f"{prefix}{LINEAR}.{names[0]}": scale.reshape(shape),
        f"{prefix}{LINEAR}.{names[1]}": torch.full(shape, 0.03),
        f"{prefix}img_in.weight": torch.ones(4, 2).bfloat16(),
        f"{prefix}scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn),
    }
    checkpoint = opened(tmp_path, stored)
    assert set(checkpoint.names()) == {f"{LINEAR}.weight", "img_in.weight"}
    expected = stored[f"{prefix}{LINEAR}.weight"].float() * scale
    assert checkpoint.largest(f"{LINEAR}.weight") == expected.abs().max()
    np.testing.assert_array_equal(checkpoint.read(f"{LINEAR}.weight"), expected.numpy())
    assert checkpoint.weight_scale(f"{LINEAR}.weight") == float(scale)
    assert checkpoint.input_scale(f"{LINEAR}.weight") == pytest.approx(0.03)
    assert checkpoint.input_scale("img_in.weight") is None


def test_fp8_by_rows(tmp_path: Path) -> None:
    codes, scale = diffusers_bfl.quantize_fp8r(WEIGHT)
    for shape in ((160,), (160, 1)):
        stored = {f"{LINEAR}.weight": codes, f"{LINEAR}.weight_scale": scale.reshape(shape)}
        checkpoint = opened(tmp_path, stored, {"quantization": "fp8r"})
        values = checkpoint.read(f"{LINEAR}.weight")
        np.testing.assert_array_equal(values, diffusers_bfl.dequantize_fp8r(codes, scale).numpy())
        assert checkpoint.weight_scale(f"{LINEAR}.weight") is None


def test_nvfp4_of_diffusers(tmp_path: Path) -> None:
    codes, scale, outer = diffusers_bfl.quantize_nvfp4(WEIGHT)
    stored = {
        f"{LINEAR}.weight": codes,
        f"{LINEAR}.weight_scale": scale,
        f"{LINEAR}.weight_scale_2": outer,
        f"{LINEAR}.input_scale": torch.tensor(0.01),
    }
    checkpoint = opened(tmp_path, stored, {"quantization": "nvfp4"})
    assert checkpoint.shape(f"{LINEAR}.weight") == (160, 96)
    values = checkpoint.read(f"{LINEAR}.weight")
    np.testing.assert_array_equal(values, diffusers_bfl.dequantize_nvfp4(codes, scale, outer).numpy())
    assert np.abs(values - WEIGHT.numpy()).mean() < 0.15 * WEIGHT.abs().mean()
    assert checkpoint.input_scale(f"{LINEAR}.weight") is None  # it is NVFP4's, over 448 * 6


@pytest.mark.parametrize("marked", ["header", "linear"])
def test_nvfp4_of_bfl(tmp_path: Path, marked: str) -> None:
    kitchen = pytest.importorskip("comfy_kitchen")
    outer = WEIGHT.abs().max() / (448 * 6)
    codes, scale = kitchen.quantize_nvfp4(WEIGHT, outer)
    stored = {
        f"{LINEAR}.weight": codes,
        f"{LINEAR}.weight_scale": scale,
        f"{LINEAR}.weight_scale_2": outer,
    }
    if marked == "linear":
        text = json.dumps({"format": "nvfp4"}).encode()
        stored[f"{LINEAR}.comfy_quant"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    checkpoint = opened(tmp_path, stored, bfl_header("nvfp4") if marked == "header" else None)
    expected = kitchen.dequantize_nvfp4(codes, outer, scale, torch.float32)
    values = checkpoint.read(f"{LINEAR}.weight")
    np.testing.assert_array_equal(values, expected.numpy())
    assert np.abs(values - WEIGHT.numpy()).mean() < 0.15 * WEIGHT.abs().mean()


@pytest.mark.parametrize("same", [True, False])
def test_fused_projections_of_quantized_parts(tmp_path: Path, same: bool) -> None:
    scales = [torch.tensor(value) for value in ((0.5, 0.5, 0.5) if same else (0.5, 0.25, 0.125))]
    parts = [fp8(WEIGHT, scale) for scale in scales]
    stored: Tensors = {}
    for x, part, scale, amax in zip("qkv", parts, scales, (1.0, 3.0, 2.0), strict=True):
        stored[f"transformer_blocks.0.attn.to_{x}.weight"] = part
        stored[f"transformer_blocks.0.attn.to_{x}.weight_scale"] = scale
        stored[f"transformer_blocks.0.attn.to_{x}.input_scale"] = torch.tensor(amax)
    checkpoint = opened(tmp_path, stored)
    name = "double_blocks.0.img_attn.qkv.weight"
    expected = torch.cat([part.float() * scale for part, scale in zip(parts, scales, strict=True)])
    np.testing.assert_array_equal(checkpoint.read(name), expected.numpy())
    assert checkpoint.weight_scale(name) == (0.5 if same else None)
    assert checkpoint.input_scale(name) == 3.0


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("layout", ["fp8", "fp8 by rows", "nvfp4"])
def test_rows_are_those_of_the_whole(tmp_path: Path, layout: str, parts: int) -> None:
    quantize = {
        "fp8": lambda: (fp8(WEIGHT, torch.tensor(0.1)), torch.tensor(0.1)),
        "fp8 by rows": lambda: diffusers_bfl.quantize_fp8r(WEIGHT),
        "nvfp4": lambda: diffusers_bfl.quantize_nvfp4(WEIGHT),
    }[layout]
    owners = [f"transformer_blocks.0.attn.to_{x}" for x in "qkv"] if parts == 3 else ["norm_out.linear"]
    names = ("weight", "weight_scale", "weight_scale_2")
    stored = {
        f"{owner}.{name}": part.clone() for owner in owners for name, part in zip(names, quantize(), strict=False)
    }
    checkpoint = opened(tmp_path, stored, DIFFUSERS if layout == "nvfp4" else None)
    (name,) = checkpoint.names()
    whole = checkpoint.read(name)
    for first, last in ((0, 7), (70, 90), (150, 330), (len(whole) - 1, None)):
        np.testing.assert_array_equal(checkpoint.read(name, first, last), whole[first:last])


def test_swapped_halves_of_a_quantized_weight(tmp_path: Path) -> None:
    codes, scale = diffusers_bfl.quantize_fp8r(WEIGHT)
    checkpoint = opened(tmp_path, {"norm_out.linear.weight": codes, "norm_out.linear.weight_scale": scale})
    first, second = diffusers_bfl.dequantize_fp8r(codes, scale).chunk(2)
    values = checkpoint.read("final_layer.adaLN_modulation.1.weight")
    np.testing.assert_array_equal(values, torch.cat((second, first)).numpy())


def with_nvfp4(**changes: Any) -> Tensors:
    codes, scale, outer = diffusers_bfl.quantize_nvfp4(WEIGHT)
    parts = {"weight": codes, "weight_scale": scale, "weight_scale_2": outer} | changes
    return {f"{LINEAR}.{name}": tensor for name, tensor in parts.items() if tensor is not None}


def with_fp8(**changes: Any) -> Tensors:
    parts = {"weight": fp8(WEIGHT, torch.tensor(0.1)), "weight_scale": torch.tensor(0.1)} | changes
    return {f"{LINEAR}.{name}": tensor for name, tensor in parts.items() if tensor is not None}


DIFFUSERS = {"quantization": "nvfp4"}
BAD: dict[str, tuple[Callable[[], Tensors], dict[str, str] | None, str]] = {
    "nvfp4 without a header": (with_nvfp4, None, "NVFP4 in one of two layouts, and the header names neither"),
    "nvfp4 with both headers": (with_nvfp4, DIFFUSERS | bfl_header("nvfp4"), "the header names both of them"),
    "plain scales where blocked ones should be": (with_nvfp4, bfl_header("nvfp4"), "is no layout that is read"),
    "no outer scale": (lambda: with_nvfp4(weight_scale_2=None), DIFFUSERS, "is no layout that is read"),
    "bf16 called nvfp4": (
        lambda: {f"{LINEAR}.weight": WEIGHT.bfloat16()},
        bfl_header("nvfp4"),
        "calls .* nvfp4, but it is BF16 without scales",
    ),
    "bf16 with a scale": (lambda: with_fp8(weight=WEIGHT.bfloat16()), None, "BF16 .* is no layout that is read"),
    "fp8 called nvfp4": (with_fp8, bfl_header("nvfp4"), "F8_E4M3 .* its header says nvfp4"),
    "another format": (with_fp8, bfl_header("int8_tensorwise"), "quantized as int8_tensorwise; float8_e4m3fn and"),
    "a damaged header": (with_fp8, {"_quantization_metadata": "{"}, "of its quantization cannot be read"),
    "too few scales": (lambda: with_fp8(weight_scale=torch.ones(7)), None, r"a scale F32 \[7\], which is no layout"),
    "two names": (lambda: with_fp8(scale_weight=torch.tensor(0.2)), None, "both weight_scale and scale_weight"),
    "an infinite input scale": (
        lambda: with_fp8(input_scale=torch.tensor(float("inf"))),
        None,
        "input scale is inf, not a positive number",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_unknown_and_contradictory_layouts_are_refused(tmp_path: Path, case: str) -> None:
    tensors, metadata, message = BAD[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        opened(tmp_path, tensors(), metadata)
    assert "\n" not in str(caught.value)


def test_parts_in_different_formats_make_nothing(tmp_path: Path) -> None:
    stored = {f"transformer_blocks.0.attn.to_{x}.weight": WEIGHT.clone() for x in "qk"}
    stored["transformer_blocks.0.attn.to_v.weight"] = fp8(WEIGHT, torch.tensor(0.1))
    stored["transformer_blocks.0.attn.to_v.weight_scale"] = torch.tensor(0.1)
    with pytest.raises(CheckpointError, match=r"differ in how they are stored, so that they make no double_blocks"):
        opened(tmp_path, stored)
