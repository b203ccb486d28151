"""Group norm as a function of instance norm, against torch's."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from export.instance_norm import DOMAIN, spell_group_norms
from export.trace import OPSET


def group_norm_model(channels: int, groups: int, epsilon: float) -> onnx.ModelProto:
    values = {"x": ["b", channels, "h", "w"], "scale": [channels], "bias": [channels], "y": ["b", channels, "h", "w"]}
    x, scale, bias, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in values.items())
    node = helper.make_node("GroupNormalization", ["x", "scale", "bias"], ["y"], num_groups=groups, epsilon=epsilon)
    graph = helper.make_graph([node], "group_norm", [x, scale, bias], [y])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=10)


@pytest.mark.parametrize(("channels", "groups"), [(8, 8), (24, 8), (64, 32), (6, 1)])
def test_spelled_group_norm_is_torchs(channels, groups):
    model = group_norm_model(channels, groups, 1e-3)
    spelled = spell_group_norms(model)
    onnx.checker.check_model(spelled, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert {node.domain for node in spelled.graph.node} == {DOMAIN}
    rng = np.random.default_rng(0)
    shapes = {"x": (2, channels, 5, 7), "scale": (channels,), "bias": (channels,)}
    inputs = {name: rng.normal(0.3, 2.0, shape).astype(np.float32) for name, shape in shapes.items()}
    x, scale, bias = map(torch.from_numpy, inputs.values())
    expected = torch.nn.functional.group_norm(x, groups, scale, bias, eps=1e-3).numpy()
    session = onnxruntime.InferenceSession(spelled.SerializeToString(), providers=["CPUExecutionProvider"])
    for run in (session.run, ReferenceEvaluator(spelled).run):
        np.testing.assert_allclose(run(None, inputs)[0], expected, rtol=2e-5, atol=2e-5)


def test_a_graph_without_group_norms_stays_as_it_is():
    model = group_norm_model(8, 8, 1e-6)
    del model.graph.node[:]
    assert spell_group_norms(model) is model
