"""The auto-parallel training graph, compiled for one rank of 32: exactly this communication.

Groups come from the topology, which has its own tests against lists written by hand; how often and
how much is counted here from the sizes.
"""

from __future__ import annotations

from collections import Counter

import pytest

from mistral_ms.config import ParallelConfig
from mistral_ms.parallel.dryrun.ir import read
from mistral_ms.parallel.topology import GroupKind, Topology

WORLD, RANK, MICRO = 32, 11, 4
H, WIDE, E, S, V = 64, 128, 8, 256, 512
C = 71  # ceil(1.1 * 2 * 256 / 8)
BF16 = 2
MODEL = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": WIDE,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
PIPELINE = {"dp": 8, "ep": 8, "pp": 4}
EXPERTS = ("w1", "w3", "w2")


@pytest.fixture
def compile_layout(compile_run):
    """A function of a layout: the graph of a rank, as text and read."""

    def compile_one(parallel, training=None, micro=MICRO, experts=E):
        sizes = {"num_hidden_layers": parallel.get("pp", 1), "moe": {"num_local_experts": experts}}
        run = {
            "model": {**MODEL, **sizes},
            "routing": {"policy": "capacity", "aux_loss": "per_layer"},
            "training": {
                "max_steps": 1,
                "seq_length": S,
                "global_batch_size": parallel["dp"] * micro,
                "gradient_accumulation_steps": micro,
                "dtype": "bfloat16",
                "router_aux_loss_coef": 0.01,
                **(training or {}),
            },
            "parallel": parallel,
        }
        text, groups = compile_run(run, RANK)
        return text, read(text, RANK, WORLD, groups)

    return compile_one


def group(parallel, kind, rank=RANK):
    return Topology.of(ParallelConfig(**parallel)).group(kind, rank).ranks


def exchanges(graph):
    """How often each all-to-all runs: by phase, members and bytes."""
    found = Counter()
    for each in graph.communication:
        if each.operator == "AlltoAll":
            found[str(each.phase), each.ranks, each.nbytes] += each.times
    return found


def test_two_exchanges_forward_and_two_backward_per_layer_and_micro_batch(compile_layout):
    _, graph = compile_layout(PIPELINE)
    ranks = group(PIPELINE, GroupKind.EXPERT)
    here = 2 * MICRO  # a layer in this stage
    size = E * C * H * BF16
    assert exchanges(graph) == {("forward", ranks, size): here, ("backward", ranks, size): here}


def test_neighbours_exchange_one_message_per_micro_batch_and_direction(compile_layout):
    _, graph = compile_layout(PIPELINE)
    found = Counter()
    for each in graph.communication:
        if each.operator in ("Send", "Receive"):
            found[each.operator, str(each.phase), each.peer] += each.times
    before, after = RANK - 8, RANK + 8
    assert found == {
        ("Receive", "forward", before): MICRO,
        ("Send", "forward", after): MICRO,
        ("Receive", "backward", after): MICRO,
        ("Send", "backward", before): MICRO,
    }


def test_a_stage_holds_its_own_layers_and_their_state(compile_layout):
    _, graph = compile_layout(PIPELINE)
    layers = {name.partition("layers.")[2][0] for name in graph.parameters if "layers." in name}
    assert layers == {"1"}
    assert not any("embed" in name or "lm_head" in name for name in graph.parameters)
    for expert in EXPERTS:
        for prefix in ("", "exp_avg.", "exp_avg_sq."):
            held = graph.parameters[f"{prefix}layers.1.moe.experts.{expert}"]
            assert held.shape == (H, WIDE)  # one expert of eight


COPIES = {"dp": 32, "ep": 8, "optimizer_parallel": True}


@pytest.fixture
def copies(compile_layout):
    """Four copies of each expert; shards of everything, updated on the host."""
    return compile_layout(COPIES, {"offload_optimizer": "host"}, micro=1)[1]


def test_expert_gradients_are_reduced_over_the_copies_of_the_expert_only(copies):
    assert group(COPIES, GroupKind.EXPERT_DATA) == (3, 11, 19, 27)
    found = Counter()
    for each in copies.communication:
        if each.operator in ("AllReduce", "ReduceScatter") and str(each.phase) == "backward":
            found[each.operator, each.given.shape, each.ranks] += each.times
    ranks = {where for (_, shape, where) in found if shape == (H, WIDE)}
    assert ranks == {(3, 11, 19, 27)}
    assert found["ReduceScatter", (H, WIDE), (3, 11, 19, 27)] == 3
    # a dense weight, the router among them, over all ranks
    assert found["AllReduce", (E, H), tuple(range(32))] == 1


def test_hierarchical_exchange_has_two_hops_each_way(compile_layout):
    parallel = {"dp": 32, "ep": 32, "all_to_all": "hierarchical"}
    _, graph = compile_layout(parallel, micro=1, experts=32)
    inside = group(parallel, GroupKind.EXPERT_NODE)
    across = group(parallel, GroupKind.EXPERT_CROSS)
    assert (inside, across) == (tuple(range(8, 16)), (3, 11, 19, 27))
    found = Counter()
    for (phase, ranks, _), times in exchanges(graph).items():
        found[phase, ranks] += times
    assert found == {
        (phase, ranks): 2 for phase in ("forward", "backward") for ranks in (inside, across)
    }


def test_optimizer_parallelism_divides_every_matrix_experts_too(copies):
    for prefix in ("", "exp_avg.", "exp_avg_sq."):
        shapes = {
            name.removeprefix(prefix): held.shape
            for name, held in copies.parameters.items()
            if name.startswith(prefix)
        }
        for expert in EXPERTS:  # four copies share one expert's rows
            assert shapes[f"layers.0.moe.experts.{expert}"] == (H // 4, WIDE)
        for name, rows in (("q", H), ("k", H // 2), ("v", H // 2), ("o", H)):
            assert shapes[f"layers.0.attention.{name}_proj.weight"] == (rows // 32, H)
        assert shapes["embed_tokens.weight"] == shapes["lm_head.weight"] == (V // 32, H)


def test_the_optimizer_runs_on_the_host_when_it_is_offloaded(copies, compile_layout):
    assert copies.on_host["Adam"] == 10 + 3  # weights of the layer, and those around it
    assert compile_layout(PIPELINE)[1].on_host == {}


def test_fused_operators_take_the_place_of_the_references(compile_layout):
    text, _ = compile_layout(PIPELINE)
    for operator in ("FlashAttentionScore(", "RmsNorm(", "Swiglu("):
        assert f"= {operator}" in text or f"PrimFunc_{operator}" in text, operator
