"""Further sets of tensors of our checkpoints, beside the weights: the state of an optimizer."""

from __future__ import annotations

import re
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from mistral_ms.checkpoint.boxes import Box
from mistral_ms.checkpoint.detect import WeightFiles
from mistral_ms.checkpoint.dtypes import WEIGHT_DTYPES
from mistral_ms.checkpoint.files import read_json
from mistral_ms.checkpoint.manifest import read_manifest
from mistral_ms.checkpoint.parts_store import read_box
from mistral_ms.checkpoint.shards import open_weights
from mistral_ms.checkpoint.stream import Store
from mistral_ms.errors import CheckpointError

STATE = "state.json"


class TensorSet:
    """An open set of tensors; a context manager.

    Attributes:
        path: the checkpoint's directory.
    """

    def __init__(self, path: Path, store: Store) -> None:
        self.path, self._store = path, store

    def __enter__(self) -> TensorSet:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._store.close()

    def names(self) -> tuple[str, ...]:
        """Names of all tensors."""
        return tuple(self._store.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one of them."""
        return self._store.tensors[name].shape

    def read(self, name: str, tensor_slice: tuple[slice, ...] | None = None) -> np.ndarray:
        """The values of one of them, in a new array; bfloat16 as bits in uint16.

        Args:
            name: its name.
            tensor_slice: the part that is wanted, one slice with plain bounds for each axis.
        """
        if tensor_slice is not None:
            return read_box(self._store, name, Box.of(tensor_slice))
        info = self._store.tensors[name]
        values = np.empty(info.size, WEIGHT_DTYPES[info.dtype])
        self._store.read_into(name, 0, values)
        return values.reshape(info.shape)


def open_tensor_set(path: Path, stem: str) -> TensorSet:
    """Opens a set by the stem of its files, such as ``optimizer``.

    Args:
        path: the directory of one of our checkpoints.
        stem: what the files are called before ``-00001-of-00001.safetensors``.

    Raises:
        CheckpointError: no such set, or the same findings as
            :func:`~mistral_ms.checkpoint.open_checkpoint` has on weights.
    """
    path = Path(path)
    records = read_manifest(path)
    pattern = re.compile(rf"{re.escape(stem)}-(\d+-of|rank)-\d+\.safetensors")
    files = tuple(sorted(entry for entry in path.iterdir() if pattern.fullmatch(entry.name)))
    index = path / f"{stem}.safetensors.index.json"
    if not files or not index.is_file():
        raise CheckpointError(
            "no such tensors",
            where=path,
            value=f"{stem}-*.safetensors",
            rule="only checkpoints of a training have them",
            todo="to train from weights alone, name them with init_from",
        )
    if stray := [file for file in (*files, index) if file.name not in records]:
        raise CheckpointError("extra shard", where=stray[0], rule="the manifest does not list it")
    weights = WeightFiles("mistral_ms", "safetensors", stem, files, index)
    return TensorSet(path, open_weights(path, weights))


def read_state(path: Path) -> dict[str, Any]:
    """The content of a training checkpoint's ``state.json``.

    Raises:
        CheckpointError: the checkpoint is incomplete or not of a training, or the file is damaged.
    """
    read_manifest(Path(path))
    if not (Path(path) / STATE).is_file():
        raise CheckpointError(
            "not a checkpoint of a training",
            where=path,
            value=f"no {STATE}",
            rule="a training goes on from one that it wrote",
            todo="to train from weights alone, name them with init_from",
        )
    return read_json(Path(path) / STATE)
