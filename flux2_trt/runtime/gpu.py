"""GpuRuntime: the components of a bundle on a device, each with its weights where the plan of residency puts them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flux2_trt.bundle import Bundle
from flux2_trt.drawing import Drawing
from flux2_trt.errors import BundleError
from flux2_trt.manifest import PART_NAMES, SYNTHETIC, ComponentRecord
from flux2_trt.runtime.blocks import BlockNames, BlockStep, StreamedBlocks, spread
from flux2_trt.runtime.component import Component as Loaded
from flux2_trt.runtime.component import DeviceEngine
from flux2_trt.runtime.denoiser import Denoiser
from flux2_trt.runtime.device import Device
from flux2_trt.runtime.engine import Engine
from flux2_trt.runtime.kernels import KernelFile
from flux2_trt.runtime.lane import Lane
from flux2_trt.runtime.loop import DeviceLoop, Step, WholeStep
from flux2_trt.runtime.plan import Plan, Sizes, Tensors, profile_of
from flux2_trt.runtime.tensorrt import TensorRTPlan
from flux2_trt.runtime.weights import MappedFile, Weights, WeightSource, WeightStore
from flux2_trt.spec import Component

BESIDE: tuple[Component, ...] = ("text_encoder", "vae_decoder")
"""What runs while a picture is denoised."""

LoadPlan = Callable[[ComponentRecord, bytes], Plan]
MakeWeights = Callable[[ComponentRecord], WeightSource]


@dataclass(frozen=True)
class Residency:
    """What does not stay on the device: components that are swapped out after their stage, and how many double and
    single blocks of the transformer are streamed in every step. `conditioning` goes and comes with the transformer."""

    swapped: frozenset[Component] = frozenset()
    streamed: tuple[int, int] = (0, 0)


class GpuRuntime:
    """The engines and the loop of a bundle on a device.

    Components are loaded when they are first asked for. `BESIDE` have a lane of their own where `overlaps`, so that one
    picture is decoded, and the prompt of another encoded, while a third is denoised; everything else shares a stream
    and scratch.
    """

    computes_on_host = False

    def __init__(
        self,
        bundle: Bundle,
        device: Device,
        store: WeightStore | None = None,
        residency: Residency = Residency(),
        overlaps: bool = True,
        graphs: bool = True,
        load_plan: LoadPlan | None = None,
        kernels: Path | None = None,
        weights: MakeWeights | None = None,
    ) -> None:
        """`store`: of weights that other runtimes on this device share. `kernels`: a folder for those that
        TensorRT-RTX makes on this machine. `weights`: in place of the bundle's files, from a component's record."""
        self.bundle, self.device, self.residency = bundle, device, residency
        self._store = store or WeightStore(device)
        self._load_plan = load_plan or partial(_tensorrt_plan, kernels)
        self._made_up = weights
        self._plans: dict[str, Plan] = {}
        self._files: dict[str, WeightSource] = {}
        self._weights: dict[Component, list[Weights]] = {}
        self._engines: dict[Component, DeviceEngine] = {}
        self._loop: DeviceLoop | None = None
        self._streamed: StreamedBlocks | None = None
        self._lane = self._beside = Lane(device, graphs)
        self._graphs = graphs
        try:
            self._let_overlap(overlaps)
        except BaseException:
            self._lane.close()
            raise

    def arrange(self, drawing: Drawing, encodes: bool) -> None:
        """Weights stay where they were placed."""

    @property
    def overlaps(self) -> bool:
        return self._beside is not self._lane

    def engine(self, component: Component) -> Engine:
        """Raises BundleError for a component that is not there, or a plan that is refused."""
        self.device.use_in_this_thread()
        if component not in self._engines:
            lane = self._beside if component in BESIDE else self._lane
            self._engines[component] = DeviceEngine(self._component(component, lane), self._complete)
        engine = self._engines[component]
        return self._swapping(component, engine)

    def denoiser(self) -> Denoiser:
        self.device.use_in_this_thread()
        if self._loop is None:
            self._loop = self._made_loop()
        return self._swapping("transformer", self._loop)

    @property
    def streamed_bytes(self) -> int:
        """That come from the host in every step, once the loop was made."""
        return self._streamed.bytes if self._streamed else 0

    @property
    def bytes_of_sizes(self) -> int:
        """On the device, that `forget_sizes` frees."""
        return self.device.held_bytes - self._store.loaded_bytes

    def scratch_of(self, component: Component, sizes: Sizes) -> int:
        """Bytes that the plans of a component want at `sizes`; nothing is allocated for it.

        Raises UsageError for sizes that they were not built for.
        """
        self.device.use_in_this_thread()
        wanted = 0
        for record in self.bundle.manifest.components:
            if record.name.partition(".")[0] == component:
                plan = self._plan(record)
                shapes = Tensors(record.shapes, sizes).shapes(plan.inputs)
                execution = plan.execution(shapes, profile_of(record, sizes), self._lane.stream)
                wanted = max(wanted, execution.scratch_bytes)
                execution.close()
        return wanted

    def weights_of(self, components: Iterable[Component]) -> list[Weights]:
        """Of those that were used so far."""
        return [weights for name in components for weights in self._weights.get(name, ())]

    def forget_sizes(self) -> None:
        """Frees all but weights: what runs next makes its buffers, scratch and graphs anew."""
        self.device.use_in_this_thread()
        for engine in self._engines.values():
            engine.close()
        if self._loop:
            self._loop.close()
        for lane in {self._lane, self._beside}:
            lane.shrink()

    def place(self, residency: Residency, overlaps: bool) -> None:
        """Weights from here on; those that stay as they were are not touched, everything else is made anew."""
        self.device.use_in_this_thread()
        self.forget_sizes()
        if residency.streamed != self.residency.streamed:
            self._loop = None
            if self._streamed:
                streamed, self._streamed = self._streamed, None
                streamed.close()
        stay = set(self._weights) - residency.swapped
        if self._loop is None:
            stay.discard("transformer")
        self._store.unload(but=self.weights_of(stay))
        self.residency = residency
        self._let_overlap(overlaps)

    def close(self) -> None:
        """Frees everything on the device but weights that others use."""
        self.device.use_in_this_thread()
        with ExitStack() as rest:
            rest.callback(self._store.unload)
            rest.callback(self._lane.close)
            if self._beside is not self._lane:
                rest.callback(self._beside.close)
            for plan in self._plans.values():
                rest.callback(plan.close)
            if self._streamed:
                rest.callback(self._streamed.close)
            for engine in self._engines.values():
                rest.callback(engine.close)
            if self._loop:
                rest.callback(self._loop.close)
            self._plans, self._engines, self._loop, self._streamed = {}, {}, None, None

    def _let_overlap(self, wanted: bool) -> None:
        """Engines of `BESIDE` are made anew where their lane is another."""
        wanted = wanted and not self.residency.swapped  # what makes room would be in use
        if wanted == self.overlaps:
            return
        for component in BESIDE:
            self._engines.pop(component, None)
        if wanted:
            self._beside = Lane(self.device, self._graphs)
        else:
            beside, self._beside = self._beside, self._lane
            beside.close()

    def _swapping(self, component: Component, inner: Any) -> Any:
        if component not in self.residency.swapped:
            return inner
        return _Swapped(inner, partial(self._make_room_for, component))

    def _make_room_for(self, component: Component) -> None:
        """Takes the weights of the other swapped components off the device; they come back when they are used."""
        going = self.residency.swapped - {component} - ({"conditioning"} if component == "transformer" else set())
        for other in going:
            if other == "transformer" and self._loop:
                self._loop.close()
            elif other in self._engines:
                self._engines[other].close()
        for weights in self.weights_of(going):
            weights.unload()

    def _made_loop(self) -> DeviceLoop:
        conditioning = self._component("conditioning", self._lane)
        parts = [name for name in PART_NAMES if any(c.name == name for c in self.bundle.manifest.components)]
        if not parts:
            if self.residency.streamed != (0, 0):
                raise BundleError(
                    f"{self.bundle.path} has no plans of blocks, which streaming needs; build them: "
                    f"{self.bundle.build_command} --plans blocks"
                )
            transformer = self._component("transformer", self._lane)
            shapes, rows = transformer.record.shapes, _rows(transformer.record)
            return DeviceLoop(conditioning, shapes, rows, partial(WholeStep, transformer))
        loaded = {name.partition(".")[2]: self._part(name) for name in parts}
        outer = {
            name: shape for part in loaded.values() for name, shape in part.record.shapes.items() if name in _OF_A_STEP
        }
        return DeviceLoop(conditioning, outer, _rows(loaded["prologue"].record), self._block_step(loaded))

    def _block_step(self, parts: Mapping[str, Loaded]) -> Callable[..., Step]:
        digest, source = self._source(next(iter(PART_NAMES)))
        names = BlockNames.of(tuple(source.sizes))
        order = []
        for kind, count in zip(("double", "single"), self.residency.streamed, strict=True):
            blocks = [block for block in names.blocks if block[0] == kind]
            order += [blocks[index] for index in spread(len(blocks), count)]
        stay = [name for block, own in names.blocks.items() if block not in order for name in own]
        resident = self._store.get(digest, source, [*names.ends, *stay])
        self._weights["transformer"] = [resident]
        if order and self._streamed is None:
            self._streamed = StreamedBlocks(self.device, source, names.blocks, order)
        return partial(BlockStep, parts, names, resident, self._streamed)

    def _component(self, name: Component, lane: Lane) -> Loaded:
        record = self.bundle.component(name)
        if record.weight_placement == "embedded":
            return Loaded(lane, self._plan(record), record)
        weights = self._store.get(*self._source(name))
        self._weights.setdefault(name, []).append(weights)
        return Loaded(lane, self._plan(record), record, weights)

    def _part(self, name: str) -> Loaded:
        record = self.bundle.component(name)
        return Loaded(self._lane, self._plan(record), record)

    def _source(self, name: str) -> tuple[str, WeightSource]:
        """The digest of a component's weight file, and the file."""
        if self._made_up:
            whole = name.partition(".")[0]
            if whole not in self._files:
                self._files[whole] = self._made_up(self.bundle.component(name))
            return whole, self._files[whole]
        record, path = self.bundle.component(name).weights, self.bundle.weights_path(name)
        if record is None or path is None:
            raise BundleError(
                f"{self.bundle.path} keeps no weights of {name}: they are made up from a seed, and plans do not say "
                "of which sizes; run the prepared bundle that it was compiled from: --backend torch"
                if SYNTHETIC in self.bundle.manifest.source
                else f"{self.bundle.path} has no weights of {name}; build it again: {self.bundle.build_command}"
            )
        if record.sha256 not in self._files:
            self._files[record.sha256] = MappedFile(path)
        return record.sha256, self._files[record.sha256]

    def _plan(self, record: ComponentRecord) -> Plan:
        if record.name not in self._plans:
            data = self.bundle.plan_path(record.name).read_bytes()
            self._plans[record.name] = self._load_plan(record, data)
        return self._plans[record.name]

    def _complete(self, sizes: dict[str, int]) -> dict[str, int]:
        """With the other of pixels and latents, one of which is an output."""
        pixels = self.bundle.manifest.model.autoencoder.pixels_per_token
        for side in ("height", "width"):
            if side in sizes:
                sizes[f"latent_{side}"] = sizes[side] // pixels
            elif f"latent_{side}" in sizes:
                sizes[side] = sizes[f"latent_{side}"] * pixels
        return sizes


_OF_A_STEP = ("latents", "step", "modulation", "dt", "text_tokens", "cos", "sin", "guidance_mix", "updated_latents")


@dataclass
class _Swapped:
    """An engine or a loop that others make room for."""

    inner: Any
    make_room: Callable[[], None]

    def run(self, *arguments: Any) -> Any:
        self.make_room()
        return self.inner.run(*arguments)


def _rows(record: ComponentRecord) -> int | None:
    return record.profiles[-1]["steps"][2] if record.profiles else None


def _tensorrt_plan(kernels: Path | None, record: ComponentRecord, data: bytes) -> Plan:
    return TensorRTPlan(record.compiler, data, record.name, KernelFile.of(kernels, record) if kernels else None)
