"""Graphs of prepared bundles, run by torch on a GPU where a compiled plan would be.

Everything else is as it is with plans: weights are bound by address, work is captured into CUDA graphs, blocks stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.nn.attention import SDPBackend, sdpa_kernel

from export.graph import Graph
from flux2_trt.errors import BundleError, DeviceError
from flux2_trt.manifest import UNCOMPILED, ComponentRecord
from flux2_trt.runtime.device import Address, Stream
from flux2_trt.runtime.plan import Shape
from flux2_trt.runtime.torch_graph import torch_module

Kind = tuple[Shape, torch.dtype]

ATTENTION = [
    SDPBackend.CUDNN_ATTENTION,  # the fastest on Hopper
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]
"""The first that takes the shapes is used."""


class TorchPlans:
    """Loads the graphs of a prepared bundle as plans on the GPU `index`.

    `compiled`: by `torch.compile`, when they first run. Raises DeviceError where this torch uses no GPU.
    """

    def __init__(self, index: int = 0, compiled: bool = False) -> None:
        if not torch.cuda.is_available():
            raise DeviceError(f"torch {torch.__version__} uses no GPU here; install one that does: pip install torch")
        self.device, self.compiled = torch.device("cuda", index), compiled
        self._pools: dict[Stream, Any] = {}

    def __call__(self, record: ComponentRecord, data: bytes) -> TorchPlan:
        """Raises BundleError for a plan that was compiled already."""
        if record.compiler != UNCOMPILED:
            raise BundleError(f"{record.name} is a plan of {record.compiler}; torch runs graphs: use --backend plans")
        return TorchPlan(self, data)

    def held_bytes(self) -> int:
        """Of the device, for activations and constants, with what torch keeps for the next ones."""
        return int(torch.cuda.memory_reserved(self.device))

    def pool(self, stream: Stream) -> Any:
        """Memory for the activations of a stream: of what runs there one after the other. Graphs keep addresses in it,
        so nothing else gets them."""
        if stream not in self._pools:
            self._pools[stream] = torch.cuda.MemPool()
        return self._pools[stream]


class TorchPlan:
    """A `Plan`: the graph of a component."""

    def __init__(self, plans: TorchPlans, data: bytes) -> None:
        self.plans, self.model = plans, Graph.from_bytes(data).model
        self.inputs = frozenset(value.name for value in self.model.graph.input)
        self._modules: dict[tuple[tuple[str, Shape], ...], GraphModule] = {}

    def execution(self, shapes: Mapping[str, Shape], profile: int, stream: Stream) -> TorchExecution:
        key = tuple(sorted(shapes.items()))
        if key not in self._modules:
            self._modules[key] = writing(torch_module(self.model, shapes)).to(self.plans.device)
        return TorchExecution(self, self._modules[key], self.plans.pool(stream))

    def close(self) -> None:
        self._modules.clear()
        torch._C._cuda_clearCublasWorkspaces()  # there is one for each stream, also for those that are gone


class TorchExecution:
    """An `Execution` of a graph at fixed shapes. Its scratch is torch's."""

    scratch_bytes = 0

    def __init__(self, plan: TorchPlan, module: GraphModule, pool: Any) -> None:
        graph = plan.model.graph
        self._device, self._pool = plan.plans.device, pool
        self._inputs = [value.name for value in graph.input]
        self._outputs = [value.name for value in graph.output]
        metas = [*module.meta["inputs"], *module.meta["outputs"]]
        names = [*self._inputs, *self._outputs]
        self._kinds: dict[str, Kind] = {
            name: (tuple(meta.shape), meta.dtype) for name, meta in zip(names, metas, strict=True)
        }
        self._run = torch.compile(module, dynamic=False) if plan.plans.compiled else module
        self._at: dict[str, Tensor] = {}
        self._seen: dict[tuple[str, Address], Tensor] = {}

    def use_scratch(self, address: Address, size: int) -> None:
        pass

    def bind(self, addresses: Mapping[str, Address]) -> None:
        for name, address in addresses.items():
            if (name, address) not in self._seen:
                self._seen[name, address] = _tensor_at(address, *self._kinds[name], self._device)
            self._at[name] = self._seen[name, address]

    @torch.no_grad()
    def enqueue(self, stream: Stream) -> None:
        tensors = [self._at[name] for name in (*self._inputs, *self._outputs)]
        on_stream = torch.cuda.stream(torch.cuda.ExternalStream(stream, self._device))
        try:
            with on_stream, torch.cuda.use_mem_pool(self._pool), sdpa_kernel(ATTENTION, set_priority=True):
                self._run(*tensors)
        except RuntimeError as error:  # torch's own kinds are of it
            raise DeviceError(f"torch fails: {str(error).splitlines()[0]}") from error

    def close(self) -> None:
        self._at, self._seen = {}, {}


def writing(module: GraphModule) -> GraphModule:
    """`module`, which gives nothing and takes tensors for its outputs after its inputs."""
    graph = module.graph
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    end = graph.output_node()
    [results] = end.args
    assert isinstance(results, tuple)
    with graph.inserting_after(inputs[-1]):
        places = [graph.placeholder(f"output_{index}") for index in reversed(range(len(results)))]
    with graph.inserting_before(end):
        for place, result in zip(reversed(places), results, strict=True):
            graph.call_method("copy_", (place, result))
        graph.output(())
    graph.erase_node(end)
    module.recompile()
    return module


class _Memory:
    """Memory of the device as torch takes it from others."""

    def __init__(self, address: Address, size: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (int(address), False),
            "shape": (size,),
            "typestr": "|u1",
            "strides": None,
            "version": 3,
        }


def _tensor_at(address: Address, shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensor:
    size = dtype.itemsize
    for side in shape:
        size *= side
    return torch.as_tensor(_Memory(address, size), device=device).view(dtype).view(shape)
