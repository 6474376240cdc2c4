"""A checkpoint rewritten as data: each tensor of the new one is rows of the old one, or values."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np

from mistral_ms.checkpoint import Source, our_shapes
from mistral_ms.checkpoint.config_file import encode_config
from mistral_ms.checkpoint.dtypes import FROM_CONFIG
from mistral_ms.checkpoint.native import chunks_of
from mistral_ms.checkpoint.stream import CHUNK_BYTES, Workspace
from mistral_ms.checkpoint.target import TargetDirectory
from mistral_ms.checkpoint.writer import Entry, Progress, write_tensors
from mistral_ms.config import ModelConfig
from mistral_ms.errors import CheckpointError


@dataclass(frozen=True)
class Rows:
    """Rows ``first`` to ``last`` - 1 along the first axis of one of the source's tensors."""

    name: str
    first: int
    last: int


Part: TypeAlias = Rows | np.ndarray
"""A piece of a tensor: rows that are read when their turn comes, or float32 values."""


def rewrite(
    source: Source,
    dst: Path,
    config: ModelConfig,
    tensors: Mapping[str, Sequence[Part]],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> int:
    """Writes a checkpoint of ours from an open one, a megabyte of rows at a time.

    Args:
        source: what is read; its tokenizer files are carried along.
        dst: the new checkpoint's directory; it appears when it is whole.
        config: the new model.
        tensors: of those that are not as they were: their parts, whose elements follow each other.
            All others are copied bit by bit. A tensor has the dtype of its first rows; what is made
            of values alone is float32.
        overwrite: replace a checkpoint that is at ``dst``.
        progress: called with the bytes written and their total.

    Returns:
        Bytes of all tensors.

    Raises:
        CheckpointError: a tensor of the new model with other parts than its shape takes; or
            whatever reading and writing raise.
    """
    shapes, entries = our_shapes(config), []
    known = set(source.names())
    for name, shape in shapes.items():
        parts = tensors.get(name)
        if parts is None:
            if name not in known:
                raise CheckpointError("missing tensor", where=name, rule="the source has none")
            parts = [Rows(name, 0, source.shape(name)[0])]
        entries.append(_entry(source, name, shape, parts))
    with TargetDirectory(dst, overwrite=overwrite, manifest=True) as target:
        target.write_json(*encode_config(config, "mistral_ms"))
        for file in source.side_files:
            target.copy(file)
        write_tensors(target, entries, metadata={"format": "ms"}, workers=1, progress=progress)
        source.verify()  # before the target gets its name
    return sum(entry.nbytes for entry in entries)


def _entry(source: Source, name: str, shape: tuple[int, ...], parts: Sequence[Part]) -> Entry:
    sizes = [_size(source, part) for part in parts]
    if sum(sizes) != math.prod(shape):
        raise CheckpointError(
            "wrong size",
            where=name,
            value=f"{sum(sizes)} elements",
            rule=f"the new model has {list(shape)} there",
        )
    dtype = next((source.dtype(p.name) for p in parts if isinstance(p, Rows)), "float32")
    return Entry(name, shape, FROM_CONFIG[dtype], partial(_chunks, source, name, dtype, parts))


def _size(source: Source, part: Part) -> int:
    if isinstance(part, Rows):
        return (part.last - part.first) * math.prod(source.shape(part.name)[1:])
    return part.size


def _chunks(
    source: Source, name: str, dtype: str, parts: Sequence[Part], workspace: Workspace
) -> Iterator[np.ndarray]:
    stored = FROM_CONFIG[dtype]
    for part in parts:
        if not isinstance(part, Rows):
            yield from chunks_of(name, part.shape, stored, part, workspace)
            continue
        row = max(1, math.prod(source.shape(part.name)[1:]))
        step = max(1, CHUNK_BYTES // (4 * row))
        for first in range(part.first, part.last, step):
            rows = first, min(first + step, part.last)
            yield source.read(part.name, dtype, rows).reshape(-1)
