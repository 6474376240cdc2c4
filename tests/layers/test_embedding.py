"""Rows of the table, and a gradient that adds up over repeated tokens."""

import mindspore as ms
import numpy as np
from mindspore import Tensor

from mistral_ms.layers import Embedding


def embedding(rng):
    layer = Embedding(11, 6)
    layer.weight.set_data(Tensor(rng.normal(size=(11, 6)).astype(np.float32)))
    return layer


def test_takes_rows():
    layer = embedding(np.random.default_rng(0))
    ids = np.array([3, 0, 10, 3], np.int32)
    np.testing.assert_array_equal(layer(Tensor(ids)).numpy(), layer.weight.numpy()[ids])


def test_gradient_adds_up_where_a_token_repeats():
    rng = np.random.default_rng(1)
    layer, ids = embedding(rng), np.array([3, 0, 3, 3], np.int32)
    d = rng.integers(-8, 8, (4, 6)).astype(np.float32)  # integers: sums are exact
    gradient = ms.grad(lambda i: (layer(i) * Tensor(d)).sum(), None, [layer.weight])
    (got,) = gradient(Tensor(ids))
    want = np.zeros((11, 6), np.float32)
    np.add.at(want, ids, d)
    np.testing.assert_array_equal(got.numpy(), want)
