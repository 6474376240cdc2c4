"""A model with layers of its own: norms of queries and keys, a shared expert, a router with a bias,
and a buffer that counts forward passes. Nothing but this file knows them.
"""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, nn, ops

from mistral_ms.config import LayerKinds, ModelConfig
from mistral_ms.layers import Attention, RMSNorm
from mistral_ms.layers.parameter import weight
from mistral_ms.models import LayerFactory
from mistral_ms.moe import MoELayer
from mistral_ms.moe.gates.softmax_top_k import SoftmaxTopK
from mistral_ms.ops import reference
from mistral_ms.weights import (
    Cut,
    ParamSpec,
    attention_specs,
    by_name,
    inside,
    matrix,
    moe_specs,
    register_layer,
    scale,
)

KINDS = LayerKinds(attention="toy_attention", sparse="toy_moe")


@register_layer("toy_attention")
def toy_attention_specs(config: ModelConfig) -> tuple[ParamSpec, ...]:
    """Each rank normalises its own heads with the same weight, so gradients are partial."""
    names = ("q_norm.weight", "k_norm.weight")
    norms = (scale(name, "D", config.head_size, partial_gradient=True) for name in names)
    return (*attention_specs(config), *norms)


def shared_specs(config: ModelConfig) -> tuple[ParamSpec, ...]:
    H, I, std = config.hidden_size, config.intermediate_size, config.initializer_range  # noqa: E741
    rows, columns = Cut("mp", 0, I), Cut("mp", 1, I)
    return (
        matrix("w1", ("I", "H"), (I, H), std, rows),
        matrix("w2", ("H", "I"), (H, I), std, columns),
        matrix("w3", ("I", "H"), (I, H), std, rows),
    )


@register_layer("toy_moe")
def toy_moe_specs(config: ModelConfig) -> tuple[ParamSpec, ...]:
    E = config.moe.num_local_experts
    return (
        *moe_specs(config),
        ParamSpec("router.bias", ("E",), (E,), decay=False, init="zeros"),
        *inside("shared_experts", shared_specs(config)),
        ParamSpec("passes", ("count",), (1,), decay=False, init="zeros", kind="buffer"),
    )


class ToyAttention(Attention):
    """Without a cache."""

    def __init__(self, linears, core, config, dtype):
        super().__init__(linears, core)
        self.heads = config.num_attention_heads, config.num_key_value_heads, config.head_size
        self.q_norm = RMSNorm(config.head_size, config.rms_norm_eps, dtype)
        self.k_norm = RMSNorm(config.head_size, config.rms_norm_eps, dtype)

    def construct(self, x_TH, context):
        T, (N, G, D) = x_TH.shape[0], self.heads
        q = self.q_norm(self.q_proj(x_TH).reshape(T * N, D)).reshape(T, N * D)
        k = self.k_norm(self.k_proj(x_TH).reshape(T * G, D)).reshape(T, G * D)
        return self.o_proj(self.core(q, k, self.v_proj(x_TH), context))


class ToyRouter(SoftmaxTopK):
    def __init__(self, config, routing, layer, dtype):
        super().__init__(config, routing, layer, dtype)
        self.bias = weight(config.moe.num_local_experts, dtype=dtype)

    def logits(self, x_TH, weight_EH):
        return reference.linear(x_TH, weight_EH) + self.bias


class SharedExpert(nn.Cell):
    def __init__(self, config, dtype):
        super().__init__()
        specs = by_name(shared_specs(config))
        self.w1 = weight(*specs["w1"].shape, dtype=dtype)
        self.w2 = weight(*specs["w2"].shape, dtype=dtype)
        self.w3 = weight(*specs["w3"].shape, dtype=dtype)

    def construct(self, x_TH):
        gate, up = reference.linear(x_TH, self.w1), reference.linear(x_TH, self.w3)
        return reference.linear(reference.swiglu(gate, up), self.w2)


class ToyMoE(MoELayer):
    def __init__(self, config, routing, layer, dtype):
        super().__init__(config, routing, dtype)
        self.router = ToyRouter(config, routing, layer, dtype)
        self.shared_experts = SharedExpert(config, dtype)
        self.passes = weight(1)
        self.one = Tensor(np.ones(1, np.float32))

    def construct(self, x_TH, valid_T, context=None):
        y_TH, sums = super().construct(x_TH, valid_T, context)
        counted = ops.assign_add(self.passes, self.one)
        return ops.depend(y_TH + self.shared_experts(x_TH), counted), sums


class ToyLayerFactory(LayerFactory):
    def attention(self, layer):
        linears = self.linears(attention_specs(self.config))
        return ToyAttention(linears, self.attention_core(layer), self.config, self.dtype)

    def moe(self, layer):
        return ToyMoE(self.config, self.routing, layer, self.dtype)
