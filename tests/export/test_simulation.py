"""NVFP4 in ONNX Runtime, against ml_dtypes, comfy-kitchen and onnx's reference evaluator."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from export.conversion import Scales
from export.graph import Graph, WeightSlot
from export.quantize import FP8_MAX, NVFP4_MAX, TENSORRT_DOMAIN, quantize
from export.recipes import Recipe
from export.simulation import DYNAMIC_QUANTIZE, simulate_nvfp4
from export.tensor_source import RandomSource
from export.trace import OPSET
from export.weights import place_external, write_weights
from flux2_trt.quantized import NVFP4_BLOCK, e2m1_values, unblocked
from flux2_trt.runtime.onnxruntime import OnnxRuntimeEngine

Shapes = dict[str, tuple[int | str, ...]]

NVFP4 = Recipe("nvfp4 in fp32", "fp32", linears="nvfp4")
LINEAR = "double_blocks.0.img_mlp.2.weight"
TIES = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 0.0, -0.0, 1.0, 0.3, 2.0, 3.0, 4.0, 6.0])
LARGEST_INPUT = 5.0
RNG = np.random.default_rng(0)
INPUTS = {
    "random": RNG.standard_normal((32, 128)) * 300,
    "ties": np.outer(2.0 ** np.arange(-4, 4), np.r_[TIES, -TIES]),
    "an outlier": np.r_[RNG.standard_normal(2047), 2000.0].reshape(16, 128),
    "out of range": RNG.standard_normal((16, 128)) * 1e5,  # block scales saturate, and so do codes
    "block scales that are subnormal or 0": np.outer(2.0 ** -np.arange(0, 16), RNG.standard_normal(64)),
    "denormals": RNG.standard_normal((16, 64)) * 1e-41,
    "zeros": np.zeros((16, 64)),
}


class TRT_FP4DynamicQuantize(OpRun):
    """TensorRT's operator for onnx's reference evaluator, which finds it by its name; rounded by ml_dtypes."""

    op_domain = TENSORRT_DOMAIN

    def _run(self, x: NDArray, scale: NDArray, axis: int, block_size: int, scale_type: int) -> tuple[NDArray, NDArray]:
        assert (axis, block_size, scale_type) == (-1, NVFP4_BLOCK, TensorProto.FLOAT8E4M3FN)
        return dynamic_quantize(x, scale)


def dynamic_quantize(x: NDArray, scale: NDArray) -> tuple[NDArray, NDArray]:
    blocks = x.reshape(*x.shape[:-1], -1, NVFP4_BLOCK)
    wanted = np.abs(blocks).max(axis=-1) / np.float32(NVFP4_MAX) / scale
    scales = np.minimum(wanted, np.float32(FP8_MAX)).astype(ml_dtypes.float8_e4m3fn)
    steps = (scales.astype(np.float32) * scale)[..., None]
    quotients = np.divide(blocks, steps, out=np.zeros_like(blocks), where=steps > 0)
    return quotients.reshape(x.shape).astype(ml_dtypes.float4_e2m1fn), scales


def model_of(nodes: list[onnx.NodeProto], inputs: Shapes, outputs: Shapes) -> onnx.ModelProto:
    values = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in side.items()]
        for side in (inputs, outputs)
    )
    return helper.make_model(
        helper.make_graph(nodes, "test", *values), opset_imports=[helper.make_opsetid("", OPSET)], ir_version=11
    )


def simulated_quantize(x: NDArray, scale: NDArray, folder: Path) -> tuple[NDArray, NDArray]:
    """The values of the codes and of the block scales, by ONNX Runtime."""
    quantize = helper.make_node("TRT_FP4DynamicQuantize", ["x", "scale"], ["codes", "scales"], domain=TENSORRT_DOMAIN)
    widen = [helper.make_node("Cast", [name], [f"{name}_f32"], to=TensorProto.FLOAT) for name in quantize.output]
    rows, columns = x.shape
    outputs = {"codes_f32": (rows, columns), "scales_f32": (rows, columns // NVFP4_BLOCK)}
    model = model_of([quantize, *widen], {"x": (rows, columns), "scale": ()}, outputs)
    model.opset_import.append(helper.make_opsetid(TENSORRT_DOMAIN, 1))
    model.functions.append(onnx.parser.parse_function(DYNAMIC_QUANTIZE))
    onnx.checker.check_model(model, full_check=True)
    plan = folder / "plan.onnx"
    plan.write_bytes(model.SerializeToString())
    ours = OnnxRuntimeEngine(plan, plan).run({"x": x, "scale": scale})
    return ours["codes_f32"], ours["scales_f32"]


@pytest.mark.parametrize("scale", [1.0, 0.37])
@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_are_rounded_as_ml_dtypes_and_comfy_kitchen_round(kind: str, scale: float, tmp_path: Path) -> None:
    x, outer = INPUTS[kind].astype(np.float32), np.array(scale, np.float32)
    codes, scales = simulated_quantize(x, outer, tmp_path)

    expected_codes, expected_scales = dynamic_quantize(x, outer)
    np.testing.assert_array_equal(codes, expected_codes.astype(np.float32))
    np.testing.assert_array_equal(scales, expected_scales.astype(np.float32))

    kitchen = pytest.importorskip("comfy_kitchen")
    packed, blocked_scales = kitchen.quantize_nvfp4(torch.from_numpy(x), torch.tensor(scale))
    values = e2m1_values()[np.stack((packed >> 4, packed & 15), axis=-1)].reshape(x.shape)
    np.testing.assert_array_equal(codes, values)
    np.testing.assert_array_equal(scales, unblocked(blocked_scales.float().numpy())[: len(x), : scales.shape[1]])


def test_a_linear_computes_what_the_graph_for_tensorrt_says(tmp_path: Path) -> None:
    """That graph is run by onnx's reference evaluator, from the same weight file."""
    rows, columns = 96, 128
    plain = model_of(
        [helper.make_node("MatMul", ["x", LINEAR], ["y"])],
        {"x": ("pictures", "tokens", columns), LINEAR: (columns, rows)},
        {"y": ("pictures", "tokens", rows)},
    )
    slots = {LINEAR: WeightSlot((columns, rows), "float", transposed=True)}
    graph = quantize(Graph("transformer", plain, slots), NVFP4)
    source, path = RandomSource(0, {LINEAR: (rows, columns)}), tmp_path / "weights.safetensors"
    spans = write_weights(graph, source, path, Scales({LINEAR: LARGEST_INPUT / FP8_MAX}))
    placed = place_external(graph, spans, path.name)
    x = RNG.standard_normal((2, 7, columns), dtype=np.float32) * 2  # some are larger than was calibrated

    plan = tmp_path / "plan.onnx"
    plan.write_bytes(simulate_nvfp4(placed).SerializeToString())
    ours = OnnxRuntimeEngine(plan, path).run({"x": x})["y"]
    plan.write_bytes(placed.SerializeToString())
    theirs = ReferenceEvaluator(onnx.load(plan), new_ops=[TRT_FP4DynamicQuantize]).run(None, {"x": x})[0]
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-4)  # sums of 128 products in another order
    exact = x @ source.read(LINEAR).T
    error = np.linalg.norm(ours - exact) / np.linalg.norm(exact)
    assert 0.05 < error < 0.2  # two roundings of 2 significant bits


def test_a_graph_without_fp4_stays_as_it_is() -> None:
    model = model_of([helper.make_node("Neg", ["x"], ["y"])], {"x": (1,)}, {"y": (1,)})
    assert simulate_nvfp4(model) == model
