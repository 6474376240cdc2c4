"""What a sequence of trainings keeps and brings: forgetting, forward and backward transfer.

a[t, i] is the score (the higher the better; of a loss take its negative) on domain i after training
on domains 0 to t, T of them (Lopez-Paz and Ranzato 2017, arXiv:1706.08840, section 2).
"""

from __future__ import annotations

import numpy as np

from mistral_ms.errors import ConfigError


def forgetting(a_TT: np.ndarray) -> np.ndarray:
    """What each domain but the last lost since it was best: max_{t < T-1} a[t, i] - a[T-1, i].

    Returns:
        float64 [T - 1]; negative where later trainings helped.
    """
    a = _matrix(a_TT)
    return np.array([a[i:-1, i].max() - a[-1, i] for i in range(len(a) - 1)])


def backward_transfer(a_TT: np.ndarray) -> float:
    """What later trainings did to earlier domains: the mean over i < T-1 of a[T-1, i] - a[i, i]."""
    a = _matrix(a_TT)
    return float(np.mean(a[-1, :-1] - a.diagonal()[:-1]))


def forward_transfer(a_TT: np.ndarray, untrained_T: np.ndarray) -> float:
    """What earlier trainings did for domains to come: the mean over i > 0 of a[i-1, i] - b[i].

    Args:
        a_TT: the scores.
        untrained_T: b, the scores of the model as it was initialised.
    """
    a, b = _matrix(a_TT), np.asarray(untrained_T, np.float64)
    if b.shape != (len(a),):
        raise ConfigError(
            "impossible scores", where="untrained_T", value=list(b.shape), rule=f"[{len(a)}]"
        )
    return float(np.mean([a[i - 1, i] - b[i] for i in range(1, len(a))]))


def _matrix(a_TT: np.ndarray) -> np.ndarray:
    a = np.asarray(a_TT, np.float64)
    if a.ndim != 2 or a.shape[0] != a.shape[1] or len(a) < 2:
        raise ConfigError(
            "impossible scores",
            where="a_TT",
            value=list(a.shape),
            rule="a row for each training and a column for each domain, at least two of both",
        )
    return a
