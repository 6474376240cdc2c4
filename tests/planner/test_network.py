"""Bytes and seconds of collective operations: against the topology's own count, and by laws."""

from pathlib import Path

import pytest
from dryrun.small_runs import HALF, C, E, H, S, small_run

from mistral_ms.config import ParallelConfig, RunConfig, load_run_config
from mistral_ms.config.layout import Sizes
from mistral_ms.parallel.pipeline import stages_of
from mistral_ms.parallel.topology import GroupKind, Topology, traffic
from mistral_ms.planner.hardware import load_hardware
from mistral_ms.planner.network import seconds, sent, transfer_seconds
from mistral_ms.planner.step import elements
from mistral_ms.planner.traffic import (
    Message,
    Span,
    gradient_messages,
    layer_messages,
    span,
    stage_transfer,
    weight_messages,
)
from mistral_ms.weights import specs

KINDS = [
    GroupKind.WORLD, GroupKind.STAGE, GroupKind.TENSOR, GroupKind.DATA, GroupKind.EXPERT,
    GroupKind.EXPERT_DATA,
]  # fmt: skip
A2 = load_hardware("atlas_800t_a2")
RUNS = Path(__file__).parents[2] / "configs" / "run"


@pytest.mark.parametrize(
    "sizes",
    [(8, 1, 4, 8), (16, 1, 2, 8), (4, 8, 1, 4), (16, 2, 1, 4), (2, 2, 2, 2), (32, 1, 2, 16)],
)
def test_spans_are_those_of_the_topology(sizes):
    topology = Topology(Sizes(*sizes))
    for kind in KINDS:
        group = topology.group(kind, 0)
        assert span(kind, topology.sizes, 8) == Span(group.size, group.nodes.count(0)), kind


def test_sent_is_what_the_topology_counts():
    """All-to-alls, and rings inside one node; over several nodes our rings have two levels."""
    topology = Topology(Sizes(16, 1, 1, 16))
    group = topology.group(GroupKind.EXPERT, 0)
    ours = sent(Message("AlltoAll", GroupKind.EXPERT, 16 * 96), Span(16, 8))
    theirs = traffic.equal_exchange(group, 0, 96)
    assert (ours.messages_inside, ours.messages_between) == (7, 8)
    assert (ours.bytes_inside, ours.bytes_between) == (theirs.bytes_inside, theirs.bytes_between)
    group = Topology(Sizes(8, 1, 1, 1)).group(GroupKind.DATA, 0)
    for operator, count in (
        ("AllReduce", traffic.all_reduce(group, 0, 800)),
        ("ReduceScatter", traffic.ring(group, 0, 100)),
    ):
        assert sent(Message(operator, GroupKind.DATA, 800), Span(8, 8)).bytes_inside == (
            count.bytes_inside
        )
    gather = sent(Message("AllGather", GroupKind.DATA, 100), Span(8, 8))
    assert gather.bytes_inside == traffic.ring(group, 0, 100).bytes_inside


def test_the_hierarchical_exchange_sends_fewer_and_longer_messages():
    """docs/design.md: A nodes of D ranks, M bytes a pair."""
    A, D, M = 4, 8, 10
    message = Message("AlltoAll", GroupKind.EXPERT, A * D * M)
    flat = sent(message, Span(A * D, D))
    hops = sent(message, Span(A * D, D), hierarchical=True)
    assert (flat.messages_inside, flat.messages_between) == (D - 1, (A - 1) * D)
    assert (flat.bytes_inside, flat.bytes_between) == ((D - 1) * M, (A - 1) * D * M)
    assert (hops.messages_inside, hops.messages_between) == (D - 1, A - 1)
    assert (hops.bytes_inside, hops.bytes_between) == (A * (D - 1) * M, (A - 1) * D * M)


def test_flat_loses_where_messages_are_short():
    """Latencies decide: of short messages there are eight times as many to other nodes."""
    sizes = Sizes(64, 1, 1, 64)

    def gain(nbytes):
        message = Message("AlltoAll", GroupKind.EXPERT, nbytes)
        return seconds(message, sizes, A2) / seconds(message, sizes, A2, hierarchical=True)

    assert gain(64e3) > 2
    assert gain(1e9) < 1


@pytest.mark.parametrize("operator", ["AlltoAll", "AllReduce", "AllGather", "ReduceScatter"])
def test_time_never_falls_when_bandwidth_falls(operator):
    sizes = Sizes(32, 1, 1, 32)
    message = Message(operator, GroupKind.EXPERT, 1e8)
    before = seconds(message, sizes, A2)
    for level in ("inside", "between"):
        rates = getattr(A2, level)
        slower = A2.model_copy(
            update={level: rates.model_copy(update={"gb_per_s": rates.gb_per_s / 2})}
        )
        later = A2.model_copy(update={level: rates.model_copy(update={"latency_us": 500})})
        assert seconds(message, sizes, slower) >= before
        assert seconds(message, sizes, later) >= before
    assert seconds(message, sizes, slower) > before  # there are several nodes


def test_a_group_of_one_costs_nothing():
    assert seconds(Message("AllReduce", GroupKind.TENSOR, 1e9), Sizes(8, 1, 1, 8), A2) == 0


@pytest.mark.parametrize("operator", ["AlltoAll", "AllGather", "ReduceScatter", "AllReduce"])
def test_groups_on_the_cpu_can_only_add_up(operator):
    """parallel/collectives/cpu.py: buffers of a part for each member where parts are gathered."""
    machine, sizes, nbytes = load_hardware("this_machine"), Sizes(4, 1, 1, 4), 8e6
    whole = nbytes * (4 if operator in ("AlltoAll", "AllGather") else 1)
    found = seconds(Message(operator, GroupKind.EXPERT, nbytes), sizes, machine)
    assert found == seconds(Message("AllReduce", GroupKind.EXPERT, whole), sizes, machine)
    rate, latency = machine.inside.gb_per_s * 1e9, machine.inside.latency_us * 1e-6
    assert found == pytest.approx(6 * latency + 2 * whole * 3 / 4 / rate)
    pair = transfer_seconds(nbytes, 0, Sizes(1, 1, 2, 1), machine)
    assert pair == seconds(Message("AllReduce", GroupKind.DATA, nbytes), Sizes(2, 1, 1, 1), machine)


def test_neighbours_on_other_nodes_cost_more():
    sizes = Sizes(4, 1, 4, 4)  # two stages a node
    inside, across = (transfer_seconds(1e8, n, sizes, A2) for n in (0, 1))
    assert inside == pytest.approx(1e-5 + 1e8 / (196e9 / 7 * 0.65))
    assert across == pytest.approx(2e-5 + 1e8 / (25e9 * 0.8))


def test_messages_of_a_layer_are_those_that_both_ways_send():
    """The numbers that tests/dryrun/test_bytes.py finds in the compiled graph and in the explicit
    path's own step, written down in docs/auto_parallel.md: dp 4, ep 4, pp 2, two micro-batches.
    """
    run = RunConfig(**small_run({"dp": 4, "ep": 4, "pp": 2}, micro=2))
    for execution in ("graph", "explicit"):
        [exchange] = layer_messages(run, sparse=True, execution=execution)
        assert exchange == Message("AlltoAll", GroupKind.EXPERT, E * C * H * HALF, 2)
        assert exchange.bytes == 7168
        assert stage_transfer(run, execution) == 3072


@pytest.mark.parametrize("shared", [False, True])
def test_messages_of_tensor_parallel_ranks(shared):
    """The table of docs/auto_parallel.md."""
    parallel = {"dp": 4, "mp": 2, "ep": 2, "devices_per_node": 4, "group_wise_a2a": shared}
    run = RunConfig(**small_run(parallel))
    states, rows = S * H * HALF, E * C * H * HALF
    experts = {
        False: {Message("AlltoAll", GroupKind.EXPERT, rows, 2),
                Message("AllReduce", GroupKind.TENSOR, rows, 1)},
        True: {Message("AlltoAll", GroupKind.EXPERT, rows / 2, 2),
               Message("AllGather", GroupKind.TENSOR, rows / 2, 2),
               Message("ReduceScatter", GroupKind.TENSOR, rows, 1)},
    }[shared]  # fmt: skip
    explicit = {Message("AllReduce", GroupKind.TENSOR, states, 1)}
    graph = {
        Message("AllGather", GroupKind.TENSOR, states / 2, 2),
        Message("ReduceScatter", GroupKind.TENSOR, states, 1),
    }
    assert set(layer_messages(run, sparse=True, execution="explicit")) == experts | explicit
    assert set(layer_messages(run, sparse=True, execution="graph")) == experts | graph
    assert ParallelConfig(**parallel).world == 8
    # compiled for Ascend, a dense layer and one with shared experts gather and scatter twice each
    values = small_run(parallel)
    values["model"]["moe"]["n_shared_experts"] = 1
    beside = RunConfig(**values)
    explicit = {Message("AllReduce", GroupKind.TENSOR, states, 2)}
    graph = {
        Message("AllGather", GroupKind.TENSOR, states / 2, 2),
        Message("ReduceScatter", GroupKind.TENSOR, states, 2),
    }
    assert set(layer_messages(beside, sparse=True, execution="explicit")) == experts | explicit
    assert set(layer_messages(beside, sparse=True, execution="graph")) == experts | graph
    values["model"]["moe"]["extra_feed_forward"] = "both"  # as test_planned.py compiles
    beside = RunConfig(**values)
    explicit = {Message("AllReduce", GroupKind.TENSOR, states, 4)}
    assert set(layer_messages(beside, sparse=True, execution="explicit")) == experts | explicit


@pytest.mark.parametrize(
    ("name", "stage", "inside", "between"),
    [
        ("pretrain_mixtral_8x7b_16card", 0, 104, 0.5),
        ("pretrain_mixtral_8x7b_16card", 1, 104, 0.5),
        ("pretrain_mixtral_8x7b_32card", 0, 52, 0.5),
        ("pretrain_mixtral_8x7b_32card", 1, 51, 1.1),
        ("pretrain_mixtral_8x7b_32card", 3, 52, 0.5),
    ],
)
def test_a_step_sends_the_bytes_of_the_compiled_graph(name, stage, inside, between):
    """In GB, as docs/auto_parallel.md has them from graphs at full size."""
    run = load_run_config(RUNS / f"{name}.yaml")
    sizes, m = run.parallel.sizes, run.training.gradient_accumulation_steps
    held, found = elements(specs(run.model), sizes), stages_of(run.model, sizes.pp)[stage]
    modules = [*found.layers, *["embedding"] * found.embedding, *["head"] * found.head]
    dense, experts = (sum(held[module][n] for module in modules) for n in (0, 1))
    passes = 3 * m * len(found.layers)  # forward, backward, and forward again
    messages = [(each, passes * each.count) for each in layer_messages(
        run, sparse=True, execution="graph"
    )]  # fmt: skip
    messages += [(each, 1) for each in gradient_messages(run, dense, experts)]
    messages += [(each, 1) for each in weight_messages(run, dense, experts)]
    given = [(sent(each, span(each.kind, sizes, 8)), count) for each, count in messages]
    neighbours = (stage > 0) + (stage < sizes.pp - 1)
    across = neighbours * m * stage_transfer(run, "graph")  # a stage is a node
    # the graph gathers the embedding and routers in float32: less than a tenth of a GB more
    assert sum(g.bytes_inside * n for g, n in given) / 1e9 == pytest.approx(inside, abs=0.6)
    assert (sum(g.bytes_between * n for g, n in given) + across) / 1e9 == (
        pytest.approx(between, abs=0.06)
    )
