"""Frozen, typed configuration: read once at the edge, passed down as plain data."""

from mistral_ms.config.foreign import from_hf, from_mistral, to_hf, to_mistral, to_native
from mistral_ms.config.load import apply_overrides, load_model_config, read_yaml
from mistral_ms.config.model import DType, ModelConfig, MoEArchitecture
from mistral_ms.config.routing import DROPLESS, RoutingConfig

__all__ = [
    "DROPLESS",
    "DType",
    "MoEArchitecture",
    "ModelConfig",
    "RoutingConfig",
    "apply_overrides",
    "from_hf",
    "from_mistral",
    "load_model_config",
    "read_yaml",
    "to_hf",
    "to_mistral",
    "to_native",
]
