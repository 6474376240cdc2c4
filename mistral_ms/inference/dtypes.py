"""Which dtypes a device computes in."""

from __future__ import annotations

import mindspore as ms

from mistral_ms.config import DType
from mistral_ms.errors import GenerationError
from mistral_ms.ops import cpu


def check_weights_dtype(dtype: DType, world: int, tied: bool = False) -> None:
    """Raises if weights cannot be of a dtype here, with explicit execution.

    Args:
        dtype: of the weights.
        world: how many processes there are.
        tied: whether the embedding is the head, too.

    Raises:
        GenerationError: bfloat16 on CPU in several processes, of tied embeddings, or without the
            operators for it.
    """
    if dtype != "bfloat16" or ms.get_context("device_target") != "CPU":
        return
    missing = cpu.why_missing()
    if tied:  # MindSpore copies a parameter that two operators take, and has no copy of bfloat16
        missing = "on CPU the embedding and the head are two weights in bfloat16"
    if world > 1 or missing is not None:
        raise GenerationError(
            "dtype not available",
            where="dtype",
            value=dtype if world == 1 else f"{dtype} in {world} processes on CPU",
            rule=missing or "weights in bfloat16 are for one process on CPU",
            todo="use float32",
        )


def check_dtype(dtype: DType) -> None:
    """Raises if the device cannot compute in a dtype.

    Raises:
        GenerationError: bfloat16 on CPU.
    """
    if dtype == "bfloat16" and ms.get_context("device_target") == "CPU":
        raise GenerationError(
            "dtype not available",
            where="dtype",
            value=dtype,
            rule="MindSpore's CPU backend multiplies matrices in float32 and float16 only",
            todo="use float32",
        )
