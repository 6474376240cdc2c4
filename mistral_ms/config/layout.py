"""The rules that a parallel layout obeys, and the search for the nearest one that does.

Each rule is written once, as a sentence with the values in it. The same function judges what the
user asked for and every candidate of the search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from mistral_ms.config.model import ModelConfig


@dataclass(frozen=True, order=True)
class Sizes:
    """The sizes of a layout: what is divided among how many.

    Attributes:
        dp: data-parallel replicas of the dense model.
        mp: tensor-parallel shards of every matrix.
        pp: pipeline stages.
        ep: data-parallel neighbours that share one set of experts.
    """

    dp: int
    mp: int
    pp: int
    ep: int

    @property
    def world(self) -> int:
        """Processes in all."""
        return self.dp * self.mp * self.pp

    def __str__(self) -> str:
        return f"dp={self.dp} mp={self.mp} pp={self.pp} ep={self.ep}"


LayoutRule: TypeAlias = Callable[[Sizes, int], str | None]
"""From sizes and devices per node to the sentence that they break, with the values in it."""


@dataclass(frozen=True)
class Rules:
    """What a layout must fit.

    Attributes:
        world: processes that are there; None = as many as the layout has.
        devices_per_node: processes on one machine.
        route: what the all-to-all route asks; None = nothing.
        sharded_rows: whether tensor-parallel ranks carry a shard of every row each.
        model: the model to divide; None = any.
    """

    world: int | None = None
    devices_per_node: int = 8
    route: LayoutRule | None = None
    sharded_rows: bool = False
    model: ModelConfig | None = None

    def broken_by(self, sizes: Sizes) -> str | None:
        """The first rule that ``sizes`` breaks, with the values in it; None when all hold."""
        for broken in (self._sizes, self._nodes, self._route, self._experts, self._matrices):
            if rule := broken(sizes):
                return rule
        return None

    def nearest(self, sizes: Sizes, count: int = 3) -> tuple[Sizes, ...]:
        """The legal layouts closest to ``sizes``, best first; the distance is that of logarithms.

        When the number of processes itself cannot be divided into whole nodes there are none.
        """
        world = max(1, sizes.world) if self.world is None else self.world
        legal = [each for each in factorisations(world) if self.broken_by(each) is None]
        return tuple(sorted(legal, key=lambda each: (_distance(each, sizes), each))[:count])

    def _sizes(self, sizes: Sizes) -> str | None:
        for name in ("dp", "mp", "pp", "ep"):
            if getattr(sizes, name) < 1:
                return f"{name} ({getattr(sizes, name)}) must be at least 1"
        if self.world is not None and sizes.world != self.world:
            return (
                f"dp * mp * pp ({sizes.dp} * {sizes.mp} * {sizes.pp} = {sizes.world}) must be "
                f"the number of processes ({self.world})"
            )
        if sizes.dp % sizes.ep:
            return f"ep ({sizes.ep}) must divide dp ({sizes.dp})"
        if self.sharded_rows and sizes.mp == 1:
            return "group_wise_a2a needs tensor-parallel ranks (mp > 1)"
        return None

    def _nodes(self, sizes: Sizes) -> str | None:
        devices = self.devices_per_node
        if devices < 1:
            return f"devices_per_node ({devices}) must be at least 1"
        if sizes.world > devices and sizes.world % devices:
            return (
                f"devices_per_node ({devices}) must divide the number of processes "
                f"({sizes.world}): nodes are used whole"
            )
        return None

    def _route(self, sizes: Sizes) -> str | None:
        return None if self.route is None else self.route(sizes, self.devices_per_node)

    def _experts(self, sizes: Sizes) -> str | None:
        if self.model is None or sizes.ep == 1:
            return None
        if self.model.moe is None:
            return f"ep ({sizes.ep}) must be 1 for a model without experts"
        for experts in {self.model.moe.num_local_experts, *self.model.expert_counts}:
            if experts % sizes.ep:
                return f"ep ({sizes.ep}) must divide num_local_experts ({experts})"
        return None

    def _matrices(self, sizes: Sizes) -> str | None:
        if self.model is None:
            return None
        if self.model.qk_norm == "full" and sizes.mp > 1:
            return f"mp ({sizes.mp}) must be 1 with qk_norm full: one mean square of all heads"
        for name, size in _divided(self.model, self.sharded_rows):
            if size % sizes.mp:
                return f"mp ({sizes.mp}) must divide {name} ({size})"
        layers = self.model.num_hidden_layers
        if sizes.pp > layers:
            return f"pp ({sizes.pp}) must not exceed num_hidden_layers ({layers})"
        return None


def _divided(model: ModelConfig, rows: bool) -> Iterator[tuple[str, int]]:
    """What tensor parallelism divides, by the keys that say it.

    Args:
        model: the model.
        rows: whether it divides rows of hidden states, too.
    """
    for name in ("num_attention_heads", "num_key_value_heads"):
        yield name, getattr(model, name)
    dense = len(model.sparse_layers) < model.num_hidden_layers
    if dense or model.extra_feed_forwards:
        yield "intermediate_size", model.intermediate_size
    if model.moe is not None:
        own = model.moe.moe_intermediate_size is not None
        yield "moe_intermediate_size" if own else "intermediate_size", model.expert_size
        own = model.moe.shared_expert_intermediate_size is not None
        name = "shared_expert_intermediate_size" if own else "the shared experts' width"
        yield name, model.shared_expert_size
    yield "vocab_size", model.vocab_size
    if rows:
        yield "hidden_size", model.hidden_size


def factorisations(world: int) -> Iterator[Sizes]:
    """Every (dp, mp, pp, ep) with dp * mp * pp = world and ep dividing dp."""
    for dp in divisors(world):
        for mp in divisors(world // dp):
            for ep in divisors(dp):
                yield Sizes(dp, mp, world // dp // mp, ep)


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def check_layout(
    sizes: Sizes, rules: Rules, error: Callable[..., Exception], where: str = "layout"
) -> None:
    """Raises ``error`` with the broken rule, the layout and the nearest legal ones, if any.

    Args:
        sizes: the layout.
        rules: what it must fit.
        error: a class of :mod:`mistral_ms.errors`.
        where: for the message.
    """
    rule = rules.broken_by(sizes)
    if rule is not None:
        raise error(
            "impossible layout", where=where, value=sizes, rule=rule, todo=advice(sizes, rules)
        )


def advice(sizes: Sizes, rules: Rules) -> str:
    """The nearest legal layouts, as the last part of a message."""
    nearest = "; ".join(map(str, rules.nearest(sizes)))
    return f"nearest legal layouts: {nearest}" if nearest else "no layout of these processes fits"


def _distance(a: Sizes, b: Sizes) -> float:
    pairs = ((a.dp, b.dp), (a.mp, b.mp), (a.pp, b.pp), (a.ep, b.ep))
    # rounded: equal distances must compare equal whatever the order of the additions
    return round(sum(abs(math.log(x / max(1, y))) for x, y in pairs), 9)
