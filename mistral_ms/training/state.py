"""A training's state as a checkpoint of ours, and back, bit for bit.

Weights go into ``model-*``, everything that the optimizer keeps (means, and masters of 16-bit
weights) into ``optimizer-*``, and the rest into ``state.json``. Where the optimizer lives makes no
difference: a training may go on with its state on the host that began with it on the device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mistral_ms.checkpoint import (
    open_checkpoint,
    open_tensor_set,
    read_state,
    save_native,
)
from mistral_ms.checkpoint.load import load_weights, set_values, to_numpy
from mistral_ms.config import ModelConfig
from mistral_ms.errors import CheckpointError
from mistral_ms.parallel.apply import Division
from mistral_ms.training.identity import Identity
from mistral_ms.training.loss_scale import LossScale
from mistral_ms.training.optimizer import weight_of
from mistral_ms.training.step import Progress, TrainStep

FORMAT = 1
OPTIMIZER = "optimizer"
Arrays = dict[str, tuple[np.ndarray, str]]


@dataclass(frozen=True)
class Snapshot:
    """A training at one moment, in arrays that nobody changes any more.

    Attributes:
        model: the architecture; its torch_dtype is the weights'.
        weights: values and dtype name of each weight.
        optimizer: likewise for the optimizer's state.
        state: what goes into ``state.json``.
    """

    model: ModelConfig
    weights: Arrays
    optimizer: Arrays
    state: Mapping[str, Any]

    def write(self, path: Path, files: Mapping[str, bytes]) -> None:
        """Writes the checkpoint, replacing one that is there.

        Args:
            path: its directory.
            files: what shall lie beside the weights: the tokenizer.

        Raises:
            CheckpointError: see :func:`~mistral_ms.checkpoint.save_native`.
        """
        save_native(
            path,
            self.model,
            _named(self.weights),
            {**files, "state.json": encode_state(self.state)},
            extra_tensors={OPTIMIZER: _named(self.optimizer)},
            overwrite=True,
        )


def take_snapshot(update: TrainStep, identity: Identity) -> Snapshot:
    """Copies everything that a resume of a training in one process needs.

    Args:
        update: the training.
        identity: its description.
    """

    def copied(parameter: Any) -> tuple[np.ndarray, str]:
        values, dtype = to_numpy(parameter)
        return np.array(values, copy=True), dtype

    weights = {name: copied(p) for name, p in update.model.weights().items()}
    dtype = next(iter(weights.values()))[1]
    return Snapshot(
        model=update.model.config.model_copy(update={"torch_dtype": dtype}),
        weights=weights,
        optimizer={name: copied(p) for name, p in update.optimizer.state().items()},
        state=state_values(update.progress, identity),
    )


def state_values(progress: Progress, identity: Identity) -> dict[str, Any]:
    """What goes into ``state.json``."""
    return {
        "format": FORMAT,
        "step": progress.step,
        "updates": progress.updates,
        "loss_scale": asdict(progress.scale),
        # the data position and the learning rate follow from the step, the order of the
        # samples from the seed: nothing else in a training is random
        **identity.as_dict(),
    }


def restore(update: TrainStep, path: Path, division: Division | None = None) -> None:
    """Puts a training back to where a checkpoint was taken, in whatever layout it was.

    Args:
        update: freshly made, of the same training.
        path: the checkpoint.
        division: which part of everything this process has; None: all.

    Raises:
        CheckpointError: it is damaged, not of a training, or holds another optimizer's state.
    """
    state = read_state(path)
    if state.get("format") != FORMAT:
        raise CheckpointError(
            "unknown format version",
            where=path / "state.json",
            value=state.get("format"),
            rule=f"this release reads format {FORMAT}",
        )
    window = None if division is None else division.window
    with open_checkpoint(path) as source:
        load_weights(source, update.model.weights(), window=window)
    wanted = update.optimizer.state()
    with open_tensor_set(path, OPTIMIZER) as stored:
        kept = stored.names()
        if window is not None:  # a part of the weights, and of their kinds of state all
            kinds = {name.partition(".")[0] for name in wanted}
            kept = tuple(n for n in kept if n in wanted or n.partition(".")[0] not in kinds)
        if differing := sorted(set(wanted) ^ set(kept)):
            raise CheckpointError(
                "another optimizer's state",
                where=path,
                value=differing[0],
                rule="the optimizer's tensors must be those of this training",
                todo="continue with the dtype that the training began with",
            )
        for name, parameter in wanted.items():
            shape = stored.shape(name)
            part = None if window is None else window(weight_of(name), shape)
            values = stored.read(name, part)
            if tuple(parameter.shape) != values.shape:
                raise CheckpointError(
                    "wrong shape",
                    where=f"{path}: {name}",
                    value=list(values.shape),
                    rule=f"the training has {list(parameter.shape)}",
                )
            set_values(parameter, values)
    update.optimizer.restored()
    try:
        scale = LossScale(**state["loss_scale"])
        update.progress = Progress(int(state["step"]), int(state["updates"]), scale)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            "damaged state", where=path / "state.json", value=repr(error)
        ) from error


def _named(arrays: Arrays) -> list[tuple[str, tuple[int, ...], str, np.ndarray]]:
    return [(name, array.shape, dtype, array) for name, (array, dtype) in arrays.items()]


def encode_state(values: Mapping[str, Any]) -> bytes:
    """The content of ``state.json``."""
    import json

    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
