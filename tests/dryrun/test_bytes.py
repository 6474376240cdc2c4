"""What the auto-parallel graph says in a step against what the explicit path says, operator by
operator: how often, in which group, how many bytes.

The graph is compiled for Ascend and read. The explicit path's own training step is run with groups
that only count. What is left after the reasons in ``differences`` must be the same on both sides.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from dryrun.differences import Expected
from dryrun.rehearsal import Said, rehearse
from dryrun.small_runs import FLOAT, HALF, C, E, H, K, S, explicit, small_run

from mistral_ms.config import RunConfig
from mistral_ms.errors import DryrunError
from mistral_ms.parallel.dryrun.ir import read
from mistral_ms.parallel.pipeline import stages_of
from mistral_ms.planner.sent import Sent, step_bytes
from mistral_ms.planner.study import Table, markdown
from mistral_ms.weights import specs

PIPELINE = {"dp": 4, "ep": 4, "pp": 2, "recompute": "full"}
HOPS = {"dp": 4, "ep": 4, "devices_per_node": 2, "all_to_all": "hierarchical"}
TENSOR = {"dp": 4, "mp": 2, "ep": 2}
STAGES = {"dp": 2, "mp": 2, "pp": 2, "ep": 2, "group_wise_a2a": True, "recompute": "full"}
DROPLESS = {"dp": 8, "mp": 2, "pp": 2, "ep": 8, "recompute": "full"}
PAGE = Path(__file__).parents[2] / "docs" / "planner.md"
CASES = {
    "pipeline, first stage, tied": (PIPELINE, 1, 2),
    "pipeline, last stage, tied": (PIPELINE, 6, 2),
    "hierarchical, two nodes of two": (HOPS, 1, 1),
    "tensor parallel": (TENSOR, 3, 2),
    "tensor parallel stages, group-wise": (STAGES, 2, 2),
    "tensor parallel stages, last stage": (STAGES, 6, 2),
    "interleaved, pooled aux, tied": ({"dp": 2, "ep": 2, "micro_batch_interleave_num": 2}, 1, 1),
    "optimizer parallel": ({"dp": 4, "ep": 2, "optimizer_parallel": True}, 3, 1),
    "dropless, tensor parallel stages of 32": (DROPLESS, 11, 2),
}
CHANGES = {
    "pipeline, first stage, tied": {"tied": True},
    "pipeline, last stage, tied": {"tied": True},
    "interleaved, pooled aux, tied": {"aux_loss": "pooled", "tied": True},
    "dropless, tensor parallel stages of 32": {"policy": "dropless"},
}


def expected(case) -> Expected:
    return Expected(*CASES[case], CHANGES.get(case, {}).get("tied", False))


def of_graph(text, groups, case) -> Counter[Said]:
    graph = read(text, CASES[case][1], expected(case).config.world, groups)
    counts: Counter[Said] = Counter()
    for each in graph.communication:
        counts[Said(each.operator, str(each.phase), each.ranks, each.nbytes)] += each.times
    return counts


@pytest.fixture(scope="module")
def both(compile_run):
    """A function of a case: the graph's text and groups, and both counts."""
    known = {}

    def count(case):
        if case not in known:
            parallel, rank, micro = CASES[case]
            run = small_run(parallel, micro, **CHANGES.get(case, {}))
            text, groups = compile_run(run, rank)
            known[case] = text, groups, rehearse(explicit(run), rank)
        text, groups, said = known[case]
        return text, groups, of_graph(text, groups, case), said

    return count


def unexplained(graph, said, differences):
    """What the reasons leave over, and what of it both sides say alike.

    A reason that predicts more than was counted leaves negative counts, which are over too.
    """
    graph, said = Counter(graph), Counter(said)
    for each in differences:
        graph.subtract(each.graph)
        said.subtract(each.explicit)
    same = Counter({key: n for key, n in graph.items() if n and said[key] == n})
    over = {key: (graph[key], said[key]) for key in graph | said | -graph | -said}
    return {key: pair for key, pair in over.items() if pair[0] != pair[1] or min(pair) < 0}, same


@pytest.mark.parametrize("case", CASES)
def test_every_difference_has_a_reason(both, case):
    _, _, graph, said = both(case)
    over, same = unexplained(graph, said, expected(case).all())
    assert over == {}
    # no reason hides an exchange, nor a message of stages: they are the same on both sides
    operators = ["AlltoAll", "AlltoAllV"]
    operators += [] if "tensor" in case else ["Send", "Receive"]
    for operator in operators:
        counted = {key: n for key, n in said.items() if key.operator == operator}
        assert {key: n for key, n in same.items() if key.operator == operator} == counted


def exchanges(graph):
    return {key: n for key, n in graph.items() if key.operator in ("AlltoAll", "AlltoAllV")}


def test_dropless_exchanges_counts_first_and_then_real_rows(both):
    """The bytes are those of the buffers: eight ranks with one expert each can be sent a row of
    each token. Counts have no gradient.
    """
    _, _, graph, _ = both("dropless, tensor parallel stages of 32")
    ranks, times = (1, 3, 5, 7, 9, 11, 13, 15), 2  # a layer, two micro-batches
    counts, there, back = E * FLOAT, S * K * H * HALF, 8 * S * H * HALF
    wanted = {
        **{Said("AlltoAll", phase, ranks, counts): times for phase in ("forward", "recompute")},
        **{
            Said("AlltoAllV", phase, ranks, size): times
            for phase in ("forward", "recompute", "backward")
            for size in (there, back)
        },
    }
    assert exchanges(graph) == wanted


@pytest.mark.parametrize("case", [case for case in CASES if "dropless" not in case])
def test_exchanges_per_layer_and_micro_batch(both, case):
    """By hand: two forward and two backward of E * C rows, in two hops where hierarchical."""
    _, _, graph, _ = both(case)
    this = expected(case)
    groups = {
        "hierarchical, two nodes of two": [(0, 1), (1, 3)],
        "pipeline, first stage, tied": [(0, 1, 2, 3)],
        "pipeline, last stage, tied": [(4, 5, 6, 7)],
        "tensor parallel stages, group-wise": [(0, 2)],
        "tensor parallel stages, last stage": [(4, 6)],
        "interleaved, pooled aux, tied": [(0, 1)],
        "optimizer parallel": [(2, 3)],
    }.get(case, [(1, 3)])
    times = 2 * this.micro * this.config.micro_batch_interleave_num * this.layers
    size = E * C * H * HALF
    if this.config.group_wise_a2a:
        size //= 2
    phases = ["forward", "backward"]
    if this.config.recompute == "full":
        phases.append("recompute")
    wanted = {Said("AlltoAll", phase, each, size): times for phase in phases for each in groups}
    assert exchanges(graph) == wanted


@pytest.mark.parametrize("case", CASES)
def test_no_reason_is_idle(both, case):
    """Each predicts something that was counted, and without it the comparison fails."""
    _, _, graph, said = both(case)
    reasons = expected(case).all()
    for number, left_out in enumerate(reasons):
        others = reasons[:number] + reasons[number + 1 :]
        over, _ = unexplained(graph, said, others)
        assert over, left_out.reason


def test_a_gather_and_a_scatter_send_what_a_reduction_sends(both):
    """The sentence about sequence parallelism: attention costs the same on both paths."""
    from mistral_ms.parallel.topology import Group, traffic

    pair, states = Group("tensor", (2, 3), (0, 0)), S * H * HALF
    apart = traffic.ring(pair, 1, states // 2) + traffic.ring(pair, 1, states // 2)
    assert apart == traffic.all_reduce(pair, 1, states)


def sums(said: Counter[Said]) -> Counter[Sent]:
    """Bytes of a step, whatever the sizes of single messages."""
    found: Counter[Sent] = Counter()
    for (operator, phase, ranks, size), times in said.items():
        found[Sent(operator, phase, ranks)] += size * times
    return found


def planned(case, execution) -> Counter[Sent]:
    parallel, rank, micro = CASES[case]
    values = small_run(parallel, micro, **CHANGES.get(case, {}))
    run = RunConfig(**values) if execution == "graph" else explicit(values)
    stage = stages_of(run.model, run.parallel.pp)[expected(case).stage]
    return step_bytes(run, rank, (stage,), specs(run.model), execution)


@pytest.mark.parametrize("case", CASES)
def test_the_planner_says_the_bytes_of_both(both, case):
    """The three sides: what is planned for a way of running is what it sends, to the byte, every
    operator in every group and phase; no reason is needed.
    """
    _, _, graph, said = both(case)
    assert planned(case, "graph") == sums(graph)
    assert planned(case, "explicit") == sums(said)


@pytest.mark.parametrize("rank", [1, 2])
def test_interleaved_chunks_send_what_is_planned(rank):
    """Two stages of two chunks on the explicit path, both ends. States go from the last stage back
    to the first on the way that gradients take otherwise, so phases of these are not told apart.
    """
    values = small_run({"dp": 2, "ep": 2, "pp": 2, "pp_interleave_num": 2}, 2)
    values["model"] |= {"num_hidden_layers": 4, "layer_types": None}
    run = RunConfig(**values)
    parts = stages_of(run.model, 4)[rank // 2 :: 2]
    planned = step_bytes(run, rank, parts, specs(run.model), "explicit")

    def without_phases(sent: Counter[Sent]) -> Counter[Sent]:
        found: Counter[Sent] = Counter()
        for each, size in sent.items():
            found[each._replace(phase="") if each.operator in ("Send", "Receive") else each] += size
        return found

    assert without_phases(planned) == without_phases(sums(rehearse(run, rank)))


def test_the_table_of_the_three_sides(both):
    """As the page has it: first stage of dp 2, mp 2, pp 2, ep 2, group-wise, full recompute."""
    case = "tensor parallel stages, group-wise"
    _, _, graph, said = both(case)
    columns = (planned(case, "graph"), sums(graph), planned(case, "explicit"), sums(said))
    keys = sorted({key for column in columns for key in column})
    table = Table(
        case,
        (
            "operator",
            "phase",
            "ranks",
            "planned, graph",
            "compiled",
            "planned, explicit",
            "counted",
        ),
        tuple(
            (
                key.operator,
                key.phase,
                ", ".join(map(str, key.ranks)),
                *(f"{column[key]}" if column[key] else "-" for column in columns),
            )
            for key in keys
        ),
    )
    assert markdown(table) in PAGE.read_text(encoding="utf-8"), markdown(table)


FIRST, LAST, TWO_HOPS = (
    "pipeline, first stage, tied", "pipeline, last stage, tied", "hierarchical, two nodes of two",
)  # fmt: skip
MUTATIONS = {
    "an exchange less": (FIRST, " = AlltoAll(", " = Identity("),
    "a message less": (FIRST, " = Send(", " = Identity("),
    "half the bytes": (LAST, "(4, 2, 7, 64)", "(4, 1, 7, 64)"),
    "another dtype": (LAST, "Float16], (4, 2, 7, 64)", "Float32], (4, 2, 7, 64)"),
    "a reduction more": (TWO_HOPS, " = PrimFunc_Tile(", " = AllReduce("),
    "another hop": (TWO_HOPS, "(0, 1)", "(1, 3)"),
    "a reduction for a scatter": ("tensor parallel", " = ReduceScatter(", " = AllReduce("),
    "a weight that is not gathered": ("optimizer parallel", " = AllGather(", " = Identity("),
    "a gradient over fewer ranks": ("optimizer parallel", "(0, 1, 2, 3)", "(1, 3)"),
}


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_changed_graph_is_noticed(both, mutation):
    case, old, new = MUTATIONS[mutation]
    text, groups, _, said = both(case)
    if old.startswith("(0, 1"):  # a group: the text calls those made by hand by their names
        ranks = {f"{members}": f'group: "{name}"' for name, members in groups.items()}
        changed = text.replace(ranks.get(old, f"rank_list: {old}"), ranks.get(new, new))
        if old not in ranks:
            changed = text.replace(f"group_rank_ids: {old}", f"group_rank_ids: {new}")
    else:
        changed = text.replace(old, new, 1) if old[0] == " " else text.replace(old, new)
    assert changed != text
    try:
        graph = of_graph(changed, groups, case)
    except DryrunError as error:
        assert "unknown communication" in str(error)
    else:
        over, _ = unexplained(graph, said, expected(case).all())
        assert over
