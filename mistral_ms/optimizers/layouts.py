"""Which layouts an optimizer can be used with."""

from __future__ import annotations

from mistral_ms.config import ParallelConfig
from mistral_ms.errors import ConfigError
from mistral_ms.optimizers.plan import Plan


def check_layout(plan: Plan, parallel: ParallelConfig, *, graph: bool) -> None:
    """Refuses an optimizer of whole matrices where ranks hold pieces of them.

    With explicit collectives data parallelism, experts and pipeline stages leave matrices whole,
    and so does ``optimizer_parallel``, which gives each weight to one rank. Tensor parallelism
    divides them. The auto-parallel graph of many processes divides them in more ways.

    Args:
        plan: the optimizer.
        parallel: the layout.
        graph: it is that of the auto-parallel graph.

    Raises:
        ConfigError: names the setting.
    """
    if all(group.rule.elementwise for group in plan.groups):
        return
    name = plan.settings.name
    for broken, key, value, rule in (
        (
            graph and parallel.world > 1,
            "parallel.execution",
            f"graph, {parallel.world} processes,",
            "in a graph that MindSpore divides this is not known so far",
        ),
        (
            parallel.mp > 1,
            "parallel.mp",
            parallel.mp,
            "tensor parallelism leaves each rank a piece of them",
        ),
    ):
        if broken:
            raise ConfigError(
                "an optimizer of whole matrices",
                where=key,
                value=f"{value} with training.optimizer.name={name}",
                rule=f"{name} needs whole matrices: {rule}",
                todo=f"leave {key} out, or use training.optimizer.name=adamw",
            )
