"""Quantising the experts of a checkpoint while it is converted, some rows at a time.

The weights are read twice: in a file the scales, which are wider, stand before the codes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from mistral_ms.checkpoint.plan import Assembly
from mistral_ms.checkpoint.quantization import quantize_rows, scales_of
from mistral_ms.checkpoint.source import Source
from mistral_ms.checkpoint.stream import Workspace
from mistral_ms.checkpoint.writer import Entry
from mistral_ms.config import ModelConfig
from mistral_ms.config.quantization import Quantization, scales_name
from mistral_ms.errors import CheckpointError
from mistral_ms.weights import expert_weights


@dataclass(frozen=True)
class QuantizationError:
    """How far the matrices that are read are from those that were given.

    Attributes:
        mean: of |W - read| / |W| (Frobenius norms) over all matrices of all experts.
        worst: the largest of them.
        matrix: which it is.
    """

    mean: float
    worst: float
    matrix: str


class Quantizer:
    """Makes the tensors that quantised weights are stored as, and measures them.

    Args:
        source: the checkpoint that is read.
        quantization: how.
        config: the model.

    Raises:
        CheckpointError: the model has no experts, or matrices that cannot be quantised so.
    """

    def __init__(self, source: Source, quantization: Quantization, config: ModelConfig) -> None:
        self._source, self._quantization = source, quantization
        self._errors: dict[str, np.ndarray] = {}  # of each expert, by the weight's name
        self.names = {spec.name for spec in expert_weights(config)}
        if not self.names:
            raise CheckpointError(
                "no experts",
                where=source.path,
                rule="the experts' weights are quantised, and no others",
            )
        for spec in expert_weights(config):
            if rule := quantization.broken_rule(spec.shape[-1]):
                raise CheckpointError(
                    "impossible quantisation",
                    where=spec.name,
                    value=f"{spec.shape[-1]} inputs, {quantization}",
                    rule=rule,
                )

    def entries(self, assembly: Assembly) -> tuple[Entry, Entry]:
        """Codes and scales of a weight.

        Args:
            assembly: the weight, as our format has it.
        """
        name, shape, how = assembly.name, assembly.shape, self._quantization
        dtype = "I8" if how.weights == "int8" else "U8"
        return (
            Entry(name, how.code_shape(shape), dtype, partial(self._codes, assembly)),
            Entry(
                scales_name(name), how.scale_shape(shape), "F32", partial(self._scales, assembly)
            ),
        )

    def error(self) -> QuantizationError:
        """To be asked when everything has been written."""
        each = {
            f"{name}, expert {expert}": float(error)
            for name, errors in self._errors.items()
            for expert, error in enumerate(errors)
        }
        worst = max(each, key=lambda matrix: each[matrix])
        return QuantizationError(math.fsum(each.values()) / len(each), each[worst], worst)

    def _scales(self, assembly: Assembly, workspace: Workspace) -> Iterator[np.ndarray]:
        for rows in _rows(self._source, assembly, workspace):
            _check_finite(rows, assembly.name, self._source.path)
            yield scales_of(rows, self._quantization).reshape(-1)

    def _codes(self, assembly: Assembly, workspace: Workspace) -> Iterator[np.ndarray]:
        experts, outputs, _ = assembly.shape
        squares, missed, position = np.zeros(experts), np.zeros(experts), 0
        for rows in _rows(self._source, assembly, workspace):
            codes, _, read = quantize_rows(rows, self._quantization)
            owners = np.arange(position, position + len(rows)) // outputs
            position += len(rows)
            np.add.at(squares, owners, np.square(rows, dtype=np.float64).sum(1))
            np.add.at(missed, owners, np.square(rows - read, dtype=np.float64).sum(1))
            yield codes.reshape(-1)
        self._errors[assembly.name] = np.sqrt(missed / np.where(squares > 0, squares, 1.0))


def _rows(source: Source, assembly: Assembly, workspace: Workspace) -> Iterator[np.ndarray]:
    """A weight as float32 [some rows, inputs], in its order."""
    columns, rest = assembly.shape[-1], np.empty(0, np.float32)
    for chunk in source.stream(assembly, "F32", workspace):
        joined = np.concatenate((rest, chunk)) if rest.size else chunk
        whole = joined.size // columns * columns
        rest = joined[whole:].copy()
        if whole:
            yield joined[:whole].reshape(-1, columns)


def _check_finite(rows: np.ndarray, name: str, path: Path) -> None:
    if not np.isfinite(rows).all():
        raise CheckpointError(
            "numbers that are not finite",
            where=f"{path}: {name}",
            rule="a scale is the largest magnitude of its group",
            todo="count them with inspect --verify",
        )
