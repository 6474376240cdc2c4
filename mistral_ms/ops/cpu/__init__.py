"""Operators in C++ for the CPU, compiled when they are first used."""

from mistral_ms.ops.cpu.adamw import AdamW, SumOfSquares
from mistral_ms.ops.cpu.bfloat16 import Bfloat16GroupedLinear, Bfloat16Linear, Bfloat16Rows
from mistral_ms.ops.cpu.cached_attention import CachedAttention
from mistral_ms.ops.cpu.fused_experts import FEW_CHOICES, FusedExperts
from mistral_ms.ops.cpu.grouped_linear import GroupedLinear
from mistral_ms.ops.cpu.library import why_missing
from mistral_ms.ops.cpu.linear import Linear
from mistral_ms.ops.cpu.quantized import QuantizedFusedExperts, QuantizedGroupedLinear
from mistral_ms.ops.cpu.rms_norm import RMSNorm
from mistral_ms.ops.cpu.swiglu import SwiGLU

__all__ = [
    "FEW_CHOICES",
    "AdamW",
    "Bfloat16GroupedLinear",
    "Bfloat16Linear",
    "Bfloat16Rows",
    "CachedAttention",
    "FusedExperts",
    "GroupedLinear",
    "Linear",
    "QuantizedFusedExperts",
    "QuantizedGroupedLinear",
    "RMSNorm",
    "SumOfSquares",
    "SwiGLU",
    "why_missing",
]
