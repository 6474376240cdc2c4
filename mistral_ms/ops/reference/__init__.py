"""Plain MindSpore: the definition that every fused or custom operator must reproduce.

Everything here runs on any backend, in PyNative, GRAPH_MODE and jit.

Shape suffixes used throughout the package:

==  ==============================  ==  =======================
B   batch                           E   experts
S   sequence (queries)              K   experts per token
M   keys (sequence or cache)        C   capacity of an expert
T   tokens, B * S                   V   vocabulary
H   hidden size                     N   query heads
I   intermediate size               G   key/value heads
O   any output size                 D   head dimension
R   rows sorted by expert           Q   choices, T * K
==  ==============================  ==  =======================
"""

from mistral_ms.ops.reference.activation import swiglu
from mistral_ms.ops.reference.assignment import Auction, sinkhorn
from mistral_ms.ops.reference.attention import attention
from mistral_ms.ops.reference.matmul import (
    batched_linear,
    batched_matmul,
    dequantized,
    grouped_linear,
    linear,
    linear_primitive,
    rows_of_groups,
)
from mistral_ms.ops.reference.norm import rms_norm
from mistral_ms.ops.reference.permute import Permute, Unpermute
from mistral_ms.ops.reference.random import normal, threefry2x32, uniform, uniforms
from mistral_ms.ops.reference.rope import rotate
from mistral_ms.ops.reference.routing import (
    RowIdMap,
    assign_slots,
    assign_slots_by_priority,
    choose_tokens,
    count_choices,
    expert_one_hot,
    gating_top_k,
    pack_choices,
    pack_slots,
    reroute_tokens,
)
from mistral_ms.ops.reference.scoring import ScoringRules, scored_top_k

__all__ = [
    "Auction",
    "Permute",
    "RowIdMap",
    "ScoringRules",
    "Unpermute",
    "assign_slots",
    "assign_slots_by_priority",
    "attention",
    "batched_linear",
    "batched_matmul",
    "choose_tokens",
    "count_choices",
    "dequantized",
    "expert_one_hot",
    "gating_top_k",
    "grouped_linear",
    "linear",
    "linear_primitive",
    "normal",
    "pack_choices",
    "pack_slots",
    "reroute_tokens",
    "rms_norm",
    "rotate",
    "rows_of_groups",
    "scored_top_k",
    "sinkhorn",
    "swiglu",
    "threefry2x32",
    "uniform",
    "uniforms",
]
