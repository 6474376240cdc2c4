"""Operators in C++ for the CPU, compiled when they are first used."""

from mistral_ms.ops.cpu.grouped_linear import GroupedLinear
from mistral_ms.ops.cpu.library import why_missing

__all__ = ["GroupedLinear", "why_missing"]
