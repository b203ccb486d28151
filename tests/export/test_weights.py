"""Weight files, read back with safetensors' own reader."""

from dataclasses import dataclass

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnxruntime import InferenceSession, SessionOptions
from safetensors.numpy import load_file

from export.trace import Graph, WeightSlot
from export.weights import RandomSource, place_external, write_weights
from flux2_trt.errors import CheckpointError
from flux2_trt.inventory import expected_tensors
from flux2_trt.models import published_spec
from flux2_trt.runtime.onnxruntime import WEIGHTS_FOLDER


@dataclass
class Source:
    """Tensors in memory."""

    tensors: dict[str, np.ndarray]

    def read(self, name: str) -> np.ndarray:
        return self.tensors[name]


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


def test_a_graph_with_external_weights_computes_from_the_file(graph, tmp_path):
    path = tmp_path / "weights.safetensors"
    spans = write_weights(graph, Source({"weight": WEIGHT, "bias": BIAS}), path)
    model = place_external(graph, spans, path.name)
    assert [value.name for value in model.graph.input] == ["x"]
    options = SessionOptions()
    options.add_session_config_entry(WEIGHTS_FOLDER, str(tmp_path))
    session = InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    x = np.array([[1.0, 2.0, 3.0]], np.float32)
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], x @ WEIGHT.T + BIAS)
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
    # a linear of K inputs keeps the size of its activations: deviation 1/sqrt(K), of 110,592 samples
    hidden_size = published_spec("tiny").transformer.hidden_size
    assert first.read(names[0]).std() == pytest.approx(hidden_size**-0.5, rel=0.01)
