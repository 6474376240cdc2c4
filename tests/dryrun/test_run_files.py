"""Every run file compiles for Ascend: its first or its last rank, as many layers as stages, narrow.

The layout, the routing, the dtype, recompute, offload and optimizer parallelism are the file's own;
layers, widths and the numbers of tokens and micro-batches are not, to be quick. Files whose graphs
are the same (a finetune and its pretraining) share one compilation. Both ends of a pipeline are
compiled of one file; what both ends of others say is compared in test_bytes.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import yaml

from mistral_ms.config import load_run_config
from mistral_ms.parallel.dryrun.ir import read
from mistral_ms.parallel.dryrun.process import Request
from mistral_ms.parallel.dryrun.report import report
from mistral_ms.parallel.topology import GroupKind, Topology

ROOT = Path(__file__).parents[2]
RUNS = ROOT / "configs" / "run"
PUBLISHED = sorted(
    path.stem
    for path in RUNS.glob("*.yaml")
    if ("8x" in path.stem or "mistral_7b" in path.stem) and not path.stem.startswith("predict_")
)
TINY = {
    "demo",
    "dpo_tiny",
    "finetune_tiny",
    "lora_tiny",
    "pretrain_mixtral_tiny_200ep",
    "pretrain_mixtral_tiny_200ep_ep2pp2",
}
"""For CPUs. test_all_ranks compiles the last one; one process has test_graph_numerics."""
ENDS = {"8card": "last", "16card": "first last", "32card": "last", "64card": "first",
        "128card": "last"}  # fmt: skip
CASES = [(name, end) for name in PUBLISHED for end in ENDS[name.rpartition("_")[2]].split()]
H, WIDE, V, S = 64, 128, 512, 64


def narrow(name):
    """The run file and the overrides that leave of it what a layout is."""
    path = RUNS / f"{name}.yaml"
    parallel = load_run_config(path).parallel
    micro = max(2, parallel.pp)  # a pipeline needs as many as stages
    overrides = [
        *(f"model.hidden_size={H}", f"model.intermediate_size={WIDE}", f"model.vocab_size={V}"),
        *("model.num_attention_heads=4", "model.num_key_value_heads=2", "model.head_dim=null"),
        f"training.seq_length={S}",
        f"training.gradient_accumulation_steps={micro}",
        f"training.global_batch_size={micro * parallel.dp}",
    ]
    return path, overrides, micro


def graph_key(run, rank):
    """What the graph is built from; rates, steps and files of data are not."""
    values = run.model_dump(mode="json", include={"model", "routing", "parallel"})
    training = run.training.model_dump(
        mode="json",
        exclude={"max_steps", "optimizer", "lr_scheduler_type", "warmup_steps", "min_lr_ratio"},
    )
    segmented = run.data is not None and run.data.packing.boundaries == "attention"
    return yaml.safe_dump([values, training, segmented, rank])


@pytest.fixture(scope="module")
def compile_end(compile_text):
    """A function of a file and an end: the run, and the report of that rank."""
    known = {}

    def compile_one(name, end):
        path, overrides, micro = narrow(name)
        run = load_run_config(path, overrides)
        topology, world, layers = Topology.of(run.parallel), run.parallel.world, run.parallel.pp
        rank = 0 if end == "first" else world - 1
        key = graph_key(run, rank)
        if key not in known:
            request = Request(rank, world, config=path, overrides=tuple(overrides), layers=layers)
            text, groups = compile_text(request)
            graph = read(text, rank, world, groups)
            known[key] = run, report(graph, topology, rank, 1.0, micro)
        return known[key]

    return compile_one


def test_no_run_file_is_forgotten():
    # predictions: test_generation_graph
    trainings = {path.stem for path in RUNS.glob("*.yaml")} - {"predict_mixtral_8x7b_8card"}
    assert trainings == {*PUBLISHED, *TINY}
    assert len(PUBLISHED) == 9


def kinds(found, *operators):
    """Group kinds of some operators, by phase."""
    return {(x["phase"], x["group"]) for x in found["communication"] if x["operator"] in operators}


@pytest.mark.parametrize(("name", "end"), CASES)
def test_a_run_file_compiles(compile_end, name, end):
    run, found = compile_end(name, end)
    parallel = run.parallel
    rank = found["rank"]
    assert rank == {"first": 0, "last": parallel.world - 1}[end]
    assert found["stage"] == {"first": 0, "last": parallel.pp - 1}[end]
    assert not [x for x in found["communication"] if x["group"] == "other"]

    sparse = run.model.moe is not None
    each_way = {"forward": 2, "backward": 2} if sparse else {"forward": 0, "backward": 0}
    assert found["alltoall_per_moe_layer"] == each_way
    members = list(Topology.of(parallel).group(GroupKind.EXPERT, rank).ranks)
    exchanges = [x for x in found["communication"] if x["operator"] == "AlltoAll"]
    assert all(x["ranks"] == members and not x["inter_node"] for x in exchanges)
    phases = {"forward", "backward"} | ({"recompute"} if parallel.recompute == "full" else set())
    assert {x["phase"] for x in exchanges} == (phases if sparse else set())

    ends = Counter()
    for line in found["communication"]:
        if line["operator"] in ("Send", "Receive"):
            ends[line["operator"], line["phase"]] += line["count"]
    there, back = ("Send", "Receive") if end == "first" else ("Receive", "Send")
    micro = run.training.gradient_accumulation_steps
    messages = {(there, "forward"): micro, (back, "backward"): micro}
    assert ends == (messages if parallel.pp > 1 else {})

    # weights and gradients are divided among their copies: of an expert too, where there are any
    divided = kinds(found, "ReduceScatter")
    assert ("backward", "data") in divided
    assert (("backward", "expert_data") in divided) == (sparse and parallel.dp > parallel.ep)
    on_host = run.training.offload_optimizer == "host"
    assert ("Adam" in found["host_operators"]) == on_host
