"""Batches that are nearly empty, or whose tokens all want the same experts."""

from __future__ import annotations

import numpy as np

from mistral_ms.config import IGNORE_INDEX
from mistral_ms.datasets.batches import Batch

STEPS = 3
TRAINED = {
    "plain": "dp2 ep2 interleaved",
    "muon on the host, two micro-batches, dropless, held": "dp2 ep2 zero1, muon",
}
"""Trainings of two processes, by variant, that go on with these batches: they have compiled."""


def batches() -> dict[str, Batch]:
    """Of 16 windows of 8 tokens; the second rank sees the last eight windows."""
    ids = np.random.default_rng(5).integers(3, 48, (16, 8)).astype(np.int32)
    only_first = np.zeros((16, 8), bool)
    only_first[:8] = True
    one_each = np.zeros((16, 8), bool)
    one_each[[0, 8], 0] = True
    every = np.ones((16, 8), bool)
    return {
        "one rank sees padding only": _batch(ids, only_first),
        "one token a rank": _batch(ids, one_each),
        # equal tokens that see equal tokens have equal states, so all choose the same experts
        "all tokens to the same experts": _batch(np.full_like(ids, 7), every),
    }


def _batch(ids_BS: np.ndarray, present_BS: np.ndarray) -> Batch:
    labels_BS = np.where(present_BS, np.roll(ids_BS, -1, 1), IGNORE_INDEX).astype(np.int32)
    positions_BS = np.where(present_BS, np.arange(8), -1).astype(np.int32)
    segments_BS = np.where(present_BS, 0, -1).astype(np.int32)
    return Batch(ids_BS, labels_BS, positions_BS, segments_BS, np.arange(16, dtype=np.int32))
