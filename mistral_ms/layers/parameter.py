"""Weights: created as zeros, filled by a checkpoint or by :func:`init_values`."""

from __future__ import annotations

import zlib

import mindspore as ms
import numpy as np
from mindspore import Parameter
from mindspore.common.initializer import initializer

from mistral_ms.weights import ParamSpec


def weight(*shape: int, dtype: str = "float32", init: str = "zeros") -> Parameter:
    """A trainable parameter of ``shape``; its name becomes its path in the model."""
    return Parameter(initializer(init, shape, getattr(ms, dtype)))


def buffer(*shape: int, dtype: str = "float32", init: str = "zeros") -> Parameter:
    """State that is not trained and not part of a checkpoint, nor of a model's specifications."""
    parameter = Parameter(initializer(init, shape, getattr(ms, dtype)), requires_grad=False)
    parameter.is_buffer = True
    return parameter


def is_buffer(parameter: Parameter) -> bool:
    """Whether :func:`buffer` made it. A frozen weight has no gradient either, yet is a weight."""
    return getattr(parameter, "is_buffer", False)


def init_values(spec: ParamSpec, seed: int) -> np.ndarray:
    """Initial values of one whole parameter, float32.

    Each weight has a random stream of its own, derived from the seed and its name: what a weight
    starts with depends neither on the order of construction nor on which process holds it.

    Args:
        spec: of the parameter; its ``init`` says what is drawn.
        seed: of the run.
    """
    if spec.init != "normal":
        return np.full(spec.shape, float(spec.init == "ones"), np.float32)
    stream = np.random.default_rng([seed, zlib.crc32(spec.name.encode())])
    return stream.standard_normal(spec.shape, dtype=np.float32) * np.float32(spec.std)
