"""Filling a model's parameters from a checkpoint: the one place here that knows MindSpore."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor

from mistral_ms.checkpoint.quantized_store import Readable
from mistral_ms.checkpoint.source import Source
from mistral_ms.config import LoraConfig, ModelConfig
from mistral_ms.config.quantization import Quantization
from mistral_ms.errors import CheckpointError
from mistral_ms.weights import expert_weights, stored_specs

_FLOATS = {ms.float32: "float32", ms.float16: "float16", ms.bfloat16: "bfloat16"}
_CODES = {ms.int8: "int8", ms.uint8: "uint8"}


class Storage(Protocol):
    """How what a process holds lies in a checkpoint.

    Attributes:
        holds_everything: it is alone, and every tensor of a checkpoint must have its parameter.
    """

    holds_everything: bool

    def whole(self, name: str) -> tuple[int, ...]:
        """The shape of a whole tensor."""

    def local_slice(self, name: str) -> tuple[slice, ...]:
        """Which part of a whole tensor it holds."""

    def parameter_shape(self, name: str, held: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the parameter that keeps a part."""

    def to_parameter(self, name: str, values: np.ndarray) -> np.ndarray:
        """A part as it lies in its parameter."""


def kept_quantization(
    source: Source, dtype: str, world: int = 1, lora: LoraConfig | None = None
) -> Quantization | None:
    """How the experts of a checkpoint stay quantised in a model; None: they become weights.

    Args:
        source: the checkpoint.
        dtype: of the model's weights.
        world: how many processes hold the model.
        lora: adapters that are trained beside them.
    """
    how = source.quantization
    if lora is not None and lora.use_dora and _adapts_experts(source.config, lora):
        return None  # codes have no lengths of rows
    here = ms.get_context("device_target") == "CPU" and world == 1 and dtype != "float16"
    return how if here and isinstance(how, Quantization) else None


def _adapts_experts(config: ModelConfig, lora: LoraConfig) -> bool:
    experts = {spec.name for spec in expert_weights(config)}
    adapted = config.model_copy(update={"lora": lora})
    return any(spec.adapts in experts for spec in stored_specs(adapted))


def load_weights(
    source: Source,
    parameters: Mapping[str, Parameter],
    progress: Callable[[int], None] | None = None,
    storage: Storage | None = None,
) -> None:
    """Reads every tensor of ``source`` into the parameter of the same name.

    Values are cast to the parameter's dtype (round to nearest even); the experts of a model that
    keeps them quantised get codes and scales. No tensor is left unread and
    no parameter unfilled; names and shapes are compared before the first one is read, the digests
    of the files when the last one was (:meth:`Source.verify`).

    Args:
        source: an open checkpoint of any known format.
        parameters: the model's weights under our names.
        progress: called with the bytes of each tensor that was read.
        storage: what the process holds, and how; of a process of several only that is read, and
            ``parameters`` may be some of the model's. None: all of everything, as it is.

    Raises:
        CheckpointError: a tensor without a parameter, a parameter without a tensor, a shape
            that differs, or a damaged file.
    """
    read: Readable = source
    if any(parameter.dtype in _CODES for parameter in parameters.values()):
        read, storage = source.codes_and_scales(), None  # of a process that is alone
    tensors = {name: read.shape(name) for name in read.names()}
    alone = storage is None or storage.holds_everything
    unread = set(tensors) - set(parameters) if alone else set()
    for name in sorted(unread | (set(parameters) - set(tensors))):
        missing = name not in tensors
        raise CheckpointError(
            "missing tensor" if missing else "extra tensor",
            where=f"{source.path}: {name}",
            rule="the model needs it" if missing else "the model has no such weight",
        )
    local_slices = {}
    for name, parameter in parameters.items():
        held = tensors[name]
        if storage is not None:
            _check_shape(source, name, held, storage.whole(name))
            local_slices[name] = storage.local_slice(name)
            held = tuple(each.stop - each.start for each in local_slices[name])
            held = storage.parameter_shape(name, held)
        _check_shape(source, name, held, tuple(parameter.shape))
    for name, parameter in parameters.items():
        dtype = dtype_name(parameter.dtype)
        if alone:
            values = read.read(name, dtype)
        else:
            values = read.read_slice(name, local_slices[name], dtype)
        if storage is not None:
            values = storage.to_parameter(name, values)
        set_values(parameter, values)
        if progress is not None:
            progress(values.nbytes)
    source.verify()


def _check_shape(
    source: Source, name: str, shape: tuple[int, ...], wanted: tuple[int, ...]
) -> None:
    if shape != wanted:
        raise CheckpointError(
            "wrong shape",
            where=f"{source.path}: {name}",
            value=list(shape),
            rule=f"the model's weight is {list(wanted)}",
        )


def set_values(parameter: Parameter, values: np.ndarray) -> None:
    """Fills a parameter, before any graph with it is run.

    Args:
        parameter: float32, float16 or bfloat16; int8 or uint8 of codes.
        values: of its shape and dtype; bfloat16 as bits in uint16.
    """
    # what MindSpore has cut when it divided a graph stays known as cut
    parameter.set_data(_tensor(values, parameter.dtype), slice_shape=parameter.sliced)


def to_numpy(parameter: Parameter) -> tuple[np.ndarray, str]:
    """A parameter's values and dtype name; bfloat16 as its bits in uint16, for NumPy has none."""
    dtype = dtype_name(parameter.dtype)
    if parameter.dtype != ms.bfloat16:
        return parameter.asnumpy(), dtype
    bits = parameter.astype(ms.float32).asnumpy().view(np.uint32) >> 16
    return bits.astype(np.uint16), dtype  # exact: the lower half of a widened bfloat16 is zero


def _tensor(values: np.ndarray, dtype: ms.Type) -> Tensor:
    if dtype != ms.bfloat16:
        return Tensor.from_numpy(np.ascontiguousarray(values))
    wide = (values.astype(np.uint32) << 16).view(np.float32)
    return Tensor.from_numpy(wide).astype(ms.bfloat16)


def dtype_name(dtype: ms.Type) -> str:
    """What configurations call a dtype; of codes MindSpore's name."""
    return _CODES.get(dtype) or _FLOATS[dtype]
