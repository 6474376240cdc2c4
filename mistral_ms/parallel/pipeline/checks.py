"""What a pipeline cannot do."""

from __future__ import annotations

from mistral_ms.config import ModelConfig, ParallelConfig, RoutingConfig
from mistral_ms.errors import ConfigError


def check_objective(
    model: ModelConfig, routing: RoutingConfig, parallel: ParallelConfig, aux_coef: float
) -> None:
    """Raises if the loss couples stages: each stage must be able to form its own losses.

    The pooled load-balancing loss multiplies means over the tokens of all layers; its gradient in
    one layer needs the means of all others, which lie on other stages.

    Args:
        model: the whole model.
        routing: names the form of the load-balancing loss.
        parallel: the layout.
        aux_coef: coefficient of the load-balancing loss.

    Raises:
        ConfigError: the pooled form with more than one stage.
    """
    counts = aux_coef > 0 and bool(model.sparse_layers)
    if parallel.pp > 1 and counts and routing.aux_loss == "pooled":
        raise ConfigError(
            "impossible objective",
            where="routing.aux_loss",
            value=f"pooled with parallel.pp={parallel.pp}",
            rule="the pooled load-balancing loss couples the layers of all pipeline stages",
            todo="set routing.aux_loss=per_layer, training.aux_coef=0, or parallel.pp=1",
        )
