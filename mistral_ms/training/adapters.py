"""Training adapters beside frozen weights: what is possible, how it begins, what it leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from mindspore import Parameter

from mistral_ms.checkpoint.adapters import open_adapter, write_peft
from mistral_ms.checkpoint.load import load_weights
from mistral_ms.config import ModelConfig, RunConfig
from mistral_ms.errors import ConfigError
from mistral_ms.parallel.context import ParallelContext
from mistral_ms.parallel.storage import Storage
from mistral_ms.training.prepare import Say, initialize
from mistral_ms.weights import stored_specs


def check_adapters(run: RunConfig, given: bool) -> None:
    """Raises where a run cannot train the adapters that it asks for.

    Args:
        run: the run.
        given: a program hands the model in.

    Raises:
        ConfigError: names the key.
    """
    if run.lora is None:
        return
    if run.init_from is None and not given:
        raise ConfigError(
            "adapters without a base model",
            where="init_from",
            rule="adapters are changes to weights that are there",
            todo="name the checkpoint that they shall change",
        )
    stored_specs(run.model)  # says which of its names no matrix has


def initialize_weights(
    weights: Mapping[str, Parameter],
    storage: Storage,
    run: RunConfig,
    parallel_context: ParallelContext,
    say: Say,
    begun: Callable[[], None] = lambda: None,
) -> None:
    """Draws a model's weights or reads them; those of adapters are drawn, or read as well.

    Args:
        weights: what this process holds, by the names of checkpoints.
        storage: how it lies in a checkpoint.
        run: the run.
        parallel_context: which part of the run this process has.
        say: told where they are from.
        begun: called when the weights are those that training begins with, but for magnitudes and
            an adapter to go on with.

    Raises:
        ConfigError: a checkpoint of another model, an adapter of another shape.
        CheckpointError: anything that is wrong with either.
    """
    initialize(weights, storage, run, parallel_context, say)
    begun()
    start = run.init_from
    if run.lora is None or start is None or start.adapter is None:
        return
    base = run.model.model_copy(update={"lora": None})
    with open_adapter(
        start.adapter, base, verify=start.verify, follow_links=start.follow_links
    ) as source:
        _check_same(run.model, source.config, start.adapter)
        names = {name for name, spec in storage.specs.items() if spec.adapts}
        adapters = {name: each for name, each in weights.items() if name in names}
        load_weights(source, adapters, storage=storage)
    say(f"adapter from {start.adapter}")


def _check_same(ours: ModelConfig, theirs: ModelConfig, where: Path) -> None:
    assert ours.lora is not None and theirs.lora is not None
    shapes = [{each.name: each.shape for each in stored_specs(model)} for model in (ours, theirs)]
    same = ours.lora.scaling == theirs.lora.scaling
    if not same or shapes[0] != shapes[1]:
        raise ConfigError(
            "another adapter",
            where="lora",
            value=f"r {ours.lora.r}, scaling {ours.lora.scaling:g}, {len(shapes[0])} tensors",
            rule=f"{where} has r {theirs.lora.r}, scaling {theirs.lora.scaling:g}, "
            f"{len(shapes[1])} tensors",
            todo="say the same under lora to go on with it",
        )


def write_adapter(run: RunConfig, checkpoint: Path, path: Path) -> None:
    """Writes the adapters of a checkpoint of a training as PEFT does.

    Args:
        run: the run.
        checkpoint: of it.
        path: the directory; an adapter that is there is replaced.
    """
    base = run.model.model_copy(update={"lora": None})
    where = None if run.init_from is None else run.init_from.directory.resolve()
    with open_adapter(checkpoint, base) as source:
        write_peft(source, path, where, overwrite=True)
