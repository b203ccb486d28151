"""Model definitions in plain torch; every size comes from a `ModelSpec`."""

from torch import nn

from export.modules.autoencoder import VaeDecoder, VaeEncoder
from export.modules.conditioning import Conditioning
from export.modules.text_encoder import TextEncoder
from export.modules.transformer import Transformer
from flux2_trt.errors import UsageError
from flux2_trt.spec import Component, ModelSpec


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
