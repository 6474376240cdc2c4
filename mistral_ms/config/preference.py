"""How a model learns from preferences."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mistral_ms.config.base import Frozen


class DpoConfig(Frozen):
    """Direct preference optimisation; keys and defaults are TRL's.

    Attributes:
        beta: of the log-ratio between the trained model and the reference: the larger, the closer
            they stay. Of ``ipo`` half its inverse is the margin that is aimed at. From
            1e-6 to 1000.
        loss_type: ``sigmoid`` (Rafailov et al. 2023, arXiv:2305.18290, eq. 7) or ``ipo`` (Azar et
            al. 2023, arXiv:2310.12036, eq. 17; of log-probabilities per token, as in TRL).
        label_smoothing: the share of pairs that are taken to be labelled the wrong way round
            (conservative DPO); of ``sigmoid``.
    """

    beta: float = Field(default=0.1, ge=1e-6, le=1e3, allow_inf_nan=False)
    loss_type: Literal["sigmoid", "ipo"] = "sigmoid"
    label_smoothing: float = Field(default=0.0, ge=0, lt=0.5)

    @model_validator(mode="after")
    def _smoothed(self) -> DpoConfig:
        if self.loss_type == "ipo" and self.label_smoothing > 0:
            raise ValueError(
                f"label_smoothing ({self.label_smoothing:g}) is of loss_type sigmoid; with ipo it "
                "must be 0"
            )
        return self
