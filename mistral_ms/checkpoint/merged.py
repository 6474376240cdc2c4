"""A checkpoint with an adapter added to its weights while they are read.

Whoever reads it, a conversion, generation or a training, sees a whole model of the same names:
W + s B A, and with decomposed weights m / |W + s B A| times that, in float32, rounded once. One
matrix, of one expert, is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mistral_ms.checkpoint.adapters import open_adapter
from mistral_ms.checkpoint.dtypes import TO_CONFIG, WEIGHT_DTYPES, cast
from mistral_ms.checkpoint.keys import Layout
from mistral_ms.checkpoint.layout import Block
from mistral_ms.checkpoint.plan import Assembly
from mistral_ms.checkpoint.source import Source, open_checkpoint
from mistral_ms.checkpoint.stream import Workspace, reordered, stream
from mistral_ms.errors import CheckpointError
from mistral_ms.weights import MAGNITUDE, A, B, specs


class MergedSource(Source):
    """A base model and an adapter of it, which it closes.

    Args:
        base: the model.
        adapter: see :func:`~mistral_ms.checkpoint.adapters.open_adapter`.
    """

    def __init__(self, base: Source, adapter: Source) -> None:
        super().__init__(
            base.path,
            base.kind,
            base.config,
            base.layout,
            base.store,
            base.ignored_keys,
            base.skipped,
        )
        self._base, self._adapter = base, adapter
        self.side_files = base.side_files
        assert adapter.config.lora is not None
        self._scaling = adapter.config.lora.scaling
        self._paths = {
            spec.adapts: spec.name.rpartition(".")[0]
            for spec in specs(adapter.config)
            if spec.adapts
        }

    def remark(self, kept: bool = False) -> str | None:
        """See the base class, of the base model; with an adapter no weight stays quantised."""
        return self._base.remark()

    def verify(self) -> None:
        """See the base class, of both."""
        self._base.verify()
        self._adapter.verify()

    def close(self) -> None:
        """Lets the files of both go."""
        self._base.close()
        self._adapter.close()

    def read_slice(
        self, name: str, tensor_slice: tuple[slice, ...], dtype: str = "float32"
    ) -> np.ndarray:
        """See the base class."""
        if name not in self._paths:
            return super().read_slice(name, tensor_slice, dtype)
        rows = tensor_slice[0]
        values = self.read(name, dtype, (rows.start, rows.stop))
        rest = (slice(None), *tensor_slice[1:])
        return np.ascontiguousarray(values[rest])

    def stream(
        self,
        assembly: Assembly,
        dtype: str,
        workspace: Workspace,
        span: tuple[int, int] | None = None,
    ) -> Iterator[np.ndarray]:
        """See the base class."""
        first, last = span or (0, assembly.size)
        for piece in assembly.pieces:
            begin, end = piece.target_start, piece.target_start + piece.block.size
            if begin >= last or end <= first:
                continue
            if piece.block.name not in self._paths:
                alone = Assembly(assembly.name, assembly.shape, (piece,))
                yield from stream(self.store, alone, dtype, workspace, (first, last))
                continue
            values = _laid_out(self._merged(piece.block), piece.block, piece.target_layout)
            wanted = values[max(first - begin, 0) : max(last - begin, 0)]
            if dtype != "F32":
                out = np.empty(wanted.size, WEIGHT_DTYPES[dtype])
                if overflowed := cast(wanted, "F32", dtype, out):
                    raise CheckpointError(
                        "overflow",
                        where=f"{self.path}: {assembly.name}",
                        value=f"{overflowed} values of weights and adapter",
                        rule=f"must fit {TO_CONFIG[dtype]}",
                    )
                wanted = out
            yield wanted

    def _merged(self, block: Block) -> np.ndarray:
        """One matrix with its adapter, float32, as ours lie."""
        whole = block.expert is None
        rows = None if block.expert is None else (block.expert, block.expert + 1)

        def read(source: Source, name: str) -> np.ndarray:
            found = source.read(name, "float32", rows)
            return found if whole else found[0]

        path = self._paths[block.name]
        a, b = read(self._adapter, f"{path}.{A}"), read(self._adapter, f"{path}.{B}")
        decomposed = f"{path}.{MAGNITUDE}" in self._adapter.names()
        magnitude = read(self._adapter, f"{path}.{MAGNITUDE}") if decomposed else None
        return merged(read(self._base, block.name), a, b, self._scaling, magnitude)


def merged(
    weight: np.ndarray, a: np.ndarray, b: np.ndarray, scaling: float, magnitude: np.ndarray | None
) -> np.ndarray:
    """A matrix, or the stacked ones of experts, with its adapter; see
    :class:`~mistral_ms.config.LoraConfig`.

    Args:
        weight: float32 [..., O, I], which is changed.
        a: A, [..., r, I].
        b: B, [..., O, r].
        scaling: s.
        magnitude: [..., O] where weights are decomposed.
    """
    weight += np.float32(scaling) * (b @ a)
    if magnitude is not None:
        weight *= (magnitude / np.linalg.norm(weight, axis=-1))[..., None]
    return weight


def merge_into(
    weight: Callable[[str], np.ndarray], adapter: Source
) -> Iterator[tuple[str, np.ndarray]]:
    """The matrices of a model that an adapter changes, with it.

    Args:
        weight: gives a copy of one of the model's, float32, by its name.
        adapter: see :func:`~mistral_ms.checkpoint.adapters.open_adapter`.
    """
    assert adapter.config.lora is not None
    for spec in specs(adapter.config):
        path, _, last = spec.name.rpartition(".")
        if spec.adapts and last == A:
            names = f"{path}.{B}", f"{path}.{MAGNITUDE}"
            magnitude = adapter.read(names[1]) if names[1] in adapter.names() else None
            values, scaling = weight(spec.adapts), adapter.config.lora.scaling
            a, b = adapter.read(spec.name), adapter.read(names[0])
            yield spec.adapts, merged(values, a, b, scaling, magnitude)


def _laid_out(values: np.ndarray, block: Block, layout: Layout) -> np.ndarray:
    """The elements of a matrix of ours in the order of another layout."""
    if layout == "transposed":
        return np.ascontiguousarray(values.T).reshape(-1)
    if layout == "interleaved":
        return reordered(values, block.heads).reshape(-1)
    return values.reshape(-1)


def open_merged(
    path: Path, kind: str | None = None, *, adapter: Path | None = None, **opening: Any
) -> Source:
    """Opens a checkpoint, with an adapter added to its weights if there is one.

    Args:
        path: the checkpoint's directory.
        kind: which format to take when the directory holds several.
        adapter: the adapter's directory; None: there is none.
        opening: see :func:`~mistral_ms.checkpoint.open_checkpoint`.

    Raises:
        CheckpointError: anything that is wrong with either.
        ConfigError: an adapter of another kind or of another model.
    """
    source = open_checkpoint(path, kind, **opening)
    if adapter is None:
        return source
    try:
        wanted = {key: opening[key] for key in ("verify", "follow_links") if key in opening}
        return MergedSource(source, open_adapter(adapter, source.config, **wanted))
    except BaseException:
        source.close()
        raise
