"""Filling a model's parameters from a checkpoint: the one place here that knows MindSpore."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor

from mistral_ms.checkpoint.source import Source
from mistral_ms.errors import CheckpointError


def load_weights(
    source: Source,
    parameters: Mapping[str, Parameter],
    progress: Callable[[int], None] | None = None,
    window: Callable[[str, tuple[int, ...]], tuple[slice, ...]] | None = None,
) -> None:
    """Reads every tensor of ``source`` into the parameter of the same name.

    Values are cast to the parameter's dtype (round to nearest even). No tensor is left unread and
    no parameter unfilled; names and shapes are compared before the first one is read.

    Args:
        source: an open checkpoint of any known format.
        parameters: the model's weights under our names.
        progress: called with the bytes of each tensor that was read.
        window: what a rank holds of a whole tensor, by its name and shape; only that is read, and
            ``parameters`` may be some of the model's. None: all of everything.

    Raises:
        CheckpointError: a tensor without a parameter, a parameter without a tensor, or a shape
            that differs.
    """
    tensors = {name: source.shape(name) for name in source.names()}
    unread = set() if window is not None else set(tensors) - set(parameters)
    for name in sorted(unread | (set(parameters) - set(tensors))):
        missing = name not in tensors
        raise CheckpointError(
            "missing tensor" if missing else "extra tensor",
            where=f"{source.path}: {name}",
            rule="the model needs it" if missing else "the model has no such weight",
        )
    windows = {name: None if window is None else window(name, tensors[name]) for name in parameters}
    for name, parameter in parameters.items():
        part = windows[name]
        held = tensors[name] if part is None else tuple(each.stop - each.start for each in part)
        _check_shape(source, name, held, parameter)
    for name, parameter in parameters.items():
        part, dtype = windows[name], dtype_name(parameter.dtype)
        values = source.read(name, dtype) if part is None else source.read_window(name, part, dtype)
        set_values(parameter, values)
        if progress is not None:
            progress(values.nbytes)


def _check_shape(source: Source, name: str, shape: tuple[int, ...], parameter: Parameter) -> None:
    if tuple(parameter.shape) != tuple(shape):
        raise CheckpointError(
            "wrong shape",
            where=f"{source.path}: {name}",
            value=list(shape),
            rule=f"the model's weight is {list(parameter.shape)}",
        )


def set_values(parameter: Parameter, values: np.ndarray) -> None:
    """Fills a parameter before any graph with it is compiled.

    Args:
        parameter: float32, float16 or bfloat16.
        values: of its shape and dtype; bfloat16 as bits in uint16.
    """
    parameter.set_data(_tensor(values, parameter.dtype))


def to_numpy(parameter: Parameter) -> tuple[np.ndarray, str]:
    """A parameter's values and dtype name; bfloat16 as its bits in uint16, for NumPy has none."""
    dtype = dtype_name(parameter.dtype)
    if parameter.dtype != ms.bfloat16:
        return parameter.asnumpy(), dtype
    bits = parameter.astype(ms.float32).asnumpy().view(np.uint32) >> 16
    return bits.astype(np.uint16), dtype  # exact: the lower half of a widened bfloat16 is zero


def _tensor(values: np.ndarray, dtype: ms.Type) -> Tensor:
    if dtype != ms.bfloat16:
        return Tensor.from_numpy(values)
    wide = (values.astype(np.uint32) << 16).view(np.float32)
    return Tensor.from_numpy(wide).astype(ms.bfloat16)


def dtype_name(dtype: ms.Type) -> str:
    """What configurations call a dtype."""
    return {ms.float32: "float32", ms.float16: "float16", ms.bfloat16: "bfloat16"}[dtype]
