"""How the experts of a checkpoint of ours are quantised: weights alone, symmetric, to the nearest.

A scale belongs to ``group_size`` neighbouring inputs of one output, or to all of them. The codes of
a group are ``round(w / scale)`` with ``scale = max |w| / largest``, and ``code * scale`` is read.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mistral_ms.config.base import Frozen

QuantizedWeights = Literal["int8", "int4"]
GROUP_SIZE = 128
"""Of int4 where nobody says another."""


class Quantization(Frozen):
    """What is stored of each expert's matrix.

    Attributes:
        weights: ``int8``: codes -127 to 127, a byte each; ``int4``: codes -7 to 7, stored as 1 to
            15, two in a byte, of which the lower half is the first.
        group_size: inputs that share a scale; None: all inputs of an output channel do.
    """

    weights: QuantizedWeights
    group_size: int | None = Field(default=None, ge=2)

    @model_validator(mode="after")
    def _groups_are_of_int4(self) -> Quantization:
        if self.weights == "int8" and self.group_size is not None:
            raise ValueError("group_size is of int4: with int8 an output channel has one scale")
        if self.weights == "int4" and (self.group_size is None or self.group_size % 2):
            raise ValueError("with int4 group_size must be an even number: two codes share a byte")
        return self

    def __str__(self) -> str:
        shared = "output channel" if self.group_size is None else f"{self.group_size} inputs"
        return f"{self.weights} (experts), a float32 scale for each {shared}"

    @property
    def largest(self) -> int:
        """The largest code."""
        return 127 if self.weights == "int8" else 7

    def group_of(self, inputs: int) -> int:
        """How many inputs of a matrix share a scale: a group that is larger than it is all of it.

        Args:
            inputs: of the matrix.
        """
        return inputs if self.group_size is None else min(self.group_size, inputs)

    def broken_rule(self, inputs: int) -> str | None:
        """Why a matrix of so many inputs cannot be quantised so; None when it can."""
        if self.weights == "int4" and inputs % 2:
            return "two codes share a byte: int4 needs an even number of inputs"
        if inputs % self.group_of(inputs):
            return f"groups of {self.group_size} must divide the inputs"
        return None

    def code_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of the codes of a weight [..., inputs]."""
        return shape if self.weights == "int8" else (*shape[:-1], shape[-1] // 2)

    def scale_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Of its scales."""
        return (*shape[:-1], shape[-1] // self.group_of(shape[-1]))


def scales_name(weight: str) -> str:
    """What the scales of a quantised weight are called."""
    return f"{weight}_scales"
