"""Weight files, read back with safetensors' own reader."""

from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch
from diffusers.quantizers.bfl import utils as diffusers_bfl
from onnx import TensorProto, helper
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch_file

from export.conversion import Scales
from export.graph import Graph, ScaleSlot, WeightSlot
from export.quantize import FP8_DTYPE, INT4_DTYPE, NVFP4_DTYPE, block_scale_name
from export.rounding import nvfp4_codes
from export.tensor_source import RandomSource, WeightFile
from export.weights import place_external, write_weights
from flux2_trt.errors import BundleError, CheckpointError
from flux2_trt.inventory import expected_tensors
from flux2_trt.models import published_spec
from flux2_trt.quantized import e2m1_values
from flux2_trt.runtime.onnxruntime import OnnxRuntimeEngine
from flux2_trt.tensor_file import TensorFile


@dataclass
class Source:
    """Tensors in memory."""

    tensors: dict[str, np.ndarray]

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].shape

    def read(self, name: str, first: int = 0, last: int | None = None) -> np.ndarray:
        return self.tensors[name][first:last].copy()

    def largest(self, name: str) -> float:
        return float(np.abs(self.tensors[name]).max())


WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3)  # [N, K] as a checkpoint stores it
BIAS = np.array([10.0, 20.0], np.float32)


@pytest.fixture
def graph() -> Graph:
    """x @ weight + bias with both as inputs, the weight as [K, N]."""
    values = {"x": [1, 3], "weight": [3, 2], "bias": [2]}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in values.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 2])
    nodes = [helper.make_node("MatMul", ["x", "weight"], ["p"]), helper.make_node("Add", ["p", "bias"], ["y"])]
    model = helper.make_model(
        helper.make_graph(nodes, "linear", inputs, [output]), opset_imports=[helper.make_opsetid("", 23)], ir_version=11
    )
    slots = {
        "weight": WeightSlot((3, 2), "float", transposed=True),
        "bias": WeightSlot((2,), "float", transposed=False),
    }
    return Graph("conditioning", model, slots)


def test_the_file_holds_the_layout_that_the_graph_takes(graph, tmp_path):
    path = tmp_path / "weights.safetensors"
    spans = write_weights(graph, Source({"weight": WEIGHT, "bias": BIAS}), path)
    stored = load_file(path)
    np.testing.assert_array_equal(stored["weight"], WEIGHT.T)
    np.testing.assert_array_equal(stored["bias"], BIAS)
    offset, length = spans["bias"]
    np.testing.assert_array_equal(np.frombuffer(path.read_bytes()[offset : offset + length], np.float32), BIAS)


def test_the_file_gives_back_what_the_checkpoint_had(graph, tmp_path):
    """Square weights too, whose shape does not tell that they are transposed, and some rows of one."""
    given = {"weight": np.arange(64 * 64, dtype=np.float32).reshape(64, 64), "bias": BIAS}
    slots = {**graph.weights, "weight": WeightSlot((64, 64), "bfloat16", transposed=True)}
    path = tmp_path / "weights.safetensors"
    write_weights(replace(graph, weights=slots), Source(given), path)
    file = WeightFile(path)
    expected = given["weight"].astype(ml_dtypes.bfloat16).astype(np.float32)
    for rows in ((0, None), (3, 40)):
        np.testing.assert_array_equal(file.read("weight", *rows), expected[slice(*rows)])
    np.testing.assert_array_equal(file.read("bias"), BIAS)
    write_weights(graph, Source({"weight": WEIGHT, "bias": BIAS}), path)
    assert WeightFile(path).shape("weight") == WEIGHT.shape


def test_a_file_that_does_not_say_how_its_weights_lie_is_refused(tmp_path):
    save_file({"weight": WEIGHT}, tmp_path / "w.safetensors")
    with pytest.raises(BundleError, match="written by an earlier version"):
        WeightFile(tmp_path / "w.safetensors")


def test_a_graph_with_external_weights_computes_from_the_file(graph, tmp_path):
    path = tmp_path / "weights.safetensors"
    spans = write_weights(graph, Source({"weight": WEIGHT, "bias": BIAS}), path)
    model = place_external(graph, spans, path.name)
    assert [value.name for value in model.graph.input] == ["x"]
    plan = tmp_path / "plan.onnx"
    plan.write_bytes(model.SerializeToString())
    x = np.array([[1.0, 2.0, 3.0]], np.float32)
    np.testing.assert_array_equal(OnnxRuntimeEngine(plan, path).run({"x": x})["y"], x @ WEIGHT.T + BIAS)
    assert len(graph.model.graph.input) == 3, "the traced graph itself stays as it was"
    onnx.checker.check_model(graph.model, full_check=True)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_by_name(graph, tmp_path, bad):
    broken = WEIGHT.copy()
    broken[1, 2] = bad
    with pytest.raises(CheckpointError, match="weight holds NaN or infinity"):
        write_weights(graph, Source({"weight": broken, "bias": BIAS}), tmp_path / "w.safetensors")


def test_another_shape_is_refused_by_name(graph, tmp_path):
    with pytest.raises(CheckpointError, match=r"bias has shape \[3\]; the graph takes \[2\]"):
        write_weights(graph, Source({"weight": WEIGHT, "bias": np.zeros(3, np.float32)}), tmp_path / "w.safetensors")


def test_random_weights_depend_on_seed_and_name_alone():
    shapes = expected_tensors(published_spec("tiny"), "transformer")
    names = ["double_blocks.0.img_attn.qkv.weight", "double_blocks.1.img_attn.qkv.weight"]
    first, again, other = RandomSource(0, shapes), RandomSource(0, shapes), RandomSource(1, shapes)
    again.read(names[1])
    np.testing.assert_array_equal(first.read(names[0]), again.read(names[0]))
    assert not np.array_equal(first.read(names[0]), first.read(names[1]))
    assert not np.array_equal(first.read(names[0]), other.read(names[0]))
    np.testing.assert_array_equal(first.read(names[0], 70, 200), first.read(names[0])[70:200])
    # a linear of K inputs keeps the size of its activations: deviation 1/sqrt(K), of 110,592 samples
    hidden_size = published_spec("tiny").transformer.hidden_size
    assert first.read(names[0]).std() == pytest.approx(hidden_size**-0.5, rel=0.01)


ROWS = {
    "random": np.random.default_rng(0).standard_normal(4096),
    "outlier": np.r_[np.random.default_rng(1).standard_normal(4095), 3e4],
    "tiny values": np.random.default_rng(2).standard_normal(4096) * 1e-30,
    "denormals": np.random.default_rng(3).standard_normal(4096) * 1e-41,
    "zeros": np.zeros(4096),
    "one sign": -np.ones(4096),
}


def linear(graph: Graph, dtype: str) -> Graph:
    """The linear above with 64 x 64 weights in a format, without its bias."""
    scales = {"a.quantize": ScaleSlot("quantize", ("weight",)), "a.dequantize": ScaleSlot("dequantize", ("weight",))}
    block = {
        NVFP4_DTYPE: ScaleSlot("block", ("weight",), (64, 4), FP8_DTYPE),
        INT4_DTYPE: ScaleSlot("block", ("weight",), (1, 64), "bfloat16"),
    }
    scales = scales if dtype in (FP8_DTYPE, NVFP4_DTYPE) else {}
    scales |= {block_scale_name("weight"): block[dtype]} if dtype in block else {}
    slot = WeightSlot((64, 64), dtype, transposed=dtype != NVFP4_DTYPE)
    return replace(graph, weights={"weight": slot}, scales=scales)


@pytest.fixture
def fp8_graph(graph: Graph) -> Graph:
    """The linear above with 64 x 64 weights in FP8."""
    slots = {
        "weight": WeightSlot((64, 64), FP8_DTYPE, transposed=True),
        "bias": WeightSlot((2,), "bfloat16", transposed=False),
    }
    scales = {"a.quantize": ScaleSlot("quantize", ("weight",)), "a.dequantize": ScaleSlot("dequantize", ("weight",))}
    return replace(graph, weights=slots, scales=scales)


@pytest.mark.parametrize("kind", ROWS)
def test_fp8_weights_come_back_within_the_formats_bound(fp8_graph, tmp_path, kind):
    """Read by safetensors and torch: half a step of 3 mantissa bits, or of the smallest subnormal."""
    weight = ROWS[kind].astype(np.float32).reshape(64, 64)
    path = tmp_path / "weights.safetensors"
    write_weights(fp8_graph, Source({"weight": weight, "bias": BIAS}), path, Scales({"weight": 0.125}))
    stored = load_torch_file(path)
    assert stored["weight"].dtype == torch.float8_e4m3fn and stored["bias"].dtype == torch.bfloat16
    assert stored["a.quantize"].tolist() == [8.0]
    scale = float(stored["a.dequantize"].double()) / 0.125
    values = stored["weight"].double().T.numpy() * scale
    assert np.isfinite(values).all()
    bound = np.maximum(np.abs(weight) * 2.0**-4, scale * 2.0**-10) * (1 + 1e-5)
    assert (np.abs(values - weight) <= bound).all()
    if kind not in ("zeros", "denormals"):
        assert float(stored["weight"].float().abs().max()) == 448.0


def test_codes_of_a_checkpoint_stay_as_they_are(fp8_graph, tmp_path):
    """Its scale need not be amax / 448; rounding twice would change codes."""
    codes = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).mul(90).to(torch.float8_e4m3fn)
    scale = 0.0123
    source = Source({"weight": (codes.float() * scale).numpy(), "bias": BIAS})
    path = tmp_path / "weights.safetensors"
    write_weights(fp8_graph, source, path, Scales({"weight": 1.0}, {"weight": scale}))
    stored = load_torch_file(path)
    assert torch.equal(stored["weight"].T.view(torch.uint8), codes.view(torch.uint8))
    assert stored["a.dequantize"].tolist() == [pytest.approx(scale)]
    write_weights(fp8_graph, source, path, Scales({"weight": 1.0}))
    assert not torch.equal(load_torch_file(path)["weight"].T.view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.parametrize("dtype", ["bfloat16", FP8_DTYPE, NVFP4_DTYPE, INT4_DTYPE])
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_every_format_refuses_what_is_no_number_by_name(graph, tmp_path, dtype, wrong):
    weight = np.ones((64, 64), np.float32)
    weight[3, 5] = wrong
    with pytest.raises(CheckpointError, match="weight holds NaN or infinity"):
        write_weights(linear(graph, dtype), Source({"weight": weight}), tmp_path / "w", Scales({"weight": 1.0}))


def test_a_linear_without_an_input_scale_is_named(fp8_graph, tmp_path):
    with pytest.raises(CheckpointError, match="weight has no input scale; calibrate the model, or build it in bf16"):
        write_weights(fp8_graph, Source({"weight": np.ones((64, 64), np.float32), "bias": BIAS}), tmp_path / "w")


@pytest.mark.parametrize("kind", ROWS)
def test_nvfp4_weights_are_those_of_diffusers(graph, tmp_path, kind):
    weight = torch.from_numpy(ROWS[kind].astype(np.float32).reshape(64, 64))
    slots = {"a.weight": WeightSlot((64, 64), NVFP4_DTYPE, transposed=False)}
    scales = {
        "a.quantize": ScaleSlot("quantize", ("a.weight",)),
        "a.dequantize": ScaleSlot("dequantize", ("a.weight",)),
        "a.weight_block_scale": ScaleSlot("block", ("a.weight",), (64, 4), FP8_DTYPE),
    }
    path = tmp_path / "weights.safetensors"
    nvfp4 = replace(graph, weights=slots, scales=scales)
    spans = write_weights(nvfp4, Source({"a.weight": weight.numpy()}), path, Scales({"a.weight": 0.75}))
    offset, length = spans["a.weight"]
    codes = np.frombuffer(path.read_bytes()[offset : offset + length], np.uint8).reshape(64, 32)
    stored = TensorFile(path).tensors  # the torch of safetensors' own reader may be too old for F4
    assert (stored["a.weight"].dtype, stored["a.weight"].shape) == ("F4", (64, 64))
    assert stored["a.quantize"].float32().tolist() == [8.0]  # NVFP4's input scale is that of FP8 over 6
    outer = float(stored["a.dequantize"].float32()[0]) * 8
    block_scales = torch.from_numpy(stored["a.weight_block_scale"].bytes().copy()).view(torch.float8_e4m3fn)
    if kind in ("zeros", "denormals"):  # diffusers divides by 0
        assert torch.isfinite(block_scales.float()).all()
        return
    expected = diffusers_bfl.quantize_nvfp4(weight)
    np.testing.assert_array_equal(codes, expected[0].numpy())
    assert torch.equal(block_scales.reshape(64, 4).view(torch.uint8), expected[1].view(torch.uint8))
    assert outer == pytest.approx(float(expected[2]), rel=1e-6)


def values_of(path: Path, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """The weight [64, 64] as a kernel would see it, and a bound of its error, both in double precision."""
    stored = TensorFile(path).tensors
    codes = stored["weight"].bytes()
    if kind == "bfloat16":
        values = stored["weight"].float32().astype(np.float64).T
        return values, np.abs(values) * 2.0**-8 + 2.0**-134  # half a step of 7 bits of mantissa, or of a denormal
    nibbles = np.stack((codes & 15, codes >> 4), axis=-1)
    scales = torch.from_numpy(stored["weight_block_scale"].bytes().copy())
    if kind == INT4_DTYPE:
        steps = scales.view(torch.bfloat16).double().reshape(1, 64).numpy()
        values = ((nibbles.astype(np.int64) ^ 8) - 8).reshape(64, 64) * steps
        # Half a step, and 7 times what the scale lost in bf16: a step that is 2^-9 too small, or all of a tiny one.
        return values.T, np.broadcast_to(np.maximum(steps * (0.5 + 7 * 2.0**-8), 7 * 2.0**-134), (64, 64)).T
    outer = float(stored["a.dequantize"].float32()[0]) / (0.125 / 6)
    steps = scales.view(torch.float8_e4m3fn).double().reshape(64, 4, 1).numpy()
    values = e2m1_values()[nibbles].reshape(64, 4, 16) * steps
    # Half the gap from 4 to 6, or 6 times what a denormal scale of the block lost in E4M3.
    bound = np.broadcast_to(np.maximum(steps, 6 * 2.0**-10), (64, 4, 16)) * (1 + 1e-4)
    return values.reshape(64, 64) * outer, bound.reshape(64, 64) * outer


@pytest.mark.parametrize("dtype", ["bfloat16", INT4_DTYPE, NVFP4_DTYPE])
@pytest.mark.parametrize("kind", ROWS)
def test_weights_come_back_within_the_bound_of_every_format(graph, tmp_path, kind, dtype):
    weight = ROWS[kind].astype(np.float32).reshape(64, 64)
    path = tmp_path / "weights.safetensors"
    write_weights(linear(graph, dtype), Source({"weight": weight}), path, Scales({"weight": 0.125}))
    values, bound = values_of(path, dtype)
    assert np.isfinite(values).all()
    assert (np.abs(values - weight) <= bound).all()
    if kind in ("random", "outlier", "one sign"):
        assert np.abs(values).max() == pytest.approx(np.abs(weight).max(), rel=2.0**-4)


def test_ties_of_nvfp4_go_to_the_even_code():
    """As ml_dtypes rounds."""
    halves = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    values = torch.cat((halves, -halves))[None] * 448
    codes, block_scales = nvfp4_codes(values, 1.0)
    assert block_scales.float().tolist() == [[448.0, 448.0]]
    expected = (values[0] / 448).numpy().astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    found = torch.stack((codes & 15, codes >> 4), dim=-1).flatten().numpy()
    nonzero = halves.numpy() != 0  # the sign of zero is not kept
    np.testing.assert_array_equal(found[np.r_[nonzero, nonzero]], expected[np.r_[nonzero, nonzero]])
