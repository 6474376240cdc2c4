"""The graphs of generation, compiled for Ascend: what travels, and what each rank holds.

Groups and bytes are written out by hand. Rank 3 of dp=4, mp=2, ep=2: the second tensor-parallel
rank of the second data-parallel place; its experts are shared with rank 1.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from dryrun.small_runs import HALF, WIDE, E, H, K, V
from support import configs

from mistral_ms.config import PredictConfig
from mistral_ms.errors import ConfigError
from mistral_ms.parallel.dryrun.ir import read
from mistral_ms.parallel.dryrun.process import TARGETS
from mistral_ms.parallel.graph.checks import check_prediction

ROOT = Path(__file__).parents[2]
RANK, WORLD, LAYERS = 3, 8, 2
TENSOR, EXPERT = (2, 3), (1, 3)
BATCH, LENGTH, CHUNK = 8, 48, 16
HERE = BATCH // 4  # samples of a data-parallel rank
KEYS = H // 2 // 2  # of the model, of a tensor-parallel rank
WIDTHS = {"prefill": CHUNK, "decode": 1}
FLOAT = INT = 4


def prediction(**parallel):
    return {
        "model": {
            "vocab_size": V,
            "hidden_size": H,
            "intermediate_size": WIDE,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "moe": {"num_local_experts": E},
        },
        "prediction": {
            "batch": BATCH, "max_length": LENGTH, "chunk": CHUNK, "dtype": "float16"
        },
        "parallel": {"dp": 4, "mp": 2, "ep": 2, **parallel},
    }  # fmt: skip


@pytest.fixture
def compile_step(compile_run):
    def compile_one(step, **parallel):
        text, groups = compile_run(prediction(**parallel), RANK, TARGETS[step])
        return text, read(text, RANK, WORLD, groups)

    return compile_one


def counted(graph):
    counts = Counter()
    for each in graph.communication:
        assert str(each.phase) == "forward"
        counts[each.operator, each.ranks, each.nbytes] += each.times
    return counts


@pytest.mark.parametrize("step", WIDTHS)
def test_what_travels(compile_step, step):
    """For each layer attention's partial sums, counts and rows to the experts, rows back, and the
    experts' partial sums; at the end the logits, to everybody. Two ranks may send both rows of
    every token to the four experts of one.
    """
    _, graph = compile_step(step)
    tokens = HERE * WIDTHS[step]
    states, rows, buffer = (n * tokens * H * HALF for n in (1, K, 2 * K))
    assert counted(graph) == {
        ("AllReduce", TENSOR, states): LAYERS,
        ("AlltoAll", EXPERT, E * INT): LAYERS,
        ("AlltoAllV", EXPERT, rows): LAYERS,
        ("AlltoAllV", EXPERT, buffer): LAYERS,
        ("AllReduce", TENSOR, buffer): LAYERS,
        ("AllGather", TENSOR, HERE * V // 2 * FLOAT): 1,
        ("AllGather", EXPERT, HERE * V * FLOAT): 1,
        ("AllGather", (3, 7), 2 * HERE * V * FLOAT): 1,
    }


def test_group_wise_each_tensor_parallel_rank_sends_its_share(compile_step):
    """Of the prompts: both graphs are of one cell."""
    _, graph = compile_step("prefill", group_wise_a2a=True)
    share = HERE * CHUNK * H // 2 * HALF
    exchanges = {key: n for key, n in counted(graph).items() if key[0] == "AlltoAllV"}
    assert exchanges == {("AlltoAllV", EXPERT, n * share): LAYERS for n in (K, 2 * K)}


def test_experts_multiply_real_rows_alone(compile_step):
    """Three products in each layer, of rows whose number is known when they have come."""
    text, _ = compile_step("prefill")
    products = re.findall(r"PrimFunc_GroupedMatmul\(.*\n.*TupleShape\(\((-?\d+), (\d+)\)\)", text)
    assert products == [("-1", str(width)) for width in (WIDE // 2, WIDE // 2, H)] * LAYERS


@pytest.mark.parametrize("step", WIDTHS)
def test_what_a_rank_holds(compile_step, step):
    """Its quarter of the samples and its half of the heads; matrices divided as in training, and
    the vocabulary of the head; 16 bits each.
    """
    _, graph = compile_step(step)
    columns = LENGTH + 1
    held = {name: (t.shape, t.nbytes) for name, t in graph.parameters.items()}
    assert held["key_positions.held"] == ((HERE * columns,), HERE * columns * 4)
    cache = (HERE * columns, KEYS), HERE * columns * KEYS * HALF
    experts = (E // 2 * H, WIDE // 2), E // 2 * H * WIDE // 2 * HALF
    for layer in range(LAYERS):
        at = f"layers.{layer}."
        assert held[f"{at}attention.cache.keys"] == held[f"{at}attention.cache.values"] == cache
        assert {held[f"{at}moe.experts.{name}"] for name in ("w1", "w3", "w2")} == {experts}
        assert held[f"{at}attention.q_proj.weight"][0] == (H // 2, H)
        assert held[f"{at}attention.k_proj.weight"][0] == (KEYS, H)
        assert held[f"{at}attention.o_proj.weight"][0] == (H, H // 2)
    assert held["embed_tokens.weight"][0] == (V, H)
    assert held["lm_head.weight"][0] == (V // 2, H)
    assert len(held) == 3 + 1 + LAYERS * (4 + 2 + 2 + 4)
    assert graph.cache_bytes == HERE * columns * 4 + 2 * LAYERS * cache[1]
    assert graph.optimizer_bytes == graph.gradient_bytes == 0


@pytest.mark.parametrize("step", WIDTHS)
def test_the_cache_is_written_in_place_and_nothing_runs_elsewhere(compile_step, step):
    text, graph = compile_step(step)
    writes = text.count(" = ScatterUpdate(") + text.count("PrimFunc_ScatterUpdate(")
    assert writes == 1 + 2 * LAYERS
    assert graph.on_host == {}


def test_both_graphs_share_parameters_that_are_cut_and_filled(compile_run, compile_step):
    """Decoding is compiled, its parameters filled with this rank's parts of the weights and
    compared, then prefill is compiled with them: the graph that it has by itself.
    """
    text, groups = compile_run(prediction(), RANK, "dryrun.filled_target:generate")
    graph = read(text, RANK, WORLD, groups)
    _, alone = compile_step("prefill")
    assert counted(graph) == counted(alone)
    shapes = {name: held.shape for name, held in graph.parameters.items()}
    assert shapes == {name: held.shape for name, held in alone.parameters.items()}


REFUSED = {
    "parallel.pp: 2: the graph of generation has one stage": {"parallel": {"pp": 2, "ep": 1}},
    "parallel.recompute: full: there is no gradient": {"parallel": {"recompute": "full"}},
    "parallel.optimizer_parallel": {"parallel": {"optimizer_parallel": True}},
    "heads of a multiple of 16": {"head_dim": 8},
    "dp \\* mp \\* pp = 6: MindSpore divides": {"parallel": {"dp": 3, "ep": 1}, "batch": 9},
}


def changed(parallel=None, batch=BATCH, **model):
    sizes = {"batch": batch, "max_length": LENGTH, "chunk": CHUNK}
    model = configs.model(**{"num_attention_heads": 4, "head_dim": 16, "moe": {}, **model})
    layout = {"dp": 4, "mp": 2, "ep": 2, **(parallel or {})}
    return PredictConfig(model=model, prediction=sizes, parallel=layout)


@pytest.mark.parametrize("message", REFUSED)
def test_refused_before_the_compiler(message):
    check_prediction(changed())
    with pytest.raises(ConfigError, match=message):
        check_prediction(changed(**REFUSED[message]))


def test_the_command_compiles_the_shipped_prediction(command, tmp_path):
    """Eight cards, an expert each; one layer for speed."""
    out = tmp_path / "out.json"
    config = ROOT / "configs/run/predict_mixtral_8x7b_8card.yaml"
    narrow = ("model.hidden_size=64", "model.intermediate_size=96", "model.head_dim=16")
    done = command(
        "--config", config, "--rank", 7, "--step", "prefill", "--layers", 1, "--json", out, *narrow
    )
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())
    exchanges = {
        (line["operator"], line["group"], line["bytes"], line["count"])
        for line in found["communication"]
        if "AlltoAll" in line["operator"]
    }
    row, tokens = 64 * 2, 8 * 512  # of a rank
    assert exchanges == {
        ("AlltoAll", "expert", 8 * INT, 1),
        ("AlltoAllV", "expert", tokens * K * row, 1),
        ("AlltoAllV", "expert", 8 * tokens * row, 1),
    }
    assert found["alltoall_per_moe_layer"] == {"forward": 3, "backward": 0}
    assert found["cache_bytes"] == 8 * 4097 * (4 + 2 * 8 * 16 * 2)
    assert "cache " in done.output


def test_a_training_has_no_prefill(command):
    config = ROOT / "configs/run/pretrain_mixtral_8x7b_32card.yaml"
    done = command("--config", config, "--step", "prefill")
    assert str(done.exception).startswith("no such graph: --step: prefill: a training has train")
