"""A training's state as a checkpoint of ours, and back, bit for bit.

Weights go into ``model-*``, everything that the optimizer keeps (its state, and masters of 16-bit
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
from mistral_ms.training.identity import Identity
from mistral_ms.training.loss_scale import LossScale
from mistral_ms.training.optimizer import weight_of
from mistral_ms.training.step import Progress, Update

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
            extra_tensors={OPTIMIZER: _named(self.optimizer)} if self.optimizer else {},
            overwrite=True,
        )


def take_snapshot(update: Update, identity: Identity) -> Snapshot:
    """Copies everything that a resume of a training in one process needs.

    Args:
        update: the training.
        identity: its description.
    """

    def copied(weight: str, parameter: Any) -> tuple[np.ndarray, str]:
        values, dtype = to_numpy(parameter)
        return np.array(update.storage.from_parameter(weight, values), copy=True, order="C"), dtype

    weights = {name: copied(name, p) for name, p in update.held().items()}
    dtype = next(iter(weights.values()))[1]
    return Snapshot(
        model=update.architecture.model_copy(update={"torch_dtype": dtype}),
        weights=weights,
        optimizer={name: copied(weight_of(name), p) for name, p in update.state().items()},
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


def restore(update: Update, path: Path) -> None:
    """Puts a training back to where a checkpoint was taken, in whatever layout it was.

    Args:
        update: freshly made, of the same training; its storage says which part of everything this
            process has.
        path: the checkpoint.

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
    _check_optimizer(update, state, path)
    storage = update.storage
    # whoever chose the checkpoint has read every byte of it: CheckpointSeries.newest
    with open_checkpoint(path, "mistral_ms", verify=False, adapters=True) as source:
        load_weights(source, update.held(), storage=storage)
    if update.state_kinds() or any(path.glob(f"{OPTIMIZER}*")):  # SGD may have none
        _restore_optimizer(update, path)
    update.restored()
    try:
        scale = LossScale(**state["loss_scale"])
        update.progress = Progress(int(state["step"]), int(state["updates"]), scale)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            "damaged state", where=path / "state.json", value=repr(error)
        ) from error


def _restore_optimizer(update: Update, path: Path) -> None:
    """Sets the optimizer's state; raises where the checkpoint has that of another one."""
    storage = update.storage
    wanted = update.state()
    with open_tensor_set(path, OPTIMIZER) as stored:
        kept = stored.names()
        if not storage.holds_everything:  # a part of the weights, and of their kinds of state all
            kinds = update.state_kinds()
            kept = tuple(n for n in kept if n in wanted or n.partition(".")[0] not in kinds)
        if differing := sorted(set(wanted) ^ set(kept)):
            raise CheckpointError(
                "another optimizer's state",
                where=path,
                value=differing[0],
                rule="the optimizer's tensors must be those of this training",
                todo="continue with the dtype, optimizer and frozen weights that it began with",
            )
        for name, parameter in wanted.items():
            weight, shape = weight_of(name), stored.shape(name)
            if shape != storage.whole(weight):
                raise CheckpointError(
                    "wrong shape",
                    where=f"{path}: {name}",
                    value=list(shape),
                    rule=f"the training has {list(storage.whole(weight))}",
                )
            part = None if storage.holds_everything else storage.local_slice(weight)
            values = storage.to_parameter(weight, stored.read(name, part))
            set_values(parameter, values)


def _check_optimizer(update: Update, state: Mapping[str, Any], path: Path) -> None:
    """Raises for a checkpoint of another optimizer; two may keep state of the same names."""
    training = state.get("training")
    then = (training or {}).get("optimizer", {}).get("name")
    now = update.config.optimizer.name
    if then is not None and then != now:
        raise CheckpointError(
            "another optimizer's state",
            where=path,
            value=f"now {now!r}, in the checkpoint {then!r}",
            rule="a training goes on with the optimizer that it began with",
            todo=f"set training.optimizer.name={then}, or start a new run with init_from",
        )


def _named(arrays: Arrays) -> list[tuple[str, tuple[int, ...], str, np.ndarray]]:
    return [(name, array.shape, dtype, array) for name, (array, dtype) in arrays.items()]


def encode_state(values: Mapping[str, Any]) -> bytes:
    """The content of ``state.json``."""
    import json

    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
