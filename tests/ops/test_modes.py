"""The mode fixtures must do what they promise, or every graph test is worth less."""

from typing import NamedTuple

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn


class Pair(NamedTuple):
    left: Tensor
    right: Tensor


class BuildsNamedTuple(nn.Cell):
    def construct(self, x):
        return Pair(x + 1, x)


def test_modes_are_really_set(mode):
    assert ms.get_context("mode") == (ms.GRAPH_MODE if mode == "graph" else ms.PYNATIVE_MODE)


def test_a_fallback_to_python_is_an_error_in_graph_mode(graph):
    with pytest.raises(Exception, match=r"(?i)jit_syntax_level|JIT Fallback|STRICT|not support"):
        BuildsNamedTuple()(Tensor(np.ones(2, np.float32)))


def test_default_is_pynative_again():
    assert ms.get_context("mode") == ms.PYNATIVE_MODE
    assert ms.get_context("jit_syntax_level") == ms.LAX
