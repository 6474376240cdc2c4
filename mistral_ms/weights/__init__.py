"""What is true of each weight, said once, beside its layer. One file a kind of layer."""

from mistral_ms.weights.attention import attention_specs, bias_specs, projection_specs
from mistral_ms.weights.embedding import EMBEDDING, HEAD, vocabulary_specs
from mistral_ms.weights.feed_forward import feed_forward_specs, swiglu_specs
from mistral_ms.weights.gates import (
    GateSpecs,
    gate_matrix,
    num_experts,
    register_gate_specs,
    router_specs,
)
from mistral_ms.weights.initial import balanced, init_values
from mistral_ms.weights.layers import LayerSpecs, layer_specs, register_layer
from mistral_ms.weights.lora import (
    ADAPTABLE,
    MAGNITUDE,
    A,
    Adaptable,
    B,
    adaptable_modules,
    unmatched,
)
from mistral_ms.weights.model import (
    Specs,
    by_name,
    check_parameters,
    expert_weights,
    specs,
    stored_specs,
)
from mistral_ms.weights.moe import expert_specs, moe_specs, shared_gate_specs
from mistral_ms.weights.norm import norm_specs
from mistral_ms.weights.registry import Registry
from mistral_ms.weights.spec import Cut, ParamSpec, inside, matrix, scale

__all__ = [
    "ADAPTABLE",
    "EMBEDDING",
    "HEAD",
    "MAGNITUDE",
    "A",
    "Adaptable",
    "B",
    "Cut",
    "GateSpecs",
    "LayerSpecs",
    "ParamSpec",
    "Registry",
    "Specs",
    "adaptable_modules",
    "attention_specs",
    "balanced",
    "bias_specs",
    "by_name",
    "check_parameters",
    "expert_specs",
    "expert_weights",
    "feed_forward_specs",
    "gate_matrix",
    "init_values",
    "inside",
    "layer_specs",
    "matrix",
    "moe_specs",
    "norm_specs",
    "num_experts",
    "projection_specs",
    "register_gate_specs",
    "register_layer",
    "router_specs",
    "scale",
    "shared_gate_specs",
    "specs",
    "stored_specs",
    "swiglu_specs",
    "unmatched",
    "vocabulary_specs",
]
