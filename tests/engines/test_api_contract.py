"""Every name of the compilers' API that the builder uses exists in TensorRT's and in TensorRT-RTX' own bindings.

TensorRT's libraries come only from NVIDIA's own index. Its bindings come from PyPI and import over empty libraries: no
object can be made, but every class, method and flag is there to look at.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from engines import tensorrt, timing_cache
from flux2_trt.runtime import cuda
from flux2_trt.runtime import tensorrt as runtime

CLASSES = {
    "trt": "",
    "builder": "Builder.",
    "network": "INetworkDefinition.",
    "parser": "OnnxParser.",
    "config": "IBuilderConfig.",
    "optimization": "IOptimizationProfile.",
    "layer": "IAttentionOutputLayer.",
    "merged": "ITimingCache.",
    "self": "IProgressMonitor.",
}
"""Classes by the names of the builder's variables."""
OVERRIDDEN = {"IProgressMonitor.phase_start", "IProgressMonitor.step_complete", "IProgressMonitor.phase_finish"}
OF_ATTENTION = {"IAttentionOutputLayer.attention.decomposable": "IAttention.decomposable"}  # a property has no class
RTX_ONLY = {"ComputeCapability", "IBuilderConfig.set_compute_capability", "IBuilderConfig.num_compute_capabilities"}
"""Used only for targets that are compiled ahead of time."""

LIBRARIES = ("libnvinfer.so.11", "libnvonnxparser.so.11", "libnvinfer_plugin.so.11")
SYMBOLS = (
    *("createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL"),
    *("createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getNvOnnxParserVersion"),
    *("getBuilderPluginRegistry", "getPluginRegistry", "initLibNvInferPlugins"),
)
LOOK = """
import functools, importlib, json, sys
module, names = importlib.import_module(sys.argv[1]), json.loads(sys.argv[2])
def there(name):
    try:
        functools.reduce(getattr, name.split("."), module)
    except AttributeError:
        return False
    return True
print(json.dumps([name for name in names if not there(name)]))
"""


def used_names() -> set[str]:
    """Dotted names below the compiler's module, from the source of what uses it."""
    found = set(OVERRIDDEN)
    sources = [ast.parse(Path(module.__file__).read_text(encoding="utf-8")) for module in (tensorrt, timing_cache)]
    for node in [node for source in sources for node in ast.walk(source)]:
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name) and node.id in CLASSES and node.id != "self":
            name = CLASSES[node.id] + ".".join(parts)
            found.add(OF_ATTENTION.get(name, name.removesuffix(".attention")))
    return {name for name in found if not name.endswith((".__init__", ".__class__", ".attention.decomposable"))}


RUNTIME_CLASSES = {
    "self._trt": "",
    "trt": "",
    "runtime": "Runtime.",
    "engine": "ICudaEngine.",
    "self._engine": "ICudaEngine.",
    "context": "IExecutionContext.",
    "self._context": "IExecutionContext.",
    "config": "IRuntimeConfig.",
    "cache": "IRuntimeCache.",
}
"""Classes by what the runtime calls them."""
RUNTIME_RTX_ONLY = {
    "DynamicShapesKernelSpecializationStrategy",
    "DynamicShapesKernelSpecializationStrategy.EAGER",
    "IRuntimeCache",
    "IRuntimeCache.deserialize",
    "IRuntimeCache.serialize",
    "IRuntimeConfig.create_runtime_cache",
    "IRuntimeConfig.dynamic_shapes_kernel_specialization_strategy",
    "IRuntimeConfig.set_runtime_cache",
}
"""Behind a look for `IRuntimeCache`, which TensorRT lacks."""


def runtime_names() -> set[str]:
    """As `used_names`, of what runs plans."""
    found = {"IRuntimeCache"}
    for node in ast.walk(ast.parse(Path(runtime.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute):
            owner, _, rest = ast.unparse(node).rpartition(".")
            for variable, name in RUNTIME_CLASSES.items():
                if owner == variable or owner.startswith(f"{variable}."):
                    found.add(name + owner[len(variable) + 1 :] + ("." if owner != variable else "") + rest)
    return {name for name in found if not name.endswith("__version__")}


def test_cuda_has_every_name_of_the_runtime() -> None:
    bindings = pytest.importorskip("cuda.bindings.runtime")
    names = {
        node.value
        for node in ast.walk(ast.parse(Path(cuda.__file__).read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("cuda")
    }
    names = {name for name in names if name.isidentifier()}
    assert {"cudaGraphLaunch", "cudaStreamBeginCapture", "cudaHostAlloc"} <= names
    assert [name for name in names if not hasattr(bindings, name)] == []


def missing(module: str, names: set[str], **environment: str) -> list[str]:
    """Those of `names` that a module lacks, as a process of its own sees it."""
    done = subprocess.run(
        [sys.executable, "-c", LOOK, module, json.dumps(sorted(names))],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_names_are_those_of_the_builder() -> None:
    names = used_names()
    assert {"Builder.build_serialized_network", "OnnxParser.parse", "IAttention.decomposable"} <= names
    assert {"IBuilderConfig.create_timing_cache", "ITimingCache.combine"} <= names
    assert len(names) > 20


def test_tensorrt_rtx_has_every_name() -> None:
    pytest.importorskip("tensorrt_rtx")
    assert missing("tensorrt_rtx", used_names() | runtime_names()) == []
    assert {"ICudaEngine.get_tensor_mode", "IExecutionContext.execute_async_v3"} <= runtime_names()
    assert runtime_names() >= RUNTIME_RTX_ONLY


def test_tensorrt_has_every_name(tmp_path: Path) -> None:
    if importlib.util.find_spec("tensorrt_bindings") is None or shutil.which("cc") is None:
        pytest.skip("needs the package tensorrt-cu13-bindings and a C compiler")
    source = tmp_path / "empty.c"
    source.write_text("".join(f"void *{symbol}(void) {{ return 0; }}\n" for symbol in SYMBOLS))
    for library in LIBRARIES:
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o", str(tmp_path / library), str(source)]
        subprocess.run(command, check=True)
    names = used_names()
    assert names >= RTX_ONLY - {"ComputeCapability"}
    shared = (names - RTX_ONLY) | (runtime_names() - RUNTIME_RTX_ONLY)
    assert missing("tensorrt_bindings", shared, LD_LIBRARY_PATH=str(tmp_path)) == []
    assert missing("tensorrt_bindings", {"BuilderFlag.FP8"}, LD_LIBRARY_PATH=str(tmp_path)) == ["BuilderFlag.FP8"]
