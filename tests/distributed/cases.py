"""What is dispatched: layouts and token batches, known to workers and tests alike. No MindSpore."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from support.configs import model as small_model
from support.routing import random_choices

from mistral_ms.config import ModelConfig, ParallelConfig, RoutingConfig
from mistral_ms.parallel.topology import Topology

E, K, H, I = 8, 2, 8, 12  # noqa: E741
TOKENS = 6
BATCHES = {"random": TOKENS, "one_expert": TOKENS, "padding_rank": TOKENS, "one_token": 1}
"""Name and tokens per rank of every batch."""
ROUTINGS = {
    "capacity": RoutingConfig(policy="capacity", capacity_factor=1.5),
    "choice_major": RoutingConfig(
        policy="capacity", capacity_factor=0.7, drop_priority="choice_major"
    ),
    "dropless": RoutingConfig(),
}


@dataclass(frozen=True)
class Case:
    """One way to dispatch.

    Attributes:
        dp, mp, ep: of the layout; pp is 1.
        devices: devices per node.
        way: the route of the all-to-all.
        sharded: whether each tensor-parallel rank carries a shard of every row.
        policy: a key of ROUTINGS.
    """

    dp: int
    mp: int
    ep: int
    devices: int
    way: Literal["flat", "hierarchical"]
    sharded: bool
    policy: str

    @property
    def name(self) -> str:
        way = f"{self.way}-sharded" if self.sharded else self.way
        return f"dp{self.dp}mp{self.mp}ep{self.ep}on{self.devices}-{way}-{self.policy}"

    @property
    def layout(self) -> tuple[int, int, int, int]:
        return self.dp, self.mp, self.ep, self.devices

    @property
    def routing(self) -> RoutingConfig:
        return ROUTINGS[self.policy]

    @property
    def parallel(self) -> ParallelConfig:
        return ParallelConfig(
            dp=self.dp,
            mp=self.mp,
            ep=self.ep,
            devices_per_node=self.devices,
            all_to_all=self.way,
            group_wise_a2a=self.sharded,
        )

    @property
    def topology(self) -> Topology:
        return Topology.of(self.parallel)


@dataclass(frozen=True)
class Batch:
    """The tokens of one data-parallel rank, and the gradient that comes back for them."""

    x_TH: np.ndarray
    experts_TK: np.ndarray
    weights_TK: np.ndarray
    valid_T: np.ndarray
    dout_TH: np.ndarray


def batch(name: str, dp: int) -> Batch:
    """A function of the name and of the data-parallel rank."""
    rng = np.random.default_rng([zlib.crc32(name.encode()), dp])
    T = BATCHES[name]
    experts = random_choices(rng, T, E, K)
    valid = np.ones(T, np.float32)
    if name == "random":
        valid[rng.integers(T)] = 0
        experts[dp % 2 :: 3, 1] = E  # second choices that a gate leaves out
    if name == "one_expert":  # and the same second one
        experts[:] = (5, 2)
    if name == "padding_rank" and dp == 1:
        valid[:] = 0
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    weights = rng.random((T, K), np.float32) * (experts < E)
    return Batch(normal(T, H), experts, weights.astype(np.float32), valid, normal(T, H))


def batches(case: Case) -> tuple[str, ...]:
    """All of them, and two extremes where a batch says nothing new: another way brings the same."""
    few = case.mp > 1 or case.way != "flat" or case.dp == 8
    return ("random", "one_expert") if few else tuple(BATCHES)


def factor(expert: np.ndarray) -> np.ndarray:
    """What a stand-in for expert ``expert`` multiplies squares by: other experts, other results."""
    return (1 + expert / 16).astype(np.float32)


def model() -> ModelConfig:
    return small_model(hidden_size=H, intermediate_size=I, num_attention_heads=2, vocab_size=32)


def expert_weights() -> dict[str, np.ndarray]:
    """Whole stacked weights."""
    rng = np.random.default_rng(11)
    shapes = {"w1": (E, I, H), "w2": (E, H, I), "w3": (E, I, H)}
    return {n: (rng.normal(size=s) / np.sqrt(s[-1])).astype(np.float32) for n, s in shapes.items()}


def cases(*layouts: tuple[int, int, int, int], policies: tuple[str, ...]) -> list[Case]:
    """All ways and policies for the layouts, ways that say the same left out."""
    found = []
    for dp, mp, ep, devices in layouts:
        ways = ["flat"]
        ways += ["hierarchical"] if ep > 1 and dp * mp > devices else []
        rows = [False, True] if mp > 1 else [False]
        found += [
            Case(dp, mp, ep, devices, way, sharded, policy)
            for way in ways
            for sharded in rows
            for policy in policies
        ]
    return found


CASES = {
    2: cases((2, 1, 2, 1), (1, 2, 1, 2), policies=("capacity", "choice_major", "dropless")),
    4: [
        *cases((4, 1, 4, 2), (2, 2, 2, 2), policies=("capacity", "dropless")),
        *cases((4, 1, 2, 4), policies=("dropless",)),
    ],
    8: cases((8, 1, 8, 4), policies=("capacity", "dropless")),
}
"""The cases of each world size. (8, 1, 8, 4): two nodes of four, one expert group over both."""

GRAPH = (Case(4, 1, 4, 2, "hierarchical", False, "dropless"),)
"""Cases that run in GRAPH_MODE too. Compiling one costs seconds in every process, so: the way that
no training of training.py has; those compile flat and group-wise, capacity and dropless."""
