"""Choices of experts that routing must cope with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from kernels.operators import oracles


def choices(rng: np.random.Generator, T: int, K: int, E: int, kind: str) -> np.ndarray:
    """[T, K] int32, K different experts a token.

    Kinds: `even`; `one`: all tokens want the same experts; `skewed`: some experts get nothing;
    `padded`: a third of the tokens is padding (expert E).
    """
    if kind == "one":
        return np.tile(np.arange(K, dtype=np.int32)[::-1] + (E - K), (T, 1))
    used = E if kind != "skewed" else max(K, E // 3)
    experts = np.stack([rng.permutation(used)[:K] for _ in range(T)]).astype(np.int32)
    if kind == "padded":
        experts[rng.random(T) < 1 / 3] = E
    return experts


@dataclass(frozen=True)
class Route:
    """A routing problem with its row id map."""

    tokens: int
    k: int
    experts: int
    capacity: int
    places: oracles.Places

    @property
    def slots(self) -> int:
        return self.experts * self.capacity


def route(seed: int, T: int, K: int, E: int, C: int, kind: str = "even") -> Route:
    experts = choices(np.random.default_rng(seed), T, K, E, kind)
    return Route(T, K, E, C, oracles.places(experts, E, C, choice_major=False))


ROUTES = {
    "two of eight": route(0, 101, 2, 8, 28),
    "much dropped": route(1, 77, 2, 8, 5),
    "one token": route(2, 1, 2, 8, 1),
    "fewer tokens than blocks": route(3, 5, 2, 4, 3),
    "all to one expert": route(4, 33, 1, 4, 20, "one"),
    "capacity one": route(5, 33, 2, 16, 1),
    "empty experts": route(6, 40, 2, 12, 9, "skewed"),
    "padding": route(7, 64, 2, 8, 16, "padded"),
    "eight of many": route(8, 19, 8, 64, 4),
}
