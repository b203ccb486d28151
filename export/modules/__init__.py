"""Model definitions in plain torch; every size comes from a `ModelSpec`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from export.modules.autoencoder import VaeDecoder, VaeEncoder
from export.modules.conditioning import Conditioning
from export.modules.text_encoder import TextEncoder
from export.modules.transformer import Transformer
from export.tensor_source import TensorSource
from flux2_trt.errors import UsageError
from flux2_trt.spec import Component, ModelSpec

Module = TypeVar("Module", bound=nn.Module)


def build_module(component: Component, spec: ModelSpec) -> nn.Module:
    """The module of one component, with uninitialised or default weights. Raises UsageError for one it lacks."""
    match component:
        case "text_encoder" if spec.text_encoder:
            return TextEncoder(spec.text_encoder)
        case "conditioning":
            return Conditioning(spec.transformer)
        case "transformer":
            return Transformer(spec.transformer)
        case "vae_encoder":
            return VaeEncoder(spec.autoencoder)
        case "vae_decoder":
            return VaeDecoder(spec.autoencoder)
    raise UsageError(f"{spec.name} has no component {component!r}; it has {', '.join(spec.components)}")


def load_module(
    make: Callable[[], Module],
    source: TensorSource,
    device: str,
    dtype: torch.dtype = torch.float32,
    prefix: str = "",
) -> Module:
    """A module with its weights, which are those of `source` whose names begin with `prefix`; one is read at a time."""
    with torch.device("meta"):
        module = make()
    state = {name: torch.from_numpy(source.read(f"{prefix}{name}")).to(device, dtype) for name in module.state_dict()}
    module.load_state_dict(state, assign=True)
    return module.eval()
