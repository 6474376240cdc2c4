"""The dynamic loss scale of float16 training."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mistral_ms.config import LossScaleConfig

FACTOR = 2.0
"""A power of two, so that scaling changes no mantissa."""


@dataclass(frozen=True, slots=True)
class LossScale:
    """The scale, and how long it has been good (arXiv:1710.03740, section 3.2).

    Attributes:
        value: what the loss is multiplied by; 1 without scaling.
        good: updates in a row since it last changed.
    """

    value: float = 1.0
    good: int = 0

    @classmethod
    def start(cls, config: LossScaleConfig | None) -> LossScale:
        """The scale of the first step."""
        return cls() if config is None else cls(config.initial)

    def after(self, config: LossScaleConfig | None, finite: bool) -> LossScale:
        """The scale of the next step.

        Args:
            config: None leaves the scale alone.
            finite: whether this step's gradients were finite, so that it updated the weights.
        """
        if config is None:
            return self
        if not finite:
            return LossScale(max(self.value / FACTOR, config.minimum))
        if self.good + 1 >= config.growth_interval:
            return LossScale(self.value * FACTOR)
        return replace(self, good=self.good + 1)
