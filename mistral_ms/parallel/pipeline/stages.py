"""Which layers each pipeline stage holds."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from mistral_ms.config import ModelConfig
from mistral_ms.errors import TopologyError
from mistral_ms.parallel.pipeline.costs import LayerCosts, layer_costs

USUAL_LENGTH = 4096
"""Tokens of a sequence for which stages are balanced, whatever a run's sequences are: which rank
holds what then depends on nothing but the model and the layout.
"""


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        number: 0 holds the embedding.
        layers: indices of its decoder blocks, at least one.
        embedding: whether it embeds the tokens.
        head: whether it holds the final norm, the output head and the loss.
        cost: of everything it holds.
    """

    number: int
    layers: range
    embedding: bool
    head: bool
    cost: float


def stages_of(model: ModelConfig, pp: int) -> tuple[Stage, ...]:
    """The stages of a model.

    Args:
        model: the whole model.
        pp: how many stages.

    Raises:
        TopologyError: more stages than layers.
    """
    length = min(model.max_position_embeddings, USUAL_LENGTH)
    return balance(layer_costs(model, length), pp)


@lru_cache(maxsize=256)  # a search for a layout asks often
def balance(costs: LayerCosts, stages: int) -> tuple[Stage, ...]:
    """Consecutive layers to stages so that the dearest stage is as cheap as possible.

    A pipeline is as slow as its slowest stage. Among all divisions with the smallest possible
    maximum, the one with the smallest sum of squares: what is left is spread evenly. Exact, by
    dynamic programming over (stages, layers): stages * layers^2 steps.

    Args:
        costs: of the layers, and of embedding and head, which the first and last stage hold.
        stages: pp.

    Raises:
        TopologyError: more stages than layers, or none.
    """
    layers = len(costs.layers)
    if not 1 <= stages <= layers:
        raise TopologyError(
            "impossible pipeline",
            where="stages",
            value=stages,
            rule=f"every stage holds at least one of the {layers} layers",
            todo=f"1 to {layers} stages",
        )
    table = _Costs(costs, stages)
    limit = _smallest_maximum(table)
    ends = _most_even(table, limit)
    found, start = [], 0
    for number, end in enumerate(ends):
        held = table.of(number, start, end)
        found.append(Stage(number, range(start, end), number == 0, number == stages - 1, held))
        start = end
    return tuple(found)


class _Costs:
    """The cost of any run of layers on any stage."""

    def __init__(self, costs: LayerCosts, stages: int) -> None:
        self.layers, self.stages = len(costs.layers), stages
        self.embedding, self.head = costs.embedding, costs.head
        self.before = list(accumulate(costs.layers, initial=0.0))

    def of(self, stage: int, start: int, end: int) -> float:
        """Layers start .. end on a stage, with what else it holds."""
        cost = self.before[end] - self.before[start]
        cost += self.embedding if stage == 0 else 0.0
        return cost + (self.head if stage == self.stages - 1 else 0.0)

    def starts(self, stage: int, end: int) -> Iterator[int]:
        """Where a stage that ends at ``end`` may start: each one before it holds a layer."""
        yield from ([0] if stage == 0 else range(stage, end))


def _smallest_maximum(table: _Costs) -> float:
    best = [math.inf] * (table.layers + 1)
    for stage in range(table.stages):
        before = best if stage else [-math.inf] * (table.layers + 1)
        best = [math.inf] * (table.layers + 1)
        for end in range(stage + 1, table.layers + 1):
            best[end] = min(
                max(before[start], table.of(stage, start, end))
                for start in table.starts(stage, end)
            )
    return best[table.layers]


def _most_even(table: _Costs, limit: float) -> list[int]:
    """The ends of the stages with the smallest sum of squares, none above ``limit``."""
    Routing = tuple[float, list[int]]
    best: dict[int, Routing] = {0: (0.0, [])}
    for stage in range(table.stages):
        found: dict[int, Routing] = {}
        for end in range(stage + 1, table.layers + 1):
            for start in table.starts(stage, end):
                cost = table.of(stage, start, end)
                if cost > limit or start not in best:
                    continue
                total = best[start][0] + cost * cost
                if end not in found or total < found[end][0]:
                    found[end] = total, [*best[start][1], end]
        best = found
    return best[table.layers][1]
