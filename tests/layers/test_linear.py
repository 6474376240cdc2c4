"""A linear map whose weight is [output, input]."""

import numpy as np
from mindspore import Tensor

from mistral_ms.layers import Linear


def test_maps_by_the_transposed_weight_and_has_nothing_else():
    layer = Linear(3, 2)
    assert {n: p.shape for n, p in layer.parameters_and_names()} == {"weight": (2, 3)}
    weight = np.array([[1, 2, 3], [0, -1, 4]], np.float32)
    layer.weight.set_data(Tensor(weight))
    x = np.array([[1, 0, 2], [3, 1, 0]], np.float32)
    np.testing.assert_array_equal(layer(Tensor(x)).numpy(), [[7, 8], [5, -1]])  # exact integers
