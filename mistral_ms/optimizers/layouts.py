"""Which layouts an optimizer can be used with."""

from __future__ import annotations

from mistral_ms.config import ParallelConfig
from mistral_ms.errors import ConfigError
from mistral_ms.optimizers.plan import Plan


def check_layout(plan: Plan, parallel: ParallelConfig) -> None:
    """Refuses an optimizer of whole matrices where ranks hold columns of them.

    Data parallelism, experts and pipeline stages leave matrices whole. ``optimizer_parallel`` gives
    each weight to one rank on the explicit path, and to each rank some rows of it in the
    auto-parallel graph, where the rows are brought together. Tensor parallelism divides columns.

    Args:
        plan: the optimizer.
        parallel: the layout.

    Raises:
        ConfigError: names the setting.
    """
    if parallel.mp == 1 or all(group.rule.elementwise for group in plan.groups):
        return
    name = plan.settings.name
    raise ConfigError(
        "an optimizer of whole matrices",
        where="parallel.mp",
        value=f"{parallel.mp} with training.optimizer.name={name}",
        rule=f"{name} needs whole matrices: tensor parallelism leaves each rank a piece of them",
        todo="leave parallel.mp out, or use training.optimizer.name=adamw",
    )
