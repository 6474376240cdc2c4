"""A callback that writes the router's losses and the experts' load into MindFormers' log."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from mindformers.tools.logger import logger
from mindspore import Callback


@dataclass(frozen=True)
class StepLosses:
    """What the loss of a step consisted of.

    Attributes:
        lm: mean negative log-likelihood over the counted tokens.
        aux: load-balancing loss, without its coefficient.
        z: router z-loss, without its coefficient.
        routed_LE: choices per sparse layer and expert, before the capacity.
        kept_LE: choices that got a slot.
    """

    lm: float
    aux: float
    z: float
    routed_LE: np.ndarray
    kept_LE: np.ndarray


class RouterMonitor(Callback):
    """Logs, beside MFLossMonitor's lines, what the loss consists of; in ``callbacks``
    ``type: RouterMonitor``.

    Args:
        per_print_times: every so many steps.
    """

    def __init__(self, per_print_times: int = 1) -> None:
        super().__init__()
        self.per_print_times = per_print_times

    def on_train_step_end(self, run_context: Any) -> None:
        """Called by MindSpore."""
        parameters = run_context.original_args()
        read = getattr(parameters.train_network, "losses", None)
        step = parameters.cur_step_num
        if read is None or step % self.per_print_times or (losses := read()) is None:
            return
        logger.info("step %s: %s", step, describe(losses))


def describe(losses: StepLosses) -> str:
    """The losses by name; for a sparse model the share of choices that were dropped, and each
    layer's largest and smallest load of an expert as multiples of the mean.
    """
    text = f"lm_loss {losses.lm:.6f}, aux_loss {losses.aux:.6f}, z_loss {losses.z:.6f}"
    routed, kept = losses.routed_LE, losses.kept_LE
    if not routed.size:
        return text
    dropped = 1.0 - kept.sum() / max(1.0, routed.sum())
    loads = routed / np.maximum(routed.mean(-1, keepdims=True), 1e-9)
    layers = " ".join(f"{each.max():.2f}/{each.min():.2f}" for each in loads)
    return f"{text}, dropped {dropped:.4f}, expert load max/min by layer {layers}"
