"""Rounding: fp32 values to the codes of a format and the scales of their blocks.

FP8 weights are rounded to nearest even at the scale amax / 448, one a tensor (OCP 8-bit floating point, E4M3). NVFP4
weights have an fp32 scale amax / (448 * 6) and for 16 values along K an E4M3 scale, their largest / 6 in units of the
former; even columns are in the low bits of a byte, as ONNX and PyTorch pack them.
"""

from __future__ import annotations

import numpy as np
import torch

from export.quantize import FP8_MAX, INT4_BLOCK, INT4_MAX, NVFP4_MAX
from flux2_trt.quantized import E2M1, NVFP4_BLOCK

# Half way between neighbours; a tie goes to the even code, so the boundaries above odd ones lie just below it.
E2M1_BOUNDARIES = torch.from_numpy((E2M1[1:] + E2M1[:-1]) / 2)
E2M1_BOUNDARIES[1::2] = torch.nextafter(E2M1_BOUNDARIES[1::2], torch.zeros(3))
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)  # its reciprocal is finite


def fp8_scale(largest: float) -> float:
    """amax / 448; fp32's smallest normal number where that is less, as for a tensor of zeros."""
    return max(largest / FP8_MAX, SMALLEST_SCALE)


def fp8_codes(values: torch.Tensor, scale: float) -> torch.Tensor:
    """float8_e4m3fn [N, K] of `values` fp32 [N, K], which are overwritten."""
    # A quotient may round up past 448, which FP8 turns into NaN.
    return values.div_(scale).clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)


def nvfp4_codes(values: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 [N, K/2], two in a byte, and block scales float8_e4m3fn [N, K/16] of `values` fp32 [N, K]."""
    blocks = values.unflatten(1, (-1, NVFP4_BLOCK))
    block_scales = (blocks.abs().amax(dim=-1) / NVFP4_MAX / scale).clamp_(max=FP8_MAX).to(torch.float8_e4m3fn)
    steps = block_scales.float().mul_(scale)[..., None]
    quotients = torch.where(steps > 0, blocks / steps, 0.0).flatten(1)
    codes = torch.bucketize(quotients.abs(), E2M1_BOUNDARIES, out_int32=True).to(torch.uint8)
    codes |= (quotients < 0).to(torch.uint8) << 3
    return codes[:, 0::2] | (codes[:, 1::2] << 4), block_scales


def int4_codes(values: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `values` fp32 [N, K] codes uint8 [K, N/2], two in a byte, and block scales [K/64, N] in `dtype`."""
    blocks = values.unflatten(1, (-1, INT4_BLOCK))
    scales = (blocks.abs().amax(dim=-1) / INT4_MAX).to(dtype)
    steps = scales.float()[..., None]
    codes = torch.where(steps > 0, blocks / steps, 0.0).round_().clamp_(-INT4_MAX - 1, INT4_MAX).flatten(1)
    codes = (codes.to(torch.int8) & 15).to(torch.uint8).T
    return codes[:, 0::2] | (codes[:, 1::2] << 4), scales.T
