"""One run: a model, how its tokens are routed, how it is trained."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import model_validator

from mistral_ms.config.base import Frozen, validate
from mistral_ms.config.load import apply_overrides, read_yaml
from mistral_ms.config.model import ModelConfig
from mistral_ms.config.routing import RoutingConfig
from mistral_ms.config.training import TrainingConfig
from mistral_ms.errors import ConfigError


class RunConfig(Frozen):
    """A file of ``configs/run``.

    Attributes:
        model: the architecture. In the file: the path of a model file, relative to the run file,
            or its keys in place.
        routing: the routing policy of the sparse layers.
        training: the training.
    """

    model: ModelConfig
    routing: RoutingConfig = RoutingConfig(policy="capacity")
    training: TrainingConfig

    @model_validator(mode="after")
    def _window_fits(self) -> RunConfig:
        length, longest = self.training.seq_length, self.model.max_position_embeddings
        if length > longest:
            raise ValueError(
                f"training.seq_length ({length}) must not exceed "
                f"model.max_position_embeddings ({longest})"
            )
        return self


def load_run_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run file and the model file that it names, then applies overrides to both.

    Args:
        path: the run file.
        overrides: ``key.path=value`` items, such as ``training.steps=50`` and
            ``model.hidden_size=64``; ``model=FILE`` (relative to the run file) names another
            model and comes before the others, wherever it stands.

    Raises:
        ConfigError: see :func:`~mistral_ms.config.load.read_yaml`,
            :func:`~mistral_ms.config.load.apply_overrides` and
            :func:`~mistral_ms.config.base.validate`.
    """
    path = Path(path)
    another = [item for item in overrides if item.startswith("model=")]
    rest = [item for item in overrides if not item.startswith("model=")]
    values = apply_overrides(read_yaml(path), another)
    model = values.get("model")
    if isinstance(model, str):
        values["model"] = read_yaml(path.parent / model)
    elif not isinstance(model, dict):
        raise ConfigError(
            "invalid configuration",
            where=f"{path}: model",
            value=repr(model),
            rule="must be the path of a model file or the model's keys",
        )
    return validate(RunConfig, apply_overrides(values, rest), str(path))
