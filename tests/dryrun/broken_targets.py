"""Targets that do not compile, each in its own way. Not a test."""

import os
import time
from types import SimpleNamespace

import numpy as np
from mindspore import Tensor, nn, ops


class Mismatch(nn.Cell):
    def construct(self, x):
        return ops.matmul(x, x)  # [2, 3] x [2, 3]


def mismatch():
    return SimpleNamespace(cell=Mismatch(), inputs=(Tensor(np.ones((2, 3), np.float32)),))


def dies():
    os.abort()


def sleeps():
    time.sleep(600)
