"""The objective that a training configuration asks for."""

from __future__ import annotations

from mistral_ms.config import TrainingConfig
from mistral_ms.models import CausalLM, Objective
from mistral_ms.parallel.context import ParallelContext


def make_objective(
    model: CausalLM,
    config: TrainingConfig,
    *,
    pooled_aux: bool = True,
    parallel_context: ParallelContext | None = None,
) -> Objective:
    """Next-token loss and the router's losses, with the coefficients of the configuration.

    Args:
        model: what is trained.
        config: has the coefficients.
        pooled_aux: how the load-balancing loss combines layers (see RoutingConfig.aux_loss).
        parallel_context: which part of the model this process has; None when it is alone.

    Raises:
        ConfigError: see :class:`~mistral_ms.models.Objective`.
    """
    context = parallel_context
    return Objective(
        model,
        router_aux_loss_coef=config.router_aux_loss_coef,
        router_z_loss_coef=config.router_z_loss_coef,
        router_losses=config.router_losses,
        pooled_aux=pooled_aux,
        interleave_num=1 if context is None else context.parallel.micro_batch_interleave_num,
        token_nll=None if context is None else context.token_nll(model.config),
    )
