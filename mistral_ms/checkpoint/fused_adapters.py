"""PEFT's files of adapters beside the classes of transformers 5, read as those of version 4.

The adapters of all E experts are one: A [E r, I] is theirs one after the other, and in B [O, r E]
the expert's number runs fastest. An adapter of ``gate_up_proj`` has A in common for ``w1`` and
``w3``; its B has the rows of ``w1``, then those of ``w3``. Two adapters of one module's parameters
are nested, so that the first, ``gate_up_proj``, is called ``base_layer``. Source: ``ParamWrapper``
of PEFT 0.21, and what it writes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mistral_ms.checkpoint.dtypes import WEIGHT_DTYPES
from mistral_ms.checkpoint.plan import check_tensors
from mistral_ms.checkpoint.safetensors_file import Observer, TensorInfo
from mistral_ms.checkpoint.stream import Store
from mistral_ms.config.peft_fused import Fused

_NAME = re.compile(
    r"(?P<block>.*)\.block_sparse_moe\."
    r"(?:experts\.(?P<expert>\d+)\.(?P<matrix>w[123])|gate)\.(?P<factor>lora_[AB]\.weight)"
)


@dataclass(frozen=True)
class _Part:
    """What of a tensor in the file is one of version 4.

    Attributes:
        name: of the tensor in the file.
        shape: of the tensor in the file.
        is_a: it is an A, not a B.
        rank: of the adapter in the file.
        expert: whose.
        rows: of B: the first, and the one behind the last.
    """

    name: str
    shape: tuple[int, ...]
    is_a: bool
    rank: int
    expert: int = 0
    rows: tuple[int, int] = (0, 0)

    def of(self, whole: np.ndarray) -> np.ndarray:
        """The rows of A, or the columns of B, of one expert."""
        if self.is_a:
            return whole[self.expert * self.rank : (self.expert + 1) * self.rank]
        first, last = self.rows
        return whole[first:last].reshape(last - first, self.rank, -1)[:, :, self.expert]


class FusedStore:
    """The tensors of transformers 4's names in a file with those of version 5.

    An adapter whose rank is below the configuration's has zeros for the rest.

    Args:
        file: the file.
        shapes: of the tensors that are asked for, by their names in version 4.
        fused: what the configuration says of the file.
        where: the adapter's directory, for messages.

    Raises:
        CheckpointError: a tensor of version 5 that is missing or has another shape, or one that
            belongs to no matrix.
    """

    def __init__(
        self, file: Store, shapes: Mapping[str, tuple[int, ...]], fused: Fused, where: Path
    ) -> None:
        self._file = file
        self._parts = _parts(shapes, fused)
        asked = {part.name: part.shape for part in self._parts.values()}
        check_tensors(file.tensors, asked, where)
        self.tensors: dict[str, TensorInfo] = {
            name: replace(file.tensors[part.name], shape=shapes[name])
            for name, part in self._parts.items()
        }

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """Fills ``out`` with elements from ``start`` on, in memory order."""
        out[...] = self.flat(name, start, start + out.size)

    def flat(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements ``start`` to ``stop`` in memory order."""
        part, info = self._parts[name], self._file.tensors[self._parts[name].name]
        found = part.of(self._file.flat(part.name, 0, info.size).reshape(info.shape))
        values = np.zeros(self.tensors[name].shape, WEIGHT_DTYPES[info.dtype])
        values[: found.shape[0], : found.shape[1]] = found
        return values.reshape(-1)[start:stop]

    def observe(self, observer: Observer) -> None:
        """Has an observer told of the bytes that are read in order: none, all are regrouped."""

    def close(self) -> None:
        """Lets the file go."""
        self._file.close()


def _parts(shapes: Mapping[str, tuple[int, ...]], fused: Fused) -> dict[str, _Part]:
    """Where each tensor of version 4 is."""
    found = {name: _NAME.fullmatch(name) for name in shapes}
    matrices = {(m["block"], m["matrix"]) for m in found.values() if m is not None}
    experts = 1 + max((int(m["expert"] or 0) for m in found.values() if m is not None), default=0)
    parts = {}
    for name, match in found.items():
        is_a = name.endswith("lora_A.weight")
        rank, columns, rows = fused.rank, shapes[name][1], shapes[name][0]
        if match is None or match["expert"] is None:
            theirs = name.replace(".block_sparse_moe.", ".mlp.")
            shape = (rank, columns) if is_a else (rows, rank)
            parts[name] = _Part(theirs, shape, is_a, rank, rows=(0, rows))
            continue
        block, matrix, expert = match["block"], match["matrix"], int(match["expert"])
        both = matrix != "w2"
        inner = "base_layer." if both and (block, "w2") in matrices else ""
        theirs = f"{block}.mlp.experts.{inner}{match['factor']}"
        if both:
            rank = fused.gate_up_rank
        shape = (experts * rank, columns) if is_a else (rows * (1 + both), rank * experts)
        first = rows if matrix == "w3" else 0
        parts[name] = _Part(theirs, shape, is_a, rank, expert, (first, first + rows))
    return parts
