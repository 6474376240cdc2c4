"""What one side computed for one prompt: plain NumPy, the same for torch and MindSpore."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np


@dataclass(frozen=True)
class Trace:
    """One prompt through one implementation.

    Attributes:
        logits_SV: float32.
        hidden: name of each place in the network -> float32 [S, H], in the order of computation:
            ``embedding``, then for every layer ``layer N attention`` (what attention adds),
            ``layer N feed-forward`` (what the feed-forward or the experts add) and ``layer N``.
        experts: sparse layer -> int [S, K], chosen experts of each token, sorted.
    """

    logits_SV: np.ndarray
    hidden: dict[str, np.ndarray]
    experts: dict[int, np.ndarray]


Rivals: TypeAlias = tuple[tuple[int, float], ...]
"""The most likely tokens of one step of generation with their logits, best first."""


@dataclass(frozen=True)
class Side:
    """All prompts through one implementation.

    Attributes:
        traces: one for each prompt.
        greedy: greedily continued token ids of each prompt.
        rivals: of each prompt, for each of these tokens, what it was chosen among; the oracle
            alone records them.
        exact: the traces of the same weights computed in float32; of an oracle that computes in
            bfloat16 alone.
    """

    traces: list[Trace] = field(default_factory=list)
    greedy: list[list[int]] = field(default_factory=list)
    rivals: list[list[Rivals]] = field(default_factory=list)
    exact: list[Trace] = field(default_factory=list)
