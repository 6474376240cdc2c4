"""The records as TensorBoard events."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from mistral_ms.training.held_out import EvaluationRecord
from mistral_ms.training.metrics import StepRecord


class TensorBoardWriter:
    """An observer that writes events; ``tensorboard --logdir`` shows them.

    Args:
        directory: where to; a resumed training adds a file there.
        first_step: events from this step on are overwritten, for a training that is resumed.
    """

    def __init__(self, directory: Path, first_step: int = 1) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(directory), purge_step=first_step, flush_secs=10)

    def __call__(self, record: StepRecord) -> None:
        """Writes the scalars of one step."""
        scalars = {
            "loss/total": record.loss,
            "loss/language_model": record.lm_loss,
            "loss/load_balancing": record.aux_loss,
            "loss/router_z": record.z_loss,
            "training/learning_rate": record.lr,
            "training/gradient_norm": record.grad_norm,
            "training/loss_scale": record.loss_scale,
            "training/tokens_per_s": record.tokens_per_s,
            "routing/dropped_fraction": record.dropped_fraction,
        }
        for name, loss in record.router_losses.items():
            scalars[f"loss/{name}"] = loss
        for name, value in record.preference.items():
            scalars[f"preference/{name}"] = value
        if record.distillation is not None:
            scalars["loss/distillation"] = record.distillation
        for layer, load in enumerate(record.expert_load):
            # 1 when every expert is asked equally often
            scalars[f"routing/busiest_expert/layer_{layer}"] = max(load) * len(load)
            scalars[f"routing/idlest_expert/layer_{layer}"] = min(load) * len(load)
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, record.step)

    def evaluated(self, record: EvaluationRecord) -> None:
        """Writes the scalars of one evaluation on held-out data."""
        for name in ("loss", "perplexity", "accuracy"):
            self._writer.add_scalar(f"evaluation/{name}", getattr(record, name), record.step)

    def __enter__(self) -> TensorBoardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.close()
