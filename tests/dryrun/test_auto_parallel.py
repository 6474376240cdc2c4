"""The auto-parallel training graph, compiled for one rank of 32: exactly this communication.

Groups come from the topology, which has its own tests against lists written by hand; how often and
how much is counted here from the sizes.
"""

from __future__ import annotations

from collections import Counter

import pytest
import yaml

from mistral_ms.config import ParallelConfig
from mistral_ms.parallel.dryrun.ir import read
from mistral_ms.parallel.dryrun.process import Request, compiled
from mistral_ms.parallel.topology import GroupKind, Topology

WORLD, RANK, LAYERS, MICRO = 32, 11, 4, 4
H, WIDE, E, S, V = 64, 128, 8, 256, 512
C = 71  # ceil(1.1 * 2 * 256 / 8)
BF16 = 2
MODEL = {
    "vocab_size": V,
    "hidden_size": H,
    "intermediate_size": WIDE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "moe": {"num_local_experts": E},
}
PIPELINE = {"dp": 8, "ep": 8, "pp": 4}
EXPERTS = ("w1", "w3", "w2")


@pytest.fixture(scope="module")
def compile_run(environ, runtime, tmp_path_factory):
    """A function of a layout: the graph of a rank."""
    known = {}

    def compile_one(parallel, training=None, rank=RANK, micro=MICRO):
        run = {
            "model": MODEL,
            "routing": {"policy": "capacity", "aux_loss": "per_layer"},
            "training": {
                "steps": 1,
                "seq_length": S,
                "global_batch_size": parallel["dp"] * micro,
                "micro_batches": micro,
                "dtype": "bfloat16",
                "aux_coef": 0.01,
                **(training or {}),
            },
            "parallel": parallel,
        }
        key = yaml.safe_dump([run, rank])
        if key not in known:
            path = tmp_path_factory.mktemp("run") / "run.yaml"
            path.write_text(yaml.safe_dump(run))
            request = Request(rank, WORLD, config=path)
            with compiled(request, runtime, environ, path.parent, 300) as found:
                text = found.graph.read_text(errors="replace")
                known[key] = text, read(text, rank, WORLD, found.groups)
        return known[key]

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


def test_two_exchanges_forward_and_two_backward_per_layer_and_micro_batch(compile_run):
    _, graph = compile_run(PIPELINE)
    ranks = group(PIPELINE, GroupKind.EXPERT)
    here = 2 * MICRO * (LAYERS // 4)  # this stage's layers
    size = E * C * H * BF16
    assert exchanges(graph) == {("forward", ranks, size): here, ("backward", ranks, size): here}


def test_neighbours_exchange_one_message_per_micro_batch_and_direction(compile_run):
    _, graph = compile_run(PIPELINE)
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


def test_a_stage_holds_its_own_layers_and_their_state(compile_run):
    _, graph = compile_run(PIPELINE)
    layers = {name.partition("layers.")[2][0] for name in graph.parameters if "layers." in name}
    assert layers == {"1"}
    assert not any("embed" in name or "lm_head" in name for name in graph.parameters)
    for expert in EXPERTS:
        for prefix in ("", "adam_mean.", "adam_mean_square."):
            held = graph.parameters[f"{prefix}layers.1.moe.experts.{expert}"]
            assert held.shape == (H, WIDE)  # one expert of eight


def reduced(graph):
    """Over whom each weight's gradient is reduced: by the mirror's parameter."""
    found = {}
    for each in graph.communication:
        if each.operator in ("AllReduce", "ReduceScatter") and str(each.phase) == "backward":
            found.setdefault((each.given.shape, each.ranks), 0)
            found[each.given.shape, each.ranks] += each.times
    return found


COPIES = {"dp": 32, "ep": 8}


def test_expert_gradients_are_reduced_over_the_copies_of_the_expert_only(compile_run):
    _, graph = compile_run(COPIES, micro=1)
    shape = (H, WIDE)
    ranks = {where for (size, where), _ in reduced(graph).items() if size == shape}
    assert ranks == {group(COPIES, GroupKind.EXPERT_DATA)} == {(3, 11, 19, 27)}
    assert reduced(graph)[shape, (3, 11, 19, 27)] == 3 * LAYERS
    # a dense weight, the router among them, over all ranks
    assert reduced(graph)[(E, H), tuple(range(32))] == LAYERS


def test_hierarchical_exchange_has_two_hops_each_way(compile_run):
    parallel = {"dp": 32, "ep": 32, "all_to_all": "hierarchical"}
    sparse = {**MODEL, "moe": {"num_local_experts": 32}}
    _, graph = compile_run_with(compile_run, parallel, sparse)
    inside = group(parallel, GroupKind.EXPERT_NODE)
    across = group(parallel, GroupKind.EXPERT_CROSS)
    assert (inside, across) == (tuple(range(8, 16)), (3, 11, 19, 27))
    found = Counter()
    for (phase, ranks, _), times in exchanges(graph).items():
        found[phase, ranks] += times
    assert found == {
        (phase, ranks): 2 * LAYERS
        for phase in ("forward", "backward")
        for ranks in (inside, across)
    }


def compile_run_with(compile_run, parallel, model):
    saved = dict(MODEL)
    MODEL.update(model)
    try:
        return compile_run(parallel, micro=1)
    finally:
        MODEL.update(saved)


def test_optimizer_parallelism_divides_every_matrix_experts_too(compile_run):
    parallel = {**COPIES, "optimizer_parallel": True}
    _, graph = compile_run(parallel, {"offload_optimizer": "host"}, micro=1)
    for prefix in ("", "adam_mean.", "adam_mean_square."):
        shapes = {
            name.removeprefix(prefix): held.shape
            for name, held in graph.parameters.items()
            if name.startswith(prefix)
        }
        for layer in range(LAYERS):
            for expert in EXPERTS:  # four copies share one expert's rows
                assert shapes[f"layers.{layer}.moe.experts.{expert}"] == (H // 4, WIDE)
            for name, rows in (("q", H), ("k", H // 2), ("v", H // 2), ("o", H)):
                held = shapes[f"layers.{layer}.attention.{name}_proj.weight"]
                assert held == (rows // 32, H)
        assert shapes["embed_tokens.weight"] == shapes["lm_head.weight"] == (V // 32, H)


def test_the_optimizer_runs_on_the_host_when_it_is_offloaded(compile_run):
    parallel = {**COPIES, "optimizer_parallel": True}
    _, graph = compile_run(parallel, {"offload_optimizer": "host"}, micro=1)
    weights = LAYERS * 10 + 3
    assert graph.on_host["Adam"] == weights
    _, on_device = compile_run(COPIES, micro=1)
    assert "Adam" not in on_device.on_host


def test_fused_operators_take_the_place_of_the_references(compile_run):
    text, _ = compile_run(PIPELINE)
    for operator in ("FlashAttentionScore(", "RmsNorm(", "Swiglu("):
        assert f"= {operator}" in text or f"PrimFunc_{operator}" in text, operator


def test_recomputing_blocks_exchanges_once_more_and_calls_no_python(compile_run):
    parallel = {"dp": 16, "ep": 8, "pp": 2, "recompute": "full"}  # two layers a stage
    _, graph = compile_run(parallel)
    ranks = group(parallel, GroupKind.EXPERT)
    here, size = 2 * MICRO * (LAYERS // 2), E * C * H * BF16
    phases = ("forward", "recompute", "backward")
    assert exchanges(graph) == {(phase, ranks, size): here for phase in phases}
    assert graph.on_host == {}
