"""Writing a checkpoint by many ranks: each its parts, at once, into one directory in the making.

1. The first rank makes the directory, a temporary sibling of the checkpoint (:func:`begin_parts`),
   and tells the others the number in its name; nobody goes on before that.
2. Every rank writes one file per set and then, when they are on the disk, a note with their sizes,
   digests and rectangles (:func:`write_part`). A rank that fails leaves a note of that instead.
3. The first rank waits for all notes, checks that they are of the same save and that the parts
   tile every tensor, writes the index, and the manifest last, and renames (:func:`finish_parts`).

Ranks meet through files only, so steps 2 and 3 may run beside a training, on other threads.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from mistral_ms.checkpoint.boxes import Box, Pieces, check_tiling, encode_index
from mistral_ms.checkpoint.config_file import encode_config
from mistral_ms.checkpoint.dtypes import FROM_CONFIG
from mistral_ms.checkpoint.file_set import FileSet, write_error
from mistral_ms.checkpoint.layout import our_shapes
from mistral_ms.checkpoint.manifest import FileRecord
from mistral_ms.checkpoint.native import Values, chunks_of
from mistral_ms.checkpoint.plan import check_shapes
from mistral_ms.checkpoint.target import TargetDirectory
from mistral_ms.checkpoint.writer import Entry, write_shard
from mistral_ms.config import ModelConfig
from mistral_ms.errors import CheckpointError
from mistral_ms.staging import staged_path

WEIGHTS = "model"
WAIT_SECONDS = 1800.0
_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Part:
    """What a rank writes of one tensor.

    Attributes:
        name: of the tensor.
        shape: of the whole.
        tensor_slice: which rectangle of it, one slice for each axis.
        dtype: on the disk: float32, float16 or bfloat16.
        values: of the rectangle's shape; see :func:`~mistral_ms.checkpoint.save_native`.
    """

    name: str
    shape: tuple[int, ...]
    tensor_slice: tuple[slice, ...]
    dtype: str
    values: Values

    @property
    def box(self) -> Box:
        """The rectangle."""
        return Box.of(self.tensor_slice)

    def entry(self) -> Entry:
        """For the file."""
        stored, size = FROM_CONFIG[self.dtype], self.box.size
        return Entry(
            self.name, size, stored, partial(chunks_of, self.name, size, stored, self.values)
        )


@dataclass(frozen=True)
class Stamp:
    """What all ranks of one save must agree on.

    Attributes:
        world: how many there are.
        layout: how the model is divided among them.
        step: of the training.
    """

    world: int
    layout: str
    step: int


def begin_parts(path: Path, overwrite: bool = True) -> TargetDirectory:
    """Makes the directory in the making, on the first rank; it is empty.

    Its ``token`` tells the other ranks its name: :func:`parts_directory`. It must be given to
    :func:`finish_parts`, or discarded.

    Raises:
        CheckpointError: it cannot be made.
        BusyError: another process writes to the same place.
    """
    return TargetDirectory(path, overwrite=overwrite, manifest=True).open()


def parts_directory(path: Path, token: int) -> Path:
    """The directory in the making of a checkpoint, on any rank that knows its token."""
    return staged_path(Path(os.path.realpath(path)), token)


def write_part(
    directory: Path, rank: int, stamp: Stamp, sets: Mapping[str, Iterable[Part]]
) -> None:
    """Writes what one rank has, after :func:`begin_parts`.

    Args:
        directory: the one in the making, see :func:`parts_directory`.
        rank: who writes.
        stamp: equal on all ranks.
        sets: its parts by the stem of their files: ``model``, ``optimizer``.

    Raises:
        CheckpointError: it cannot be written; the first rank is told.
    """
    if not directory.is_dir():
        raise CheckpointError(
            "cannot write",
            where=directory,
            value=f"rank {rank} does not see it",
            rule="the first rank has made it for all",
            todo="put the run's output on a file system that all machines share",
        )
    files = FileSet(directory, hashed=True)
    try:
        known: dict[str, dict[str, Any]] = {}
        for stem, parts in sets.items():
            held = list(parts)
            known[stem] = {part.name: _described(part) for part in held}
            if held:
                entries = [part.entry() for part in held]
                files.require_space(sum(entry.nbytes for entry in entries))
                write_shard(files, f"{stem}-rank-{rank:05d}.safetensors", entries, {"format": "ms"})
        records = {name: asdict(record) for name, record in files.records.items()}
        note = {"stamp": asdict(stamp), "files": records, "sets": known}
        _leave(directory, rank, "done", json.dumps(note))
    except BaseException as error:
        with contextlib.suppress(OSError):
            _leave(directory, rank, "failed", f"{type(error).__name__}: {error}")
        if isinstance(error, OSError):
            raise write_error(directory, error) from error
        raise


def finish_parts(
    begun: TargetDirectory,
    stamp: Stamp,
    config: ModelConfig,
    files: Mapping[str, bytes],
    *,
    wait_seconds: float = WAIT_SECONDS,
) -> None:
    """Makes a checkpoint of what all ranks have written; called by the first rank, once.

    Args:
        begun: what :func:`begin_parts` has given.
        stamp: as given to :func:`write_part`.
        config: the model.
        files: further files by name.
        wait_seconds: how long to wait for the other ranks.

    Raises:
        CheckpointError: a rank failed, wrote too late, another save, or not what was promised; or
            the parts do not tile the model. Nothing is left then, and an old checkpoint is as it
            was.
    """
    with begun:
        join_parts(begun, stamp, config, files, wait_seconds)


def join_parts(
    target: TargetDirectory,
    stamp: Stamp,
    config: ModelConfig,
    files: Mapping[str, bytes],
    wait_seconds: float = WAIT_SECONDS,
) -> None:
    """The same without giving the checkpoint its place: whoever has opened the target does that."""
    directory = target.directory
    notes = _collect(directory, stamp, time.monotonic() + wait_seconds)
    sets = _joined(notes, directory)
    weights = {name: pieces.shape for name, pieces in sets[WEIGHTS].items()}
    expected = our_shapes(config)
    check_shapes(weights, expected, directory)
    sets[WEIGHTS] = {name: sets[WEIGHTS][name] for name in expected}
    for note in notes:
        records = {name: FileRecord(**record) for name, record in note["files"].items()}
        _check_sizes(directory, records)
        target.records |= records
    for rank in range(stamp.world):
        _note(directory, rank, "done").unlink()
    target.write_json(*encode_config(config, "mistral_ms"))
    for name, content in files.items():
        target.write(name, content)
    for stem, tensors in sets.items():
        stored = (f"{stem}-rank-{rank:05d}.safetensors" for rank in range(stamp.world))
        total = sum(target.records[name].size for name in stored if name in target.records)
        target.write_json(f"{stem}.safetensors.index.json", encode_index(tensors, total))


def _described(part: Part) -> dict[str, Any]:
    box = part.box
    return {
        "shape": list(part.shape),
        "dtype": FROM_CONFIG[part.dtype],
        "start": list(box.start),
        "size": list(box.size),
    }


def _note(directory: Path, rank: int, ending: str) -> Path:
    return directory / f"rank-{rank:05d}.{ending}"


def _leave(directory: Path, rank: int, ending: str, text: str) -> None:
    """A note appears whole or not at all."""
    path = _note(directory, rank, ending)
    fresh = path.with_suffix(".new")
    fresh.write_text(text, encoding="utf-8")
    fresh.replace(path)


def _collect(directory: Path, stamp: Stamp, deadline: float) -> list[dict[str, Any]]:
    """The notes of all ranks, in their order."""
    missing = set(range(stamp.world))
    while missing:
        for rank in sorted(missing):
            if (failed := _note(directory, rank, "failed")).exists():
                raise CheckpointError(
                    "a rank could not save",
                    where=f"rank {rank}",
                    value=failed.read_text(encoding="utf-8"),
                    rule="a checkpoint is of all ranks or none; older ones are untouched",
                )
            if _note(directory, rank, "done").exists():
                missing.discard(rank)
        if missing and time.monotonic() > deadline:
            raise CheckpointError(
                "a rank has not saved",
                where=directory,
                value=f"nothing from rank {', '.join(map(str, sorted(missing)[:8]))}",
                rule="a checkpoint is of all ranks or none; older ones are untouched",
                todo="look into that rank's log",
            )
        if missing:
            time.sleep(_POLL_SECONDS)
    notes = [
        json.loads(_note(directory, rank, "done").read_text(encoding="utf-8"))
        for rank in range(stamp.world)
    ]
    for rank, note in enumerate(notes):
        if note["stamp"] != asdict(stamp):
            key = next(k for k, value in asdict(stamp).items() if note["stamp"].get(k) != value)
            raise CheckpointError(
                "ranks disagree",
                where=f"{directory}: {key}",
                value=f"rank {rank} says {note['stamp'].get(key)!r}",
                rule=f"rank 0 says {asdict(stamp)[key]!r}",
                todo="start all ranks with the same run file and overrides",
            )
    return notes


def _joined(notes: list[dict[str, Any]], where: Path) -> dict[str, dict[str, Pieces]]:
    """All ranks' parts of every tensor, checked to tile it."""
    sets: dict[str, dict[str, Pieces]] = {}
    for rank, note in enumerate(notes):
        for stem, parts in note["sets"].items():
            tensors = sets.setdefault(stem, {})
            for name, part in parts.items():
                piece = (
                    f"{stem}-rank-{rank:05d}.safetensors",
                    Box(tuple(part["start"]), tuple(part["size"])),
                )
                shape, dtype = tuple(part["shape"]), part["dtype"]
                before = tensors.get(name, Pieces(shape, dtype, ()))
                if (before.shape, before.dtype) != (shape, dtype):
                    raise CheckpointError(
                        "ranks disagree",
                        where=f"{where}: {name}",
                        value=f"rank {rank} says {dtype} {list(shape)}",
                        rule=f"others say {before.dtype} {list(before.shape)}",
                        todo="start all ranks with the same run file and overrides",
                    )
                tensors[name] = Pieces(shape, dtype, (*before.boxes, piece))
    for tensors in sets.values():
        for name, pieces in tensors.items():
            check_tiling(name, pieces, where)
    return sets


def _check_sizes(directory: Path, records: Mapping[str, FileRecord]) -> None:
    for name, record in records.items():
        path = directory / name
        size = path.stat().st_size if path.exists() else None
        if size != record.size:
            raise CheckpointError(
                "missing file" if size is None else "truncated file",
                where=path,
                value=None if size is None else f"{size} bytes",
                rule=f"its rank wrote {record.size} bytes",
                todo="check the file system",
            )
