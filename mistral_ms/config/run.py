"""One run: a model, how its tokens are routed, what it learns, and what is kept of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from mistral_ms.config.base import Frozen, validate
from mistral_ms.config.conventions import PACKAGED_TOKENIZER
from mistral_ms.config.data import DataSourceConfig
from mistral_ms.config.foreign import from_hf, from_mistral
from mistral_ms.config.load import apply_overrides, read_yaml
from mistral_ms.config.model import ModelConfig
from mistral_ms.config.parallel import ParallelConfig
from mistral_ms.config.routing import RoutingConfig
from mistral_ms.config.training import TrainingConfig
from mistral_ms.errors import ConfigError


class CheckpointConfig(Frozen):
    """When a training is saved.

    Attributes:
        every: steps between checkpoints; the last step is always saved. None: only that.
        keep_last: how many are kept; None keeps all.
    """

    every: int | None = Field(default=None, ge=1)
    keep_last: int | None = Field(default=2, ge=1)


class RunConfig(Frozen):
    """A file of ``configs/run``.

    Attributes:
        model: the architecture. In the file: the path of a model file or of a checkpoint's
            directory, or the model's keys in place. Left out, it is that of ``init_from``.
        routing: the routing policy of the sparse layers.
        training: the training.
        parallel: how many processes share it, and how.
        data: what is learnt.
        init_from: a checkpoint of any known format whose weights the training starts with;
            without one they are drawn.
        checkpoint: when the training is saved.
        output: directory of all that the run writes; ``runs/NAME`` when not given, with the run
            file's name.
    """

    model: ModelConfig
    routing: RoutingConfig = RoutingConfig(policy="capacity")
    training: TrainingConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataSourceConfig | None = None
    init_from: Path | None = None
    checkpoint: CheckpointConfig = CheckpointConfig()
    output: Path | None = None

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        length, longest = self.training.seq_length, self.model.max_position_embeddings
        if length > longest:
            raise ValueError(
                f"training.seq_length ({length}) must not exceed "
                f"model.max_position_embeddings ({longest})"
            )
        batch, groups = self.training.global_batch_size, self.training.micro_batches
        copies = self.parallel.interleave
        if batch % (self.parallel.dp * groups * copies):
            names, values = "parallel.dp * training.micro_batches", f"{self.parallel.dp} * {groups}"
            if copies > 1:
                names, values = f"{names} * parallel.interleave", f"{values} * {copies}"
            raise ValueError(f"{names} ({values}) must divide training.global_batch_size ({batch})")
        self.parallel.check(self.model)
        return self


def load_run_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a run file and the model file that it names, then applies overrides to both.

    Paths in the file are relative to it (``output`` apart, which is relative to the working
    directory); paths in overrides are relative to the working directory.

    Args:
        path: the run file.
        overrides: ``key.path=value`` items, such as ``training.steps=50`` and
            ``model.hidden_size=64``; ``model=FILE`` names another model and comes before the
            others, wherever it stands. Of ``training.steps`` and ``training.epochs`` the one that
            is overridden wins.

    Raises:
        ConfigError: see :func:`~mistral_ms.config.load.read_yaml`,
            :func:`~mistral_ms.config.load.apply_overrides` and
            :func:`~mistral_ms.config.base.validate`.
    """
    path = Path(path)
    values = _beside(path.parent, read_yaml(path))
    for item in overrides:
        for key in ("model", "init_from"):
            if item.startswith(f"{key}="):
                values[key] = item.removeprefix(f"{key}=")
    model = values.get("model", values.get("init_from"))
    if isinstance(model, str):
        values["model"] = _read_model(Path(model))
    elif not isinstance(model, dict):
        raise ConfigError(
            "invalid configuration",
            where=f"{path}: model",
            value=repr(model),
            rule="must be the path of a model file or of a checkpoint, or the model's keys",
        )
    rest = [item for item in overrides if not item.startswith("model=")]
    merged = apply_overrides(_without_rival(values, rest), rest)
    return validate(RunConfig, merged, str(path))


def _read_model(path: Path) -> dict[str, Any]:
    """The keys of a model file, or of the model that a checkpoint's directory holds."""
    if not path.is_dir():
        return read_yaml(path)
    for name, read in (("config.json", lambda *a: from_hf(*a)[0]), ("params.json", from_mistral)):
        if (path / name).is_file():
            config: ModelConfig = read(read_yaml(path / name), str(path / name))
            return config.model_dump()
    raise ConfigError(
        "no model", where=path, rule="a checkpoint's directory has a config.json or params.json"
    )


def _beside(directory: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Makes the paths in a run file independent of the working directory."""

    def moved(value: Any) -> Any:
        return str(directory / value) if isinstance(value, str) else value

    values = dict(values)
    for key in ("model", "init_from"):
        if key in values:
            values[key] = moved(values[key])
    data = values.get("data")
    if isinstance(data, dict):
        data = dict(data)
        if "dataset" in data:
            data["dataset"] = moved(data["dataset"])
        if isinstance(data.get("inputs"), list):
            data["inputs"] = [moved(item) for item in data["inputs"]]
        if not str(data.get("tokenizer")).startswith(PACKAGED_TOKENIZER):
            data["tokenizer"] = moved(data.get("tokenizer"))
        values["data"] = data
    return values


def _without_rival(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Who overrides the steps does not mean the file's epochs, and the other way round."""
    merged = dict(values)
    rivals = (
        ("training.steps", "epochs"),
        ("training.epochs", "steps"),
        ("data.dataset", "inputs"),
        ("data.inputs", "dataset"),
    )
    given = {item.partition("=")[0] for item in overrides}
    for key, rival in rivals:
        group = key.partition(".")[0]
        if key in given and isinstance(merged.get(group), dict):
            merged[group] = {k: v for k, v in merged[group].items() if k != rival}
    return merged
