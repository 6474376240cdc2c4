"""The cell around RMSNorm; the arithmetic is tested in tests/ops."""

import numpy as np
from mindspore import Tensor

from mistral_ms.layers import RMSNorm


def test_applies_its_weight_and_its_epsilon():
    norm = RMSNorm(4, 0.25)
    np.testing.assert_array_equal(norm.weight.numpy(), np.ones(4))
    norm.weight.set_data(Tensor(np.array([1, 2, 3, 4], np.float32)))
    x = np.array([[1.0, -1.0, 2.0, 0.0]], np.float32)
    want = x / np.sqrt(6 / 4 + 0.25) * [1, 2, 3, 4]
    np.testing.assert_allclose(norm(Tensor(x)).numpy(), want, rtol=1e-6)  # float32 rounding
