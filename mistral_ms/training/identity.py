"""What makes two trainings the same one: a resume with anything else is refused, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mistral_ms.config import DpoConfig, ModelConfig, ParallelConfig, RoutingConfig, TrainingConfig
from mistral_ms.config.computation import computation
from mistral_ms.errors import TrainingError

FIXED = ("seed", "seq_length", "global_batch_size", "dtype", "optimizer.name")
"""Of the training: to change one would be another training under the old one's name."""


@dataclass(frozen=True)
class Identity:
    """A training as its checkpoints describe it.

    Attributes:
        model: the architecture.
        routing: the routing policy.
        training: the training, its epochs counted out.
        parallel: the layout; another one goes on exactly only if its dispatch groups are the same.
            Its ``execution`` is the one that was taken, not ``auto``.
        dataset: a digest of the sequences.
        dpo: how preferences are learnt; None of other trainings.
    """

    model: ModelConfig
    routing: RoutingConfig
    training: TrainingConfig
    parallel: ParallelConfig
    dataset: str
    dpo: DpoConfig | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain data for ``state.json``."""
        dpo = {} if self.dpo is None else {"dpo": self.dpo.model_dump(mode="json")}
        return dpo | {
            "dataset": self.dataset,
            "model": computation(self.model),
            "training": self.training.model_dump(mode="json"),
            "routing": self.routing.model_dump(mode="json"),
            "parallel": self.parallel.model_dump(mode="json"),
        }

    def compare(self, state: Mapping[str, Any], where: object) -> list[str]:
        """Checks that ``state`` is of this training.

        Args:
            state: the content of a ``state.json``.
            where: its checkpoint, for the message.

        Returns:
            What has changed that may change, a line each: the rest of the run is not what the
            same command would have given from the start.

        Raises:
            TrainingError: another model, dataset, seed, batch, dtype, optimizer or loss of
                preferences.
        """
        ours = _flat(self.as_dict())
        theirs = _flat({key: state.get(key, {}) for key in self.as_dict()})
        changed = []
        for key in sorted(set(ours) | set(theirs)):
            now, then = ours.get(key), theirs.get(key)
            if now == then or (key == "parallel.execution" and then == "auto"):
                continue  # of a training of another program it is not known
            group, _, name = key.partition(".")
            fixed = key == "dpo.loss_type" or (group == "training" and name in FIXED)
            if fixed or group in ("model", "dataset"):
                raise TrainingError(
                    f"resume with another {name if fixed else group}",
                    where=key,
                    value=f"now {now!r}, in {where} {then!r}",
                    rule="a training goes on with the model, data, seed, batch, optimizer and loss "
                    "that it began with",
                    todo="start a new run with init_from to train these weights differently",
                )
            changed.append(f"{key}: {then!r} before, {now!r} from here on")
        return changed


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    return dict(_items(values, prefix))


def _items(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _items(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
