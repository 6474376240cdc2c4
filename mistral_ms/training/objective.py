"""The objective that a training configuration asks for."""

from __future__ import annotations

from typing import TypeAlias

from mistral_ms.config import TrainingConfig
from mistral_ms.models import CausalLM, Objective, StageChunks, StageObjectives
from mistral_ms.parallel.context import ParallelContext

TrainedModel: TypeAlias = CausalLM | StageChunks
TrainedObjective: TypeAlias = Objective | StageObjectives
"""Of interleaved chunks one each."""


def make_objective(
    model: TrainedModel,
    config: TrainingConfig,
    *,
    pooled_aux: bool = True,
    parallel_context: ParallelContext | None = None,
) -> TrainedObjective:
    """Next-token loss and the router's losses, with the coefficients of the configuration.

    Args:
        model: what is trained.
        config: has the coefficients.
        pooled_aux: how the load-balancing loss combines layers (see RoutingConfig.aux_loss).
        parallel_context: which part of the model this process has; None when it is alone.

    Raises:
        ConfigError: see :class:`~mistral_ms.models.Objective`.
    """
    if isinstance(model, StageChunks):
        parts = [_objective(each, config, pooled_aux, parallel_context) for each in model.chunks]
        return StageObjectives(model, parts)
    return _objective(model, config, pooled_aux, parallel_context)


def _objective(
    model: CausalLM, config: TrainingConfig, pooled_aux: bool, context: ParallelContext | None
) -> Objective:
    return Objective(
        model,
        router_aux_loss_coef=config.router_aux_loss_coef,
        router_z_loss_coef=config.router_z_loss_coef,
        router_losses=config.router_losses,
        pooled_aux=pooled_aux,
        neftune_noise_alpha=config.neftune_noise_alpha,
        interleave_num=1 if context is None else context.parallel.micro_batch_interleave_num,
        token_nll=None if context is None else context.token_nll(model.config),
    )
