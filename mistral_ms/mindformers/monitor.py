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
        lm: mean negative log-likelihood over the counted tokens; None on a pipeline's stage without
            the head.
        aux: load-balancing loss, without its coefficient.
        z: router z-loss, without its coefficient.
        routed_LE: choices per sparse layer and expert, before the capacity.
        kept_LE: choices that got a slot.
        layers: the stage's sparse layers, which all but the first are of; None: of the whole model.
    """

    lm: float | None
    aux: float
    z: float
    routed_LE: np.ndarray
    kept_LE: np.ndarray
    layers: tuple[int, ...] | None = None


class RouterMonitor(Callback):
    """Logs, beside MFLossMonitor's lines, what the loss consists of; in ``callbacks``
    ``type: RouterMonitor``. Each stage of a pipeline logs what its own layers record.

    Args:
        per_print_times: every so many steps.
    """

    def __init__(self, per_print_times: int = 1) -> None:
        super().__init__()
        self.per_print_times = per_print_times
        self._read: Any = None

    def on_train_step_end(self, run_context: Any) -> None:
        """Called by MindSpore."""
        parameters = run_context.original_args()
        step = steps_before(parameters) + parameters.cur_step_num
        if self._read is None:  # of the step; data that is sunk has a cell of its own around it
            cells = (cell for _, cell in parameters.train_network.cells_and_names())
            reads = (getattr(cell, "losses", None) for cell in cells)
            self._read = next((each for each in reads if callable(each)), lambda: None)
        if step % self.per_print_times or (losses := self._read()) is None:
            return
        logger.info("step %s: %s", step, describe(losses))


def steps_before(parameters: Any) -> int:
    """The steps of the training that this run goes on with: MindFormers counts from 1 again, and
    tells its own callbacks, MFLossMonitor among them, how many there were.

    Args:
        parameters: of the run, as callbacks get them.
    """
    of_run = parameters.get("initial_step")
    callbacks = parameters.get("list_callback") or ()
    steps = (getattr(each, "initial_step", None) or 0 for each in callbacks)
    return of_run if of_run is not None else max(steps, default=0)


def describe(losses: StepLosses) -> str:
    """The losses by name; for a sparse model the share of choices that were dropped, and each
    layer's largest and smallest load of an expert as multiples of the mean.
    """
    lm = "" if losses.lm is None else f"lm_loss {losses.lm:.6f}, "
    text = f"{lm}aux_loss {losses.aux:.6f}, z_loss {losses.z:.6f}"
    if losses.layers is not None:
        text += f" of layers {', '.join(map(str, losses.layers)) or 'none'}"
    routed, kept = losses.routed_LE, losses.kept_LE
    if not routed.size:
        return text
    dropped = 1.0 - kept.sum() / max(1.0, routed.sum())
    loads = routed / np.maximum(routed.mean(-1, keepdims=True), 1e-9)
    layers = " ".join(f"{each.max():.2f}/{each.min():.2f}" for each in loads)
    return f"{text}, dropped {dropped:.4f}, expert load max/min by layer {layers}"
