"""Runs that differ from a given one in some keys."""

from __future__ import annotations

from mistral_ms.config import ParallelConfig, RunConfig
from mistral_ms.config.base import validate
from mistral_ms.errors import ConfigError


def changed_run(run: RunConfig, **values: object) -> RunConfig:
    """The same training with other values of ``parallel`` or ``training``; not validated."""
    parallel = {key: value for key, value in values.items() if key in ParallelConfig.model_fields}
    training = {key: value for key, value in values.items() if key not in parallel}
    groups: dict[str, object] = {}
    if parallel:
        groups["parallel"] = run.parallel.model_copy(update=parallel)
    if training:
        groups["training"] = run.training.model_copy(update=training)
    return run.model_copy(update=groups)


def with_policy(run: RunConfig, policy: str) -> RunConfig | None:
    """The same training under another dispatch policy; None where its other settings refuse it.

    Args:
        run: whose model has experts.
        policy: see ``routing.policy``.
    """
    routing = run.routing.model_copy(update={"policy": policy})
    try:
        return checked(run.model_copy(update={"routing": routing}))
    except ConfigError:
        return None


def checked(run: RunConfig) -> RunConfig:
    """A run of the search, validated as one that was read.

    Raises:
        ConfigError: it breaks a rule of configurations.
    """
    return validate(RunConfig, run.model_dump(), "planned run")


def check_planned(run: RunConfig) -> None:
    """Raises for trainings whose memory and time are not calculated.

    Raises:
        ConfigError: adapters or preferences.
    """
    for key, what, todo in (
        ("lora", "adapters", "without lora: what fits then fits with it"),
        ("dpo", "preferences", "without dpo, of twice the global_batch_size: a pair is two rows"),
    ):
        if (value := getattr(run, key)) is not None:
            raise ConfigError(
                f"no plan of {what}",
                where=key,
                value=str(value),
                rule="memory and time are calculated for trainings of all weights on texts",
                todo=f"plan {todo}",
            )
