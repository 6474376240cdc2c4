"""Saves a model that is in memory as a checkpoint of ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np

from mistral_ms.checkpoint.config_file import encode_config
from mistral_ms.checkpoint.dtypes import FROM_CONFIG, WEIGHT_DTYPES, cast
from mistral_ms.checkpoint.files import side_files
from mistral_ms.checkpoint.layout import our_shapes
from mistral_ms.checkpoint.stream import CHUNK_BYTES, Workspace
from mistral_ms.checkpoint.target import TargetDirectory
from mistral_ms.checkpoint.writer import MAX_SHARD_BYTES, Entry, Progress, write_tensors
from mistral_ms.config import ModelConfig
from mistral_ms.errors import CheckpointError

Values = np.ndarray | Callable[[], np.ndarray]
NamedTensor = tuple[str, tuple[int, ...], str, Values]

_STORED = {dtype: name for name, dtype in WEIGHT_DTYPES.items()}


def save_native(
    path: Path,
    config: ModelConfig,
    tensors: Iterable[NamedTensor],
    extra_files: Mapping[str, bytes | Path] | None = None,
    *,
    extra_tensors: Mapping[str, Iterable[NamedTensor]] | None = None,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
) -> None:
    """Writes a checkpoint of ours: all of it, or nothing.

    Args:
        path: the new checkpoint's directory.
        config: the model.
        tensors: for each of our tensors its name, shape, dtype on disk (``float32``, ``float16``,
            ``bfloat16``) and values: an array, or a function that makes it when its turn comes.
            Arrays are float32 or float16 (rounded to the dtype when that differs), or bfloat16
            bits as uint16.
        extra_files: further files by name: bytes, or a file to copy (tokenizers, ``state.json``).
        extra_tensors: further sets of tensors by the stem of their files (``optimizer``); their
            names and shapes are free.
        overwrite: replace a checkpoint that is at ``path``.
        max_shard_bytes: how large a file of weights may grow.
        progress: called with the bytes written and their total, per set.

    Raises:
        CheckpointError: tensors that are not exactly the model's, values that their dtype cannot
            hold, a full disk, or a target that may not be replaced.
    """
    weights = _check_complete(config, [_entry(*tensor) for tensor in tensors])
    groups = {"model": weights}
    for stem, extra in (extra_tensors or {}).items():
        groups[stem] = [_entry(*tensor) for tensor in extra]
        if not groups[stem]:
            raise CheckpointError(
                "no tensors", where=path, value=stem, rule="a further set has at least one"
            )
    with TargetDirectory(path, overwrite=overwrite, manifest=True) as target:
        target.write_json(*encode_config(config, "mistral_ms"))
        for name, content in (extra_files or {}).items():
            if isinstance(content, Path):
                target.copy(content, name)
            else:
                target.write(name, content)
        for stem, entries in groups.items():
            # One worker: the functions that make the values need not be safe to call in parallel.
            write_tensors(
                target,
                entries,
                stem=stem,
                metadata={"format": "ms"},
                max_shard_bytes=max_shard_bytes,
                workers=1,
                progress=progress,
            )


def tokenizer_files(directory: Path, follow_links: bool = False) -> dict[str, bytes | Path]:
    """The files of a checkpoint that are carried along, as ``extra_files`` of a new one."""
    return {path.name: path for path in side_files(directory, follow_links)}


def _entry(name: str, shape: tuple[int, ...], dtype: str, values: Values) -> Entry:
    if dtype not in FROM_CONFIG:
        raise CheckpointError(
            "unknown dtype",
            where=name,
            value=repr(dtype),
            rule=f"must be one of {', '.join(FROM_CONFIG)}",
        )
    stored, shape = FROM_CONFIG[dtype], tuple(int(length) for length in shape)
    return Entry(name, shape, stored, partial(chunks_of, name, shape, stored, values))


def _check_complete(config: ModelConfig, entries: list[Entry]) -> list[Entry]:
    """Checks names and shapes against the model; returns the entries in the model's order."""
    expected = our_shapes(config)
    given = {entry.name: entry for entry in entries}
    problems = {
        "missing tensor": [name for name in expected if name not in given],
        "extra tensor": [name for name in given if name not in expected],
        "tensor given twice": [e.name for e in entries if given[e.name] is not e],
        "wrong shape": [n for n, s in expected.items() if n in given and given[n].shape != s],
    }
    for what, names in problems.items():
        if names:
            name = names[0]
            found = given[name].shape if name in given else None
            raise CheckpointError(
                what,
                where=name,
                value=None if found is None else list(found),
                rule=f"the model has {list(expected[name])} there"
                if name in expected
                else "the model has no such tensor",
            )
    return [given[name] for name in expected]


def chunks_of(
    name: str, shape: tuple[int, ...], stored: str, values: Values, workspace: Workspace
) -> Iterator[np.ndarray]:
    """The elements of a tensor in memory, rounded to the dtype on disk, for an ``Entry``."""
    array = values() if callable(values) else values
    if array.shape != shape or array.dtype not in _STORED:
        raise CheckpointError(
            "wrong values",
            where=name,
            value=f"{array.dtype} {list(array.shape)}",
            rule=f"must be float32, float16 or uint16 (bfloat16 bits) of shape {list(shape)}",
        )
    source = _STORED[array.dtype]
    flat = np.ascontiguousarray(array).reshape(-1)
    step = CHUNK_BYTES // flat.dtype.itemsize
    for start in range(0, flat.size, step):
        chunk = flat[start : start + step]
        if source != stored:
            out = workspace.array("cast", chunk.size, WEIGHT_DTYPES[stored])
            if overflowed := cast(chunk, source, stored, out):
                raise CheckpointError(
                    "overflow", where=name, value=f"{overflowed} values", rule=f"must fit {stored}"
                )
            chunk = out
        yield chunk
