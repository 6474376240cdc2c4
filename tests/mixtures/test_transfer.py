"""Forgetting and transfer of a matrix that was worked out by hand."""

import numpy as np
import pytest

from mistral_ms.errors import ConfigError
from mistral_ms.mixtures.transfer import backward_transfer, forgetting, forward_transfer

A = np.array([[0.9, 0.2, 0.1], [0.5, 0.8, 0.3], [0.6, 0.7, 0.95]])


def test_by_hand():
    np.testing.assert_allclose(forgetting(A), [0.9 - 0.6, 0.8 - 0.7])
    assert backward_transfer(A) == pytest.approx((0.6 - 0.9 + 0.7 - 0.8) / 2)
    assert forward_transfer(A, np.array([0.1, 0.1, 0.1])) == pytest.approx((0.1 + 0.2) / 2)


def test_forgetting_is_of_the_best_since():
    """A score that rose before it fell: from its top, not from where it was learned."""
    a = A.copy()
    a[1, 0] = 0.99
    np.testing.assert_allclose(forgetting(a)[0], 0.99 - 0.6)


def test_shapes():
    with pytest.raises(ConfigError, match=r"impossible scores: a_TT: \[2, 3\]"):
        forgetting(A[:2])
    with pytest.raises(ConfigError, match=r"impossible scores: untrained_T: \[2\]: \[3\]"):
        forward_transfer(A, np.zeros(2))
