"""The objective that a training configuration asks for."""

from __future__ import annotations

from typing import Any, TypeAlias

from mindspore import nn

from mistral_ms.config import DpoConfig, TrainingConfig
from mistral_ms.errors import ConfigError
from mistral_ms.models import (
    CausalLM,
    DistillationObjective,
    Objective,
    PreferenceObjective,
    StageChunks,
    StageObjectives,
)
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
    before: tuple[CausalLM, float] | None = None,
    dpo: DpoConfig | None = None,
    token_nll: nn.Cell | None = None,
) -> TrainedObjective:
    """Next-token loss and the router's losses, with the coefficients of the configuration; and the
    distance from another model where one is given, to a whole model.

    Args:
        model: what is trained.
        config: has the coefficients.
        pooled_aux: how the load-balancing loss combines layers (see RoutingConfig.aux_loss).
        parallel_context: which part of the model this process has; None when it is alone.
        before: a model that is not trained, whose outputs the training is held to, and the
            coefficient of the distance.
        dpo: batches are pairs of answers, and this is their loss, in the place of the next-token
            loss; of a whole model.
        token_nll: the loss of tokens, see :class:`~mistral_ms.models.Objective`; None: the usual
            one.

    Raises:
        ConfigError: see :class:`~mistral_ms.models.Objective`; a loss of tokens where each process
            has a part of their logits.
    """
    options: dict[str, Any] = {
        "router_aux_loss_coef": config.router_aux_loss_coef,
        "router_z_loss_coef": config.router_z_loss_coef,
        "router_losses": config.router_losses,
        "pooled_aux": pooled_aux,
        "neftune_noise_alpha": config.neftune_noise_alpha,
    }
    if parallel_context is not None:
        options["interleave_num"] = parallel_context.parallel.micro_batch_interleave_num
        divided = parallel_context.token_nll(model.config)
        if divided is not None and token_nll is not None:
            raise ConfigError(
                "impossible objective",
                where="parallel.mp",
                value=f"{parallel_context.parallel.mp} with a loss of tokens of one's own",
                rule="tensor parallelism divides logits along the vocabulary",
                todo="set parallel.mp=1, or use the auto-parallel graph, which divides their rows",
            )
        token_nll = divided if token_nll is None else token_nll
    options["token_nll"] = token_nll
    if isinstance(model, StageChunks):
        return StageObjectives(model, [Objective(each, **options) for each in model.chunks])
    if dpo is not None:
        return PreferenceObjective(model, dpo, config.global_batch_size, **options)
    if before is not None:
        return DistillationObjective(model, *before, **options)
    return Objective(model, **options)
