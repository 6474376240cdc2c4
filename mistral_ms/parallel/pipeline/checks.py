"""What a pipeline cannot do."""

from __future__ import annotations

from collections.abc import Collection

from mistral_ms.config import ModelConfig, ParallelConfig, RoutingConfig
from mistral_ms.errors import ConfigError
from mistral_ms.parallel.pipeline.holding import held_specs
from mistral_ms.parallel.pipeline.stages import stages_of
from mistral_ms.weights import specs


def check_objective(
    model: ModelConfig,
    routing: RoutingConfig,
    parallel: ParallelConfig,
    router_aux_loss_coef: float,
) -> None:
    """Raises if the loss couples stages: each stage must be able to form its own losses.

    The pooled load-balancing loss multiplies means over the tokens of all layers; its gradient in
    one layer needs the means of all others, which lie on other stages.

    Args:
        model: the whole model.
        routing: names the form of the load-balancing loss.
        parallel: the layout.
        router_aux_loss_coef: coefficient of the load-balancing loss.

    Raises:
        ConfigError: the pooled form with more than one stage.
    """
    counts = router_aux_loss_coef > 0 and bool(model.sparse_layers)
    if parallel.pp > 1 and counts and routing.aux_loss == "pooled":
        raise ConfigError(
            "impossible objective",
            where="routing.aux_loss",
            value=f"pooled with parallel.pp={parallel.pp}",
            rule="the pooled load-balancing loss couples the layers of all pipeline stages",
            todo="set routing.aux_loss=per_layer, training.router_aux_loss_coef=0, "
            "or parallel.pp=1",
        )


def check_trained(model: ModelConfig, pp: int, trained: Collection[str]) -> None:
    """Raises if a stage would have no gradients.

    Args:
        model: the whole model.
        pp: stages; of interleaved chunks all parts of the model.
        trained: the names of all weights that are trained.

    Raises:
        ConfigError: names a stage whose weights are all frozen.
    """
    for stage in stages_of(model, pp):
        if not any(spec.name in trained for spec in held_specs(stage, specs(model))):
            raise ConfigError(
                "nothing to train in a stage",
                where="training.param_groups",
                value=f"stage {stage.number} of {pp} is all frozen",
                rule="every pipeline stage trains at least one weight",
                todo="use a smaller parallel.pp, or freeze less",
            )
