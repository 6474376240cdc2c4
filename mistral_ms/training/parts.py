"""A training of many processes as a checkpoint: each process copies and writes its own part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mistral_ms.checkpoint import BackgroundWriter, CheckpointSeries
from mistral_ms.checkpoint.load import dtype_name, to_numpy
from mistral_ms.checkpoint.parts_writer import (
    Part,
    Stamp,
    begin_parts,
    finish_parts,
    parts_directory,
    write_part,
)
from mistral_ms.checkpoint.target import TargetDirectory
from mistral_ms.config import ModelConfig
from mistral_ms.errors import CheckpointError, MistralMsError
from mistral_ms.parallel.context import ParallelContext
from mistral_ms.training.identity import Identity
from mistral_ms.training.optimizer import weight_of
from mistral_ms.training.state import OPTIMIZER, encode_state, state_values
from mistral_ms.training.step import Update


@dataclass(frozen=True)
class PartSnapshot:
    """One process's part of a training at one moment, in arrays that nobody changes any more.

    Attributes:
        rank: the process.
        stamp: equal on all processes.
        model: the architecture; its torch_dtype is the weights'.
        sets: weights and optimizer's state that this process writes.
        state: what goes into ``state.json``.
    """

    rank: int
    stamp: Stamp
    model: ModelConfig
    sets: Mapping[str, tuple[Part, ...]]
    state: Mapping[str, Any]

    def write(self, directory: Path) -> None:
        """Writes this part into the checkpoint in the making."""
        write_part(directory, self.rank, self.stamp, self.sets)

    def finish(self, begun: TargetDirectory, files: Mapping[str, bytes]) -> None:
        """Makes the checkpoint, on the first rank, of what all have written."""
        finish_parts(
            begun, self.stamp, self.model, {**files, "state.json": encode_state(self.state)}
        )


def take_part(
    update: Update, identity: Identity, parallel_context: ParallelContext
) -> PartSnapshot:
    """Copies what this process shall write; no process asks another one for anything."""
    weights, storage = update.held(), update.storage
    shapes = {name: storage.whole(name) for name in weights}
    mine = storage.written(weights)

    def _copied(name: str, weight: str, parameter: Any) -> Part:
        values, dtype = to_numpy(parameter)
        values = np.array(storage.from_parameter(weight, values), copy=True, order="C")
        return Part(name, shapes[weight], storage.local_slice(weight), dtype, values)

    def parts() -> Iterator[Part]:
        for name, parameter in update.state().items():
            weight = weight_of(name)
            if storage.writes_state(weight, mine):
                yield _copied(name, weight, parameter)

    dtype = dtype_name(next(iter(weights.values())).dtype)
    return PartSnapshot(
        rank=parallel_context.rank,
        stamp=Stamp(
            parallel_context.world, str(parallel_context.parallel.sizes), update.progress.step
        ),
        model=update.architecture.model_copy(update={"torch_dtype": dtype}),
        sets={
            "model": tuple(_copied(name, name, weights[name]) for name in weights if name in mine),
            **({OPTIMIZER: tuple(parts())} if update.state_kinds() else {}),
        },
        state=state_values(update.progress, identity),
    )


def save_parts(
    snapshot: PartSnapshot,
    series: CheckpointSeries,
    files: Mapping[str, bytes],
    parallel_context: ParallelContext,
    writer: BackgroundWriter,
) -> None:
    """Starts to write a checkpoint of all processes; all of them must call this.

    They meet here, on the thread of the training: collective operations are not safe on another.
    The rest runs in the background.

    Raises:
        BusyError: another process writes the same checkpoint.
        CheckpointError: the save before failed, here or elsewhere.
    """
    step = snapshot.stamp.step
    path, failure, begun = series.path(step), None, None
    try:
        writer.wait()
        if parallel_context.is_rank_0:
            begun = begin_parts(path)
    except MistralMsError as error:
        failure = error
    if parallel_context.any_rank(failure is not None):
        if begun is not None:
            begun.discard()
        raise failure or CheckpointError(
            "another rank could not save", where=path, todo="look into the other ranks' logs"
        )

    token = parallel_context.broadcast(0 if begun is None else begun.token)

    def save() -> None:
        try:
            snapshot.write(parts_directory(path, token))
            if begun is not None:
                series.save(step, lambda place: snapshot.finish(begun, files))
        finally:
            if begun is not None:
                begun.discard()

    writer.submit(save)
