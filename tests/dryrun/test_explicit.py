"""The explicit path on Ascend, for rank 19 of 32: it compiles, and the compiled graph holds exactly
the communication that the layout asks for.

dp=16, mp=2, ep=8 on nodes of eight: rank 19 is place (dp 9, mp 1). The groups are written out by
hand here, and the bytes follow from the shapes; neither comes from the code under test.
"""

from __future__ import annotations

from collections import Counter

import pytest

from mistral_ms.config import ParallelConfig, RoutingConfig
from mistral_ms.parallel.collectives import Collectives, Groups
from mistral_ms.parallel.dispatchers import make_dispatcher
from mistral_ms.parallel.dryrun.ir import Graph, read
from mistral_ms.parallel.dryrun.process import Request
from mistral_ms.parallel.dryrun.report import sent
from mistral_ms.parallel.topology import Topology, traffic

RANK, WORLD = 19, 32
TENSOR = (18, 19)
EXPERT = (17, 19, 21, 23, 25, 27, 29, 31)
ON_NODE, ACROSS = (17, 19, 21, 23), (19, 27)
E, K, H, T, P, MP = 8, 2, 16, 24, 8, 2
C = 9  # ceil(1.5 * 2 * 24 / 8)
FLOAT = INT = 4
PLACES = E * C * H * FLOAT  # of a whole exchange
ROOM = P * T * FLOAT  # per element of a row: one expert here, at most one row per token

FORWARD, BACKWARD = "forward", "backward"


def both(*rows):
    """Forward, and the same backward."""
    return [(operator, phase, *rest) for phase in (FORWARD, BACKWARD) for operator, *rest in rows]


RELAYED = T * K  # rows for two experts of this place, one on each node: min(K, 2) per token
WANTED = {
    "flat_capacity": both(
        ("AlltoAll", EXPERT, PLACES), ("AllReduce", TENSOR, PLACES), ("AlltoAll", EXPERT, PLACES)
    ),
    "hierarchical_capacity": both(
        *[("AlltoAll", ON_NODE, PLACES), ("AlltoAll", ACROSS, PLACES)] * 2,
        ("AllReduce", TENSOR, PLACES),
    ),
    "group_wise_capacity": [
        *both(*[("AlltoAll", EXPERT, PLACES // MP)] * 2),
        *both(("AllGather", TENSOR, PLACES // MP), ("ReduceScatter", TENSOR, PLACES)),
        ("AllGather", FORWARD, TENSOR, PLACES // MP),  # rows come home
        ("AllGather", BACKWARD, TENSOR, T * H * FLOAT // MP),  # gradient of the tokens
    ],
    "flat_dropless": [
        ("AlltoAll", FORWARD, EXPERT, E * INT),
        *both(("AlltoAllV", EXPERT, T * K * H * FLOAT), ("AlltoAllV", EXPERT, ROOM * H)),
        *both(("AllReduce", TENSOR, ROOM * H)),
    ],
    "hierarchical_dropless": [
        ("AlltoAll", FORWARD, ON_NODE, E * INT),
        ("AlltoAll", FORWARD, ACROSS, E * INT),
        *both(
            ("AlltoAllV", ON_NODE, T * K * H * FLOAT),
            ("AlltoAllV", ACROSS, 4 * RELAYED * H * FLOAT),
            ("AlltoAllV", ACROSS, ROOM * H),
            ("AlltoAllV", ON_NODE, 4 * RELAYED * H * FLOAT),
        ),
        *both(("AllReduce", TENSOR, ROOM * H)),
    ],
    "group_wise_dropless": [
        ("AlltoAll", FORWARD, EXPERT, E * INT),
        *both(
            ("AlltoAllV", EXPERT, T * K * H * FLOAT // MP), ("AlltoAllV", EXPERT, ROOM * H // MP)
        ),
        *both(("AllGather", TENSOR, ROOM * H // MP), ("ReduceScatter", TENSOR, ROOM * H)),
        ("AllGather", FORWARD, TENSOR, T * K * H * FLOAT // MP),
        ("AllGather", BACKWARD, TENSOR, T * H * FLOAT // MP),
    ],
}  # fmt: skip


@pytest.fixture
def compile_target(compile_text):
    """A function of a target of ``explicit_targets`` and a rank: its graph as text, its groups."""
    return lambda target, rank: compile_text(
        Request(rank, WORLD, f"dryrun.explicit_targets:{target}")
    )


@pytest.fixture
def compile_graph(compile_target):
    """The same, read."""

    def compile_one(target: str, rank: int) -> Graph:
        text, groups = compile_target(target, rank)
        return read(text, rank, WORLD, groups)

    return compile_one


def found(graph: Graph) -> Counter:
    counts: Counter = Counter()
    for each in graph.communication:
        counts[each.operator, each.phase, each.ranks, each.nbytes] += each.times
    return counts


class Silent(Groups):
    """Groups that only know their members; nobody talks."""

    def _make(self, group):
        return Collectives(group, self.coords.rank)


@pytest.mark.parametrize("target", WANTED)
def test_a_dispatcher_there_and_back(compile_graph, target):
    graph = compile_graph(target, RANK)
    assert found(graph) == Counter(WANTED[target])
    way, policy = target.rsplit("_", 1)
    if policy == "capacity":  # how many bytes travel is known beforehand: as the planner counts
        how = {"group_wise_a2a": True} if way == "group_wise" else {"all_to_all": way}
        parallel = ParallelConfig(dp=16, mp=2, ep=8, **how)
        topology = Topology.of(parallel)
        routing = RoutingConfig(policy="capacity", capacity_factor=1.5)
        dispatcher = make_dispatcher(E, routing, parallel, Silent(topology, RANK, "CPU"))
        compiled = [each for each in graph.communication if each.phase == FORWARD]
        total = sum((sent(each, topology, RANK) for each in compiled), traffic.NOTHING)
        assert total == dispatcher.traffic(T, K, H)


def test_the_one_expert_of_a_rank_multiplies_packed_rows(compile_target):
    """Three ordinary products forward; the gradients of rows and weights of each."""
    text, _ = compile_target("flat_dropless", RANK)
    assert text.count(" = MatMul(") + text.count(" = PrimFunc_MatMul(") == 9


def test_a_whole_model(compile_graph):
    """A dense and a sparse layer, divided by heads, columns, experts and vocabulary."""
    graph = compile_graph("language_model", RANK)
    states, column = T * H * FLOAT, T * FLOAT
    dense = [("AllReduce", phase, TENSOR, states) for phase in [FORWARD] * 4 + [BACKWARD] * 4]
    loss = [
        ("AllGather", FORWARD, TENSOR, column),
        *[("AllReduce", FORWARD, TENSOR, column)] * 2,
    ]
    assert found(graph) == Counter([*dense, *loss, *WANTED["group_wise_capacity"]])
    V, I, D = 64, 24, 4  # noqa: E741
    attention = 2 * (H * 4 * D + H * 2 * D) // MP
    norms, router, ffn = 2 * H, E * H, 3 * H * I // MP  # one expert is here
    numbers = 2 * V * H // MP + 2 * (attention + norms) + ffn + router + ffn + H
    assert graph.parameter_bytes == numbers * FLOAT


@pytest.mark.parametrize(
    ("target", "rank", "operator", "peer"),
    [
        ("send_forward", 11, "Send", 19),
        ("send_forward", 19, "Receive", 11),
        ("send_backward", 19, "Send", 11),
        ("send_backward", 11, "Receive", 19),
    ],
)
def test_between_two_stages(compile_graph, target, rank, operator, peer):
    (each,) = compile_graph(target, rank).communication
    assert (each.operator, each.peer, each.ranks) == (operator, peer, (11, 19))
    assert each.nbytes == T * H * FLOAT


def test_a_stage_that_generates(compile_graph):
    """Rank 19 is in stage 2 of 4, with eight data-parallel ranks that share the experts."""
    graph = compile_graph("next_token_logits", RANK)
    stage, tokens, vocabulary = tuple(range(16, 24)), 3, 64
    states, logits = tokens * H * FLOAT, vocabulary * FLOAT
    messages = Counter(
        (each.operator, each.peer, each.nbytes)
        for each in graph.communication
        if each.operator in ("Send", "Receive")
    )
    assert messages == Counter(
        [
            ("Receive", 11, states),
            ("Send", 27, states),
            ("Receive", 27, logits),
            ("Send", 11, logits),
        ]
    )
    buffer = P * tokens * FLOAT * H
    assert Counter(
        {key: n for key, n in found(graph).items() if key[0] not in ("Send", "Receive")}
    ) == Counter(
        [
            ("AlltoAll", FORWARD, stage, E * INT),
            ("AlltoAllV", FORWARD, stage, tokens * K * H * FLOAT),
            ("AlltoAllV", FORWARD, stage, buffer),
            ("AllGather", FORWARD, stage, logits),
        ]
    )


def test_broadcast(compile_graph):
    (each,) = compile_graph("broadcast", RANK).communication
    assert (each.operator, each.ranks) == ("Broadcast", tuple(range(16, 24)))
    assert each.nbytes == T * H * FLOAT


MUTATIONS = {
    "another group": lambda text, expert, tensor: text.replace(expert, tensor, 1),
    "one operator less": lambda text, *_: text.replace(" = AlltoAll(", " = Identity(", 1),
    "one operator more": lambda text, *_: text.replace(" = PrimFunc_Transpose(", " = AlltoAll(", 1),
    "another operator": lambda text, *_: text.replace(" = ReduceScatter(", " = AllReduce(", 1),
    "half the bytes": lambda text, *_: text.replace("(8, 1, 9, 8)", "(4, 1, 9, 8)"),
    "half the width": lambda text, *_: text.replace("[Float32], (8, 1", "[Float16], (8, 1"),
    "no gradient": lambda text, *_: text.replace(" def bprop(", " def other("),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_changed_graph_is_noticed(compile_target, mutation):
    text, groups = compile_target("group_wise_capacity", RANK)
    names = {ranks: f'group: "{name}"' for name, ranks in groups.items()}
    changed = MUTATIONS[mutation](text, names[EXPERT], names[TENSOR])
    assert changed != text
    try:
        counts = found(read(changed, RANK, WORLD, groups))
    except Exception as error:
        assert "unknown communication" in str(error)
    else:
        assert counts != Counter(WANTED["group_wise_capacity"])
