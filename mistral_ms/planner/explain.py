"""Why the best layout is the best, and why the others are not: in sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from mistral_ms.config import RunConfig
from mistral_ms.parallel.memory import GIB
from mistral_ms.planner.candidate import Candidate

NAMES = {
    "matmul": "matrix products",
    "attention": "attention",
    "memory_bound": "operators bound by memory",
    "recompute": "computing again",
    "all_to_all": "all-to-all",
    "tensor_parallel": "tensor-parallel collectives",
    "accumulation": "adding gradients up",
    "transfers": "messages between stages",
    "bubble": "pipeline bubble",
    "gradient_reduction": "reduction of gradients",
    "weights_gather": "gathering weights",
    "gradient_norm": "norm of gradients",
    "optimizer": "optimizer",
}
"""What a step is spent on, for readers."""
USEFUL = ("matmul", "attention", "memory_bound")
"""What one card that has all of the model's memory would spend its time on, too."""


def counted(number: int, name: str) -> str:
    """So many of something."""
    ending = "" if number == 1 else "es" if name.endswith("ch") else "s"
    return f"{number} {name}{ending}"


def duration(seconds: float) -> str:
    """Seconds for a reader."""
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{1000 * seconds:.3g} ms"


def title(candidate: Candidate) -> str:
    """A layout in one line."""
    parallel, training = candidate.run.parallel, candidate.run.training
    text = f"{parallel.sizes}, "
    if parallel.pp_interleave_num > 1:
        text += f"{parallel.pp_interleave_num} interleaved chunks a stage ({candidate.execution}), "
    text += f"{counted(training.gradient_accumulation_steps, 'micro-batch')}"
    text += f", recompute {parallel.recompute}"
    if training.offload_optimizer == "host":
        text += ", optimizer on the host"
    if parallel.all_to_all != "flat":
        text += f", {parallel.all_to_all} all-to-all"
    return text + (", rows sharded" if parallel.group_wise_a2a else "")


def explain(
    candidates: Sequence[Candidate], asked: RunConfig | None = None, devices_per_node: int = 1
) -> list[str]:
    """Sentences about the first layout, and why the second one lost.

    Args:
        candidates: the best first, as :func:`mistral_ms.planner.plan` gives them.
        asked: the run that was planned, to say where the first layout trains something else.
        devices_per_node: of the cluster; where nothing fits, whole nodes are added.
    """
    fitting = [each for each in candidates if each.fits]
    if not fitting:
        return [*_what_would_have_to_change(candidates[0], devices_per_node)]
    first = fitting[0]
    return [
        *_about(first),
        *_otherwise(first, fitting, asked),
        *(_lost(first, fitting[1]) if len(fitting) > 1 else ()),
    ]


def _otherwise(
    first: Candidate, fitting: Sequence[Candidate], asked: RunConfig | None
) -> Iterator[str]:
    """What the first layout does that was not asked for."""
    if asked is None:
        return
    left_open = asked.parallel.execution == "auto" and first.run.parallel.execution == "explicit"
    if left_open:
        graph = next((each for each in fitting if each.execution == "graph"), None)
        text = (
            "Its stages are interleaved, which MindSpore's graph refuses: the run says "
            "parallel.execution explicit"
        )
        if graph is None:
            yield f"{text}. Of the graph no layout fits."
        else:
            behind = 1 - graph.tokens_per_s_per_card / first.tokens_per_s_per_card
            yield f"{text}. The graph's fastest is {title(graph)}: {behind:.1%} slower."
    policy, own = first.run.routing.policy, asked.routing.policy
    if first.run.model.moe is not None and policy != own:
        yield (
            f"Its dispatch is {policy}, and the run file's {own}: it trains something else"
            + (
                f", for {first.balance.dropped:.1%} of the choices are dropped"
                * (own == "dropless")
            )
            + "."
        )


def other_dispatch(other: Candidate, *, even: bool) -> str:
    """A sentence about the first layout under another dispatch policy.

    Args:
        other: that layout with the policy.
        even: whether experts were taken for evenly loaded.
    """
    text = (
        f"With routing.policy {other.run.routing.policy} the same layout would give "
        f"{other.tokens_per_s_per_card:.0f} tokens/s per card"
    )
    fits = "" if other.fits else f", but it needs {other.memory.gib:.1f} GiB"
    dropped = f", and drop {other.balance.dropped:.1%} of the choices"
    text += dropped if other.balance.dropped else ", if experts are evenly loaded" * even
    return f"{text}{fits}: --dispatch any plans both."


def _about(first: Candidate) -> Iterator[str]:
    step, memory = first.step, first.memory
    assert step is not None
    whole = step.seconds
    spent = sorted(step.breakdown.items(), key=lambda item: -item[1])
    shares = ", ".join(
        f"{NAMES[name]} {part / whole:.0%}" for name, part in spent if part > whole / 200
    )
    yield (
        f"A step takes {duration(whole)}, on stage {step.slowest}, which has most to do: {shares}."
    )
    limits = {name: part for name, part in step.breakdown.items() if name not in USEFUL}
    limit = max(limits, key=lambda name: limits[name])
    if limits[limit] > whole / 200:
        yield f"What costs most beside the model itself is {NAMES[limit]}."
    yield f"Critical path: {step.critical}."
    parts = sorted(memory.parts.items(), key=lambda item: -item[1])
    held = ", ".join(
        f"{name.replace('_', ' ')} {part / GIB:.1f}" for name, part in parts if part > GIB / 20
    )
    yield (
        f"The fullest card, on stage {memory.stage}, holds {memory.gib:.1f} of "
        f"{first.usable_gib:.0f} GiB: {held}."
    )
    if memory.host_optimizer:
        yield f"The optimizer takes {memory.host_optimizer / GIB:.1f} GiB of host memory a card."
    if first.balance.dropped > 0:
        yield f"Of the choices {first.balance.dropped:.1%} find their expert full and are dropped."
    if first.balance.slowest > 1:
        yield (
            f"Experts are loaded unevenly: the fullest rank computes {first.balance.slowest:.2f} "
            "times the average, and the others wait for it."
        )


def _lost(first: Candidate, second: Candidate) -> Iterator[str]:
    """Where the runner-up's time goes, token for token: both have the same batch."""
    assert first.step is not None and second.step is not None
    behind = 1 - second.tokens_per_s_per_card / first.tokens_per_s_per_card
    names = {*first.breakdown, *second.breakdown}
    more = {
        name: second.breakdown.get(name, 0.0) - first.breakdown.get(name, 0.0) for name in names
    }
    worst = sorted((name for name in names if more[name] > 0), key=lambda name: -more[name])[:2]
    better = sorted((name for name in names if more[name] < 0), key=lambda name: more[name])[:1]
    text = f"Runner-up: {title(second)}: {behind:.1%} slower"
    if worst:
        text += "; more for " + " and ".join(f"{NAMES[n]} (+{more[n]:.2f} s)" for n in worst)
    if better:
        text += "; less for " + " and ".join(f"{NAMES[n]} ({more[n]:.2f} s)" for n in better)
    yield text + "."


def _what_would_have_to_change(smallest: Candidate, devices_per_node: int) -> Iterator[str]:
    """Of a cluster that is too small."""
    memory, parallel = smallest.memory, smallest.run.parallel
    lacking = memory.gib - smallest.usable_gib
    yield (
        f"No layout fits. The smallest, {title(smallest)}, needs {memory.gib:.1f} GiB a card, "
        f"{max(lacking, 0):.1f} more than there are."
    )
    largest = max(memory.parts, key=lambda name: memory.parts[name])
    yield f"Most of it is {largest.replace('_', ' ')} ({memory.parts[largest] / GIB:.1f} GiB)."
    fixed = memory.weights + memory.gathered + memory.gradients + memory.micro_batch_gradients
    fixed += memory.optimizer
    if fixed > memory.total / 2:
        room = fixed - lacking * GIB
        need = "more cards"
        if room > 0:
            nodes = math.ceil(parallel.world * fixed / room / devices_per_node)
            need = f"about {nodes * devices_per_node} cards"
            need += f" ({counted(nodes, 'node')})" * (devices_per_node > 1)
        yield f"Weights, gradients and optimizer state shrink with pp, ep and mp: {need} would do."
    else:
        yield (
            "Activations shrink with shorter sequences, and with more sequences in the global "
            f"batch for more micro-batches than {smallest.run.training.gradient_accumulation_steps}"
            f" (dp is {parallel.dp})."
        )
