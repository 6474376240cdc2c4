"""Trainings of a second: the state of one in bits, and torch's side of the loss."""

from __future__ import annotations

import numpy as np
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from mistral_ms.datasets import Batch, BatchSource
from mistral_ms.training import StepResult, TrainStep


def run_steps(update: TrainStep, data: BatchSource, steps: int) -> list[StepResult]:
    """The next ``steps`` steps."""
    return [update(data.batch(update.progress.step)) for _ in range(steps)]


def bits(update: TrainStep) -> dict[str, bytes]:
    """Everything that a resume must bring back: weights, means, masters."""
    state = {**update.model.weights(), **update.optimizer.state()}
    return {name: parameter.asnumpy().tobytes() for name, parameter in state.items()}


def as_reported(result: StepResult) -> str:
    """A result as text: equal when every bit is, NaN included."""
    numbers = [getattr(result, name) for name in StepResult.__slots__ if not name.endswith("_LE")]
    return repr((numbers, result.routed_LE.tolist(), result.kept_LE.tolist()))


def torch_group_loss(
    hf: torch.nn.Module,
    group: Batch,
    whole: Batch,
    router_aux_loss_coef: float,
    router_z_loss_coef: float,
) -> torch.Tensor:
    """One dispatch group's part of the loss of the whole batch, written from the definition.

    lm is summed over the group's labels and divided by the whole batch's count; aux and z are the
    group's own means, weighted by its share of the whole batch's tokens.
    """
    real = torch.tensor(group.positions_BS >= 0)
    output = hf(
        torch.tensor(group.ids_BS).long(),
        attention_mask=real.long(),
        output_router_logits=True,
    )
    labels = torch.tensor(group.labels_BS).long()
    logits = output.logits.reshape(-1, output.logits.shape[-1])
    nll = torch.nn.functional.cross_entropy(logits, labels.ravel(), reduction="sum")
    loss = nll / int(np.count_nonzero(whole.labels_BS != -100))
    share = int(real.sum()) / int(np.count_nonzero(whole.positions_BS >= 0))
    E = hf.config.num_local_experts
    aux = load_balancing_loss_func(output.router_logits, E, 2, real.long())
    z = torch.cat([torch.logsumexp(x[real.ravel()], -1) ** 2 for x in output.router_logits]).mean()
    return loss + share * (router_aux_loss_coef * aux + router_z_loss_coef * z)
