"""Weights: created as zeros, filled by a checkpoint or by
:func:`~mistral_ms.weights.init_values`.
"""

from __future__ import annotations

import mindspore as ms
from mindspore import Parameter
from mindspore.common.initializer import initializer


def weight(*shape: int, dtype: str = "float32", init: str = "zeros") -> Parameter:
    """A trainable parameter of ``shape``; its name becomes its path in the model."""
    return Parameter(initializer(init, shape, getattr(ms, dtype)))


def buffer(*shape: int, dtype: str = "float32", init: str | int = "zeros") -> Parameter:
    """State that is not trained and not part of a checkpoint, nor of a model's specifications."""
    parameter = Parameter(initializer(init, shape, getattr(ms, dtype)), requires_grad=False)
    parameter.is_buffer = True
    return parameter


def is_buffer(parameter: Parameter) -> bool:
    """Whether :func:`buffer` made it. A frozen weight has no gradient either, yet is a weight."""
    return getattr(parameter, "is_buffer", False)
