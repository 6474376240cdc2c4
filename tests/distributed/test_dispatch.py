"""Dispatching between processes equals dispatching in one, whatever way the rows travel."""

from dataclasses import astuple

import numpy as np
import pytest
from distributed.cases import BATCHES, CASES, GRAPH, E, H, K, batch, batches, model
from distributed.oracles import (
    arrived_rows,
    capacity_of,
    experts_local,
    slots,
    stand_in_float64,
    stand_in_local,
)

from mistral_ms.parallel.collectives import Collectives, Groups
from mistral_ms.parallel.dispatchers import make_dispatcher
from mistral_ms.parallel.topology import GroupKind, expert_slice

ALL = [case for world in CASES.values() for case in world]
RUNS = [(case, f"pynative/{name}") for case in ALL for name in batches(case)]
RUNS += [(case, "graph/random") for case in GRAPH]


def every(values):
    return pytest.mark.parametrize("case", values, ids=lambda case: case.name)


def world(case):
    return case.topology.sizes.world


@pytest.mark.parametrize(("case", "run"), RUNS, ids=lambda value: getattr(value, "name", value))
def test_rows_results_and_gradients_equal_those_of_one_process(report, case, run):
    found, name = report(world(case)), run.rpartition("/")[2]
    for coords in case.topology.all_coords:
        key = f"{case.name}/{run}"
        rows = found.get(coords.rank, f"{key}/rows")
        np.testing.assert_array_equal(rows, arrived_rows(case, name, coords.rank))
        np.testing.assert_array_equal(
            found.get(coords.rank, f"{key}/kept"), slots(case, name, coords.dp).kept_TK
        )
        local = stand_in_local(case.policy, name, coords.dp)
        for what, exact in stand_in_float64(case, name, coords.dp).items():
            got = found.get(coords.rank, f"{key}/{what}")
            np.testing.assert_array_equal(got, local[what], err_msg=what)
            # float32 sums of at most 8 products
            np.testing.assert_allclose(got, exact, rtol=1e-5, atol=1e-5, err_msg=what)


@every(ALL)
def test_the_batches_are_the_ordinary_and_the_odd(case):
    """Experts without tokens, ranks without tokens, choices that a gate left out, and (capacity)
    choices without a slot.
    """
    rows = [arrived_rows(case, "one_expert", rank) for rank in range(world(case))]
    assert any(not each.any() for each in rows) == (case.ep > 2)
    if case.policy == "dropless":
        sent = [slots(case, "one_expert", dp).filled_EC.reshape(E, -1) for dp in range(case.dp)]
        assert not sum(sent).any(1).all()
    else:
        assert any(not each.any((1, 2)).all() for each in rows)
    if case.dp > 1:
        assert not slots(case, "padding_rank", 1).kept_TK.any()
    one = batch("random", 0)
    chosen = (one.experts_TK < E) & (one.valid_T[:, None] > 0)
    assert 0 < (one.experts_TK == E).sum() < K * len(one.x_TH)
    dropped = (slots(case, "random", 0).kept_TK[chosen] == 0).any()
    dropped |= (slots(case, "one_expert", 0).kept_TK == 0).any()
    assert dropped == (case.policy != "dropless")


@every(ALL)
def test_identity_experts_give_every_kept_token_back(report, case):
    for coords in case.topology.all_coords:
        got = report(world(case)).get(coords.rank, f"{case.name}/identity")
        share = slots(case, "random", coords.dp).kept_TK.sum(1, keepdims=True) / np.float32(K)
        np.testing.assert_array_equal(got, batch("random", coords.dp).x_TH * share)


EXPERT_CASES = [case for case in ALL if case.policy != "choice_major"]


@every(EXPERT_CASES)
def test_every_way_through_the_experts_gives_the_same_bits(report, case):
    flat = next(
        other
        for other in EXPERT_CASES
        if (other.layout, other.policy, other.way, other.sharded)
        == (case.layout, case.policy, "flat", False)
    )
    found = report(world(case))
    for rank in range(world(case)):
        for what in ("y", "dx", "dweights", "w1", "w2", "w3"):
            got = found.get(rank, f"{case.name}/experts/{what}")
            want = found.get(rank, f"{flat.name}/experts/{what}")
            np.testing.assert_array_equal(got, want, err_msg=what)


@every(EXPERT_CASES)
def test_results_and_gradients_of_the_experts_equal_those_of_one_process(report, case):
    found, topology = report(world(case)), case.topology
    for coords in topology.all_coords:
        local = experts_local(case.policy, coords.dp)
        for what in ("y", "dx", "dweights"):
            got = found.get(coords.rank, f"{case.name}/experts/{what}")
            close(got, local[what], what)
        copies = topology.group(GroupKind.EXPERT_DATA, coords.rank).ranks
        for what in ("w1", "w2", "w3"):
            got = sum(found.get(rank, f"{case.name}/experts/{what}") for rank in copies)
            want = sum(experts_local(case.policy, dp)[what] for dp in range(case.dp))
            part = expert_slice(model(), topology, coords.rank)
            rows, columns = slice(None), slice(part.columns.start, part.columns.stop)
            inner = (rows, columns) if what == "w2" else (columns, rows)
            close(got, want[(list(part.experts), *inner)], what)


def close(got, want, what):
    # float32 noise of matrix products whose rows stand in other places, added in another order
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-6 * np.abs(want).max(), err_msg=what)
    assert np.abs(want).max() > 0


@every(ALL)
def test_what_was_sent_equals_the_formula(report, case):
    """One dispatch and combine of the batch 'random': what was recorded call by call, what the
    dispatcher counts from sizes alone, and the messages one by one are the same."""
    topology, T = case.topology, BATCHES["random"]
    width = H // case.mp if case.sharded else H
    for coords in topology.all_coords:
        group = topology.group(GroupKind.EXPERT, coords.rank)
        L, C, P = E // case.ep, capacity_of(case, "random"), case.ep
        first = coords.expert_group * case.ep
        choices = np.array(
            [
                slots(case, "random", first + p).filled_EC.reshape(P, L, -1).sum((1, 2))
                for p in range(P)
            ]
        )
        size = 4 * width
        if case.policy == "dropless":
            there, numbers = choices * size, 4 * L * np.ones((P, P), int)
        else:
            there, numbers = np.full((P, P), L * C * size), None
        me = group.position(coords.rank)
        want = journey(case, group, me, there) + journey(case, group, me, there, back=True)
        if numbers is not None:
            want += journey(case, group, me, numbers)
        want += in_tensor_group(case, coords, T * K if numbers is not None else E * C, T, C)
        got = report(world(case)).get(coords.rank, f"{case.name}/traffic")
        np.testing.assert_array_equal(got, want)
        np.testing.assert_array_equal(counted(case, coords), want)


class Silent(Groups):
    """Groups that can count and not communicate."""

    def _make(self, group):
        return Collectives(group, self.coords.rank)


def counted(case, coords):
    """The dispatcher's own count, without any communication."""
    groups = Silent(case.topology, coords.rank, "CPU")
    dispatcher = make_dispatcher(E, case.routing, case.parallel, groups)
    T = BATCHES["random"]
    if case.policy != "dropless":
        return astuple(dispatcher.traffic(T, K, H))
    first = coords.expert_group * case.ep
    tables = [slots(case, "random", first + p).filled_EC for p in range(case.ep)]
    counts_PE = np.array([filled.reshape(E, -1).sum(1) for filled in tables], int)
    return astuple(dispatcher.traffic(counts_PE, T, K, H))


def journey(case, group, me, bytes_PP, back=False):
    """Messages and bytes that ``me`` sends (inside, between), from who has how much for whom.

    The way back is the same journey with every message turned round.
    """
    node = [rank // case.devices for rank in group.ranks]
    P = len(node)
    sent = np.zeros(4)

    def message(a, b, size):
        a, b = (b, a) if back else (a, b)
        if a == me and a != b:
            inside = node[a] == node[b]
            sent[0 if inside else 1] += 1
            sent[2 if inside else 3] += size

    if case.way != "hierarchical":
        for a in range(P):
            for b in range(P):
                message(a, b, bytes_PP[a, b])
        return sent
    D = node.count(node[0])
    for a in range(P):
        for b in range(P):
            if (
                node[a] == node[b]
            ):  # to the receiver's local rank: all that goes to that local rank of any node
                message(a, b, sum(bytes_PP[a, c] for c in range(P) if c % D == b % D))
            if a % D == b % D:  # between equal local ranks: all that the node's ranks gave
                message(a, b, sum(bytes_PP[c, b] for c in range(P) if node[c] == node[a]))
    return sent


def in_tensor_group(case, coords, rows_home, T, C):
    """What the ring of the tensor group carries: a sum of the results, or shares three times."""
    mp = case.mp
    if mp == 1:
        return np.zeros(4)
    following = coords.rank - coords.mp + (coords.mp + 1) % mp
    inside = following // case.devices == coords.rank // case.devices
    at_experts = E * C
    if case.policy == "dropless":
        at_experts = case.ep * T * min(K, E // case.ep)
    share = 4 * H // mp
    if case.sharded:
        messages = 3 * (mp - 1)
        size = (mp - 1) * share * (2 * at_experts + rows_home)
    else:
        messages, size = 2 * (mp - 1), 2 * (mp - 1) * share * at_experts
    return np.array([messages, 0, size, 0] if inside else [0, messages, 0, size], float)


def test_two_hops_send_fewer_and_larger_messages(report):
    """Two nodes of four: one message between nodes instead of four, the same bytes."""
    flat, hierarchical = (
        report(8).get(0, f"dp8mp1ep8on4-{way}-capacity/traffic") for way in ("flat", "hierarchical")
    )
    exchanges = 2  # there and back
    np.testing.assert_array_equal(flat[:2], [3 * exchanges, 4 * exchanges])
    np.testing.assert_array_equal(hierarchical[:2], [3 * exchanges, 1 * exchanges])
    assert flat[3] == hierarchical[3] > 0
    assert hierarchical[2] == 2 * flat[2]
