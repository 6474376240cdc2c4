"""The ways to run a training that a search looks at: who divides it, how tokens are dispatched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from mistral_ms.config import RunConfig
from mistral_ms.planner.changed import with_policy
from mistral_ms.planner.memory import Execution

Policy = Literal["capacity", "dropless"]
POLICIES: tuple[Policy, ...] = ("capacity", "dropless")


@dataclass(frozen=True, slots=True)
class Way:
    """How layouts are run.

    Attributes:
        execution: who divides the training.
        interleaved: whether only interleaved pipelines are looked for, because the graph, which
            would run the others, has none.
    """

    execution: Execution
    interleaved: bool = False


def ways(run: RunConfig, device: str) -> tuple[Way, ...]:
    """How a training's layouts may be run.

    Args:
        run: the training.
        device: of the cluster.
    """
    own = run.parallel.execution_on(device)
    if run.parallel.execution == "auto" and own == "graph":
        return Way("graph"), Way("explicit", interleaved=True)
    return (Way(own),)


def of_policies(run: RunConfig, policies: Iterable[Policy]) -> Iterator[RunConfig]:
    """The training, and the same under other policies that its other settings allow."""
    yield run
    for policy in policies:
        if run.model.moe is None or policy == run.routing.policy:
            continue
        if (changed := with_policy(run, policy)) is not None:
            yield changed
