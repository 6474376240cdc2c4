"""Which layouts an optimizer can be used with."""

from __future__ import annotations

from mistral_ms.config import ParallelConfig
from mistral_ms.errors import ConfigError
from mistral_ms.optimizers.plan import Plan


def check_layout(plan: Plan, parallel: ParallelConfig) -> None:
    """Refuses an optimizer of whole matrices where ranks hold pieces of them.

    Data parallelism, experts and pipeline stages leave matrices whole, and so does
    ``optimizer_parallel`` with explicit collectives, which gives each weight to one rank. Tensor
    parallelism divides them, and ``optimizer_parallel`` of the auto-parallel graph does.

    Args:
        plan: the optimizer.
        parallel: the layout.

    Raises:
        ConfigError: names the setting.
    """
    if all(group.rule.elementwise for group in plan.groups):
        return
    name = plan.settings.name
    rows = parallel.optimizer_parallel and parallel.execution == "graph" and parallel.world > 1
    for broken, key, value in (
        (parallel.mp > 1, "parallel.mp", parallel.mp),
        (rows, "parallel.optimizer_parallel", "true with parallel.execution=graph"),
    ):
        if broken:
            raise ConfigError(
                "an optimizer of whole matrices",
                where=key,
                value=f"{value} with training.optimizer.name={name}",
                rule=f"{name} needs whole matrices, and this leaves each rank a piece of them",
                todo=f"leave {key} out, or use training.optimizer.name=adamw",
            )
