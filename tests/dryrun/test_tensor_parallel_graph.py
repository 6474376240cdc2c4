"""Tensor parallelism in the auto-parallel graph: matrices divided, rows divided between them.

Groups are written out by hand: dp=4, mp=2, ep=2 is (copy, expert, tensor) = (2, 2, 2), and rank 3
is the second of expert group 0's second place. Two micro-batches, no pipeline.
"""

from __future__ import annotations

import re
from collections import Counter

import pytest
from dryrun.small_runs import (
    FLOAT,
    HALF,
    KEYS,
    QUERIES,
    WIDE,
    C,
    E,
    H,
    S,
    V,
    layers_of,
    small_run,
)

from mistral_ms.config import ParallelConfig
from mistral_ms.errors import DryrunError
from mistral_ms.parallel.dryrun.ir import read
from mistral_ms.parallel.dryrun.report import report
from mistral_ms.parallel.topology import Topology

LAYOUT, RANK, WORLD, MICRO = {"dp": 4, "mp": 2, "ep": 2}, 3, 8, 2
LAYERS = layers_of(LAYOUT)
TENSOR, EXPERT, COPIES, SAME_SHARE = (2, 3), (1, 3), (3, 7), (1, 3, 5, 7)
ALL = tuple(range(WORLD))
FORWARD, BACKWARD = "forward", "backward"
STATES, PLACES = S * H * HALF, E * C * H * HALF


@pytest.fixture(scope="module")
def text(compile_run):
    return compile_run(small_run(LAYOUT, MICRO), RANK)


def counted(text, groups):
    counts = Counter()
    for each in read(text, RANK, WORLD, groups).communication:
        counts[each.operator, str(each.phase), each.ranks, each.nbytes] += each.times
    return counts


def activations(text, groups):
    """What travels of token rows: no reductions of weights, no scalars."""
    return {
        key: n for key, n in counted(text, groups).items() if key[2] in (TENSOR, EXPERT)
    }  # fmt: skip


PER_LAYER = {
    # before q, k, v together, and before the sparse layer
    ("AllGather", FORWARD, TENSOR, STATES // 2): 2,
    # the output of attention, a partial sum on each rank, becomes a rank's rows
    ("ReduceScatter", FORWARD, TENSOR, STATES): 1,
    # each the other's gradient
    ("AllGather", BACKWARD, TENSOR, STATES // 2): 1,
    ("ReduceScatter", BACKWARD, TENSOR, STATES): 2,
    # experts' partial sums, before they travel back
    ("AllReduce", FORWARD, TENSOR, PLACES): 1,
    ("AllReduce", BACKWARD, TENSOR, PLACES): 1,
    ("AlltoAll", FORWARD, EXPERT, PLACES): 2,
    ("AlltoAll", BACKWARD, EXPERT, PLACES): 2,
}


def test_rows_are_gathered_before_matrices_and_scattered_behind_them(text):
    times = MICRO * LAYERS
    assert activations(*text) == {key: n * times for key, n in PER_LAYER.items()}


def gradients(text, groups):
    """What is added up of weights: by ranks and bytes."""
    counts = Counter()
    for (operator, phase, ranks, size), n in counted(text, groups).items():
        if phase == BACKWARD and ranks not in (TENSOR, EXPERT) and size > FLOAT:
            counts[operator, ranks, size] += n
    return counts


def test_each_gradient_is_added_up_once_a_step_over_those_who_hold_the_weight(text):
    weights = Counter()
    for shape, ranks, times in (
        ((QUERIES // 2, H), SAME_SHARE, LAYERS),  # q
        ((KEYS // 2, H), SAME_SHARE, 2 * LAYERS),  # k, v
        ((H, QUERIES // 2), SAME_SHARE, LAYERS),  # o
        ((E // 2 * H, WIDE // 2), COPIES, 3 * LAYERS),  # experts
        ((E, H), ALL, LAYERS),  # router: the ranks see different rows
        ((H, 1), ALL, 2 * LAYERS + 1),  # norms
        ((V, H), ALL, 2),  # embedding and head, whole
    ):
        weights["AllReduce", ranks, shape[0] * shape[1] * FLOAT] += times
    weights["AllReduce", ALL, (2 + 2 * E) * FLOAT] += LAYERS  # what is noted for the report
    weights["AllReduce", ALL, 2 * FLOAT] += LAYERS
    assert gradients(*text) == weights


def test_matrices_and_experts_are_divided(text):
    held = read(text[0], RANK, WORLD, text[1]).parameters
    for layer in range(LAYERS):
        at = f"layers.{layer}."
        shapes = {
            "attention.q_proj.weight": (QUERIES // 2, H),
            "attention.k_proj.weight": (KEYS // 2, H),
            "attention.v_proj.weight": (KEYS // 2, H),
            "attention.o_proj.weight": (H, QUERIES // 2),
            "moe.router.weight": (E, H),
            **{f"moe.experts.{name}": (E // 2 * H, WIDE // 2) for name in ("w1", "w3", "w2")},
        }
        for prefix in ("", "exp_avg.", "exp_avg_sq.", "accu_grads."):
            assert {name: held[prefix + at + name].shape for name in shapes} == shapes


def test_the_report_knows_every_group(text):
    graph = read(text[0], RANK, WORLD, text[1])
    found = report(graph, Topology.of(ParallelConfig(**LAYOUT)), RANK, 1.0, MICRO)
    groups = {line["group"]: tuple(line["ranks"]) for line in found["communication"]}
    # one stage: the stage is the world
    names = {"tensor": TENSOR, "expert": EXPERT, "expert_data": COPIES, "data": SAME_SHARE}
    assert groups == {**names, "stage": ALL}
    # accumulated without a pipeline: the same for each layer and micro-batch
    assert found["alltoall_per_moe_layer"] == {"forward": 2, "backward": 2}


SHARE = f"({S // 2}, {H})"
MUTATIONS = {
    "rows that are not gathered": (" = AllGather(", " = Identity("),
    "a partial sum that is added up whole": (" = ReduceScatter(", " = AllReduce("),
    "whole rows gathered": (f"(<Tensor[Float16], {SHARE}>)", f"(<Tensor[Float16], ({S}, {H})>)"),
    "another tensor group": (f"group_rank_ids: {TENSOR}", f"group_rank_ids: {COPIES}"),
    "another group of copies": (f"group_rank_ids: {COPIES}", f"group_rank_ids: {EXPERT}"),
    "whole experts": (f"({E // 2 * H}, {WIDE // 2})", f"({E // 2 * H}, {WIDE})"),
    "half a router": (f"({E}, {H})", f"({E // 2}, {H})"),
}
CHECKS = (
    test_rows_are_gathered_before_matrices_and_scattered_behind_them,
    test_each_gradient_is_added_up_once_a_step_over_those_who_hold_the_weight,
    test_matrices_and_experts_are_divided,
    test_the_report_knows_every_group,
)


def broken(text, groups):
    """The checks that a graph does not pass."""
    names = []
    for check in CHECKS:
        try:
            check((text, groups))
        except (AssertionError, DryrunError, KeyError):
            names.append(check.__name__)
    return names


def by_ranks(text, groups):
    """The same text with the ranks of groups made by hand in the place of MindSpore's: what is
    read is then the text alone, which may be changed.
    """
    for name, ranks in groups.items():
        text = re.sub(
            rf'group: "{name}"(.*?)group_rank_ids: \([^)]*\)',
            rf'group: "by hand"\1group_rank_ids: {ranks}',
            text,
        )
    return text


@pytest.fixture(scope="module")
def noticed(text):
    """Which checks fail on each changed graph."""
    plain = by_ranks(*text)
    assert broken(plain, {}) == []
    found = {}
    for mutation, (old, new) in MUTATIONS.items():
        assert old in plain, mutation
        found[mutation] = broken(plain.replace(old, new), {})
    return found


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_changed_graph_is_noticed(noticed, mutation):
    assert noticed[mutation] != []


def test_every_check_notices_something(noticed):
    assert set().union(*noticed.values()) == {check.__name__ for check in CHECKS}
