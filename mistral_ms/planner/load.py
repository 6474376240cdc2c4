"""How evenly tokens are spread over experts, and what that costs.

Under a capacity the shapes are static: a step takes as long whatever the router says, and what
finds its expert full is dropped. Without one nothing is dropped, and the ranks of an expert group
wait for the one whose experts have most.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mistral_ms.config import ModelConfig, RoutingConfig, expert_capacity
from mistral_ms.errors import ConfigError
from mistral_ms.reading import LINE_BYTES, read_text

Loads = tuple[float, ...]
"""Share of all choices that each expert gets; they add up to 1."""


@dataclass(frozen=True, slots=True)
class Balance:
    """What uneven loads cost.

    Attributes:
        slowest: rows of the fullest rank of an expert group, in multiples of the average.
        dropped: share of choices that find their expert full.
    """

    slowest: float = 1.0
    dropped: float = 0.0


EVEN = Balance()
"""Every rank has as much to do."""


def zipf(experts: int, exponent: float) -> Loads:
    """The n-th expert gets a share in proportion to 1 / n ** exponent; 0 is even.

    Raises:
        ConfigError: a negative exponent.
    """
    if not 0 <= exponent < math.inf:
        rule = "an exponent of 0 or more"
        raise ConfigError("impossible skew", where="--expert-load", value=exponent, rule=rule)
    weights = [1 / (n + 1) ** exponent for n in range(experts)]
    return tuple(weight / sum(weights) for weight in weights)


def balance(
    model: ModelConfig,
    routing: RoutingConfig,
    ep: int,
    tokens: int,
    loads: Sequence[Loads],
    seq_length: int = 1,
) -> Balance:
    """What loads cost in a layout.

    Args:
        model: the architecture.
        routing: the policy.
        ep: ranks that share the experts, each as many, in their order.
        tokens: T of a rank's micro-batch; every rank's choices have the same shares.
        loads: of each sparse layer; the mean over layers is taken. None: even.
        seq_length: tokens of each sequence, for a capacity that goes by sequences; local groups
            have the same shares, too.
    """
    if model.moe is None or not loads:
        return EVEN
    K, counts = model.moe.num_experts_per_tok, model.expert_counts
    if len(set(counts)) == 1 or len(loads) != len(counts):
        counts = (model.moe.num_local_experts,) * len(loads)
    loads = [_of_first(layer, count) for layer, count in zip(loads, counts, strict=True)]
    if routing.policy == "dropless":
        fullest = [max(sum(_held(layer, ep, rank)) for rank in range(ep)) * ep for layer in loads]
        return Balance(slowest=sum(fullest) / len(fullest))
    if routing.policy == "experts_choose":
        return EVEN
    kept = []
    for layer in loads:
        capacity = expert_capacity(tokens, len(layer), K, routing, seq_length)
        kept.append(sum(min(share * K * tokens, capacity) for share in layer))
    return Balance(dropped=1 - sum(kept) / len(kept) / (K * tokens))


def _of_first(layer: Loads, experts: int) -> Loads:
    """The shares of a layer that has so many experts."""
    if len(layer) == experts:
        return layer
    total = sum(layer[:experts])
    return tuple(share / total for share in layer[:experts])


def _held(layer: Loads, ep: int, rank: int) -> Loads:
    """Those of one rank of an expert group."""
    local = len(layer) // ep
    return layer[rank * local : (rank + 1) * local]


def read_loads(path: Path, experts: int) -> tuple[Loads, ...]:
    """The loads that the last step of a training recorded.

    Args:
        path: its ``metrics.jsonl``; a line's ``expert_load`` has a list of choices of each expert
            for each sparse layer.
        experts: E.

    Raises:
        ConfigError: it cannot be read, or no line has loads of so many experts.
    """
    for line in reversed(read_text(path, ConfigError, LINE_BYTES).splitlines()):
        try:
            found = json.loads(line)["expert_load"]
        except (ValueError, TypeError, KeyError):
            continue
        if isinstance(found, list) and found:
            loads = [_shares(layer, experts) for layer in found]
            if None not in loads:
                return tuple(each for each in loads if each is not None)
    raise ConfigError(
        "no expert loads",
        where=path,
        rule=f"a line of metrics.jsonl has expert_load with {experts} numbers for each layer",
    )


def _shares(layer: object, experts: int) -> Loads | None:
    """A layer's loads, to add up to 1; None if they are none."""
    if not isinstance(layer, list) or len(layer) != experts:
        return None
    numbers = [float(x) for x in layer if isinstance(x, int | float) and 0 <= x < math.inf]
    if len(numbers) < experts or sum(numbers) == 0:
        return None
    return tuple(number / sum(numbers) for number in numbers)
