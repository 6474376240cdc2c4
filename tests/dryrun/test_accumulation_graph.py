"""Several micro-batches without a pipeline: gradients are added up, and over ranks once a step.

A sparse model, and a dense one that is divided as the run file of Mistral 7B divides it.
"""

from __future__ import annotations

import re
from collections import Counter

import pytest
from dryrun.small_runs import HALF, KEYS, QUERIES, WIDE, C, E, H, V, layers_of, small_run

from mistral_ms.config import load_run_config
from mistral_ms.errors import DryrunError
from mistral_ms.parallel.dryrun.ir import read
from mistral_ms.parallel.dryrun.report import alltoall_per_layer

FORWARD, BACKWARD, RECOMPUTE = "forward", "backward", "recompute"
SPARSE, SPARSE_RANK, SPARSE_MICRO = {"dp": 4, "ep": 4, "recompute": "full"}, 1, 2
DENSE = {"dp": 8, "optimizer_parallel": True, "recompute": "full"}
DENSE_RANK, MICRO = 5, 3
LAYERS = layers_of(SPARSE)
DENSE_SHAPES = {
    "embed_tokens.weight": (V, H),
    "lm_head.weight": (V, H),
    "norm.weight": (H,),
    **{
        f"layers.{layer}.{name}": shape
        for layer in range(LAYERS)
        for name, shape in {
            "input_layernorm.weight": (H,),
            "post_attention_layernorm.weight": (H,),
            "attention.q_proj.weight": (QUERIES, H),
            "attention.k_proj.weight": (KEYS, H),
            "attention.v_proj.weight": (KEYS, H),
            "attention.o_proj.weight": (H, QUERIES),
            "feed_forward.w1.weight": (WIDE, H),
            "feed_forward.w3.weight": (WIDE, H),
            "feed_forward.w2.weight": (H, WIDE),
        }.items()
    },
}


@pytest.fixture(scope="module")
def dense(compile_run):
    return compile_run(small_run(DENSE, MICRO, moe=False), DENSE_RANK)[0]


@pytest.fixture(scope="module")
def sparse(compile_run):
    return compile_run(small_run(SPARSE, SPARSE_MICRO), SPARSE_RANK)


def counted(graph):
    counts = Counter()
    for each in graph.communication:
        counts[each.operator, str(each.phase), each.given.shape] += each.times
    return counts


def share(shape):
    return (shape[0] // DENSE["dp"], *shape[1:])


def test_the_layout_is_that_of_the_run_file():
    from dryrun.conftest import ROOT

    for name in ("pretrain", "finetune"):
        run = load_run_config(ROOT / f"configs/run/{name}_mistral_7b_8card.yaml")
        sizes = {key: getattr(run.parallel, key) for key in DENSE}
        assert sizes == DENSE
        assert (run.parallel.pp, run.training.gradient_accumulation_steps > 1) == (1, True)


def test_dense_gradients_are_scattered_once_a_step(dense):
    graph = read(dense, DENSE_RANK, 8, {})
    wanted = Counter(("ReduceScatter", BACKWARD, shape) for shape in DENSE_SHAPES.values())
    found = {key: n for key, n in counted(graph).items() if key[0] == "ReduceScatter"}
    assert found == wanted  # not MICRO times
    assert all(each.ranks == tuple(range(8)) for each in graph.communication)


def test_dense_weights_are_gathered_once_a_step(dense):
    """Not for each micro-batch, nor again where blocks are recomputed; what is computed in half
    travels in half, which is all but the embedding.
    """
    graph = read(dense, DENSE_RANK, 8, {})
    wanted = Counter(
        ("AllGather", FORWARD, share(shape), "Float32" if name.startswith("embed") else "Float16")
        for name, shape in DENSE_SHAPES.items()
    )
    found = Counter()
    for each in graph.communication:
        if each.operator == "AllGather":
            found["AllGather", str(each.phase), each.given.shape, each.given.dtype] += each.times
    assert found == wanted


def test_only_numbers_travel_for_each_micro_batch(dense):
    graph = read(dense, DENSE_RANK, 8, {})
    found = {key: n for key, n in counted(graph).items() if key[0] == "AllReduce"}
    assert found == {
        ("AllReduce", FORWARD, ()): MICRO,  # the loss
        ("AllReduce", BACKWARD, ()): MICRO,  # its gradient's start
        ("AllReduce", BACKWARD, (1, 1)): 1,  # the loss, noted for the report
        ("AllReduce", BACKWARD, (1, 2)): LAYERS,  # how large a layer's output is, likewise
        ("AllReduce", "optimizer", (1,)): 1,  # the norm
    }


def test_dense_weights_have_a_buffer_to_be_added_up_in(dense):
    held = read(dense, DENSE_RANK, 8, {}).parameters
    assert {name: held[name].shape for name in DENSE_SHAPES} == {
        name: share(shape) for name, shape in DENSE_SHAPES.items()
    }
    buffers = {n.removeprefix("accu_grads."): t for n, t in held.items() if "accu_grads." in n}
    for name in [n for n in buffers if n.endswith(("metrics_buffer", "output_buffer"))]:
        del buffers[name]
    assert {name: t.shape for name, t in buffers.items()} == DENSE_SHAPES
    assert {t.dtype for t in buffers.values()} == {"Float32"}


DENSE_CHECKS = (
    test_dense_gradients_are_scattered_once_a_step,
    test_dense_weights_are_gathered_once_a_step,
    test_only_numbers_travel_for_each_micro_batch,
    test_dense_weights_have_a_buffer_to_be_added_up_in,
)


def inside(old, new, behind=""):
    """Changes a subgraph that runs for every micro-batch, not what stands around it; the first
    place behind some text.
    """

    def change(text):
        start = re.search(r"^subgraph @\S*◂.*LazyGraphModel", text, re.MULTILINE).end()
        start = text.index(behind, start)
        return text[:start] + text[start:].replace(old, new, 1)

    return change


def everywhere(old, new):
    return lambda text: text.replace(old, new)


SCALAR, MATRIX = "(<Tensor[Float32], ()", f"(<Tensor[Float32], {QUERIES, H}"
DENSE_MUTATIONS = {
    "a gradient scattered for each micro-batch": (
        inside(" = AllReduce(Tensor(", " = ReduceScatter(Tensor("), 0),
    "a weight gathered for each micro-batch": (
        inside(" = AllReduce(Tensor(", " = AllGather(Tensor("), 1),
    "a weight added up for each micro-batch": (inside(SCALAR, MATRIX, behind=" = AllReduce("), 2),
    "gradients added up, not scattered": (everywhere(" = ReduceScatter(", " = AllReduce("), 0),
    "half the ranks": (
        everywhere("group_rank_ids: (0, 1, 2, 3, 4, 5, 6, 7)", "group_rank_ids: (0, 1, 2, 3)"), 0),
    "no buffers": (everywhere("accu_grads.", "other."), 3),
    "whole weights": (everywhere(f"({QUERIES // 8}, {H})", f"({QUERIES}, {H})"), 3),
}  # fmt: skip


@pytest.mark.parametrize("mutation", DENSE_MUTATIONS)
def test_a_changed_dense_graph_is_noticed(dense, mutation):
    change, number = DENSE_MUTATIONS[mutation]
    changed = change(dense)
    assert changed != dense
    with pytest.raises((AssertionError, DryrunError, KeyError)):
        DENSE_CHECKS[number](changed)


def check_sparse(text, groups):
    """Per layer and micro-batch two exchanges forward, two again, two backward; weights once."""
    graph = read(text, SPARSE_RANK, 4, groups)
    times, size = 2 * LAYERS * SPARSE_MICRO, E * C * H * HALF
    exchanges = Counter()
    for each in graph.communication:
        if each.operator == "AlltoAll":
            exchanges[str(each.phase), each.ranks, each.nbytes] += each.times
    phases, ranks = (FORWARD, RECOMPUTE, BACKWARD), (0, 1, 2, 3)
    assert exchanges == {(phase, ranks, size): times for phase in phases}
    assert graph.on_host == {}  # nor does it call Python
    # what is computed again is neither
    assert alltoall_per_layer(graph, SPARSE_MICRO) == {"forward": 2, "backward": 2}
    added_up = Counter()
    for each in graph.communication:
        if each.operator == "AllReduce" and each.given.shape not in ((), (1,)):
            added_up[each.given.shape] += each.times
    attention = [(QUERIES, H), (KEYS, H), (KEYS, H), (H, QUERIES)]
    layer = [*attention, (H,), (H,), (E, H)]  # ep = dp: experts have no copies
    recorded = [*[(1, 2 + 2 * E), (1, 2)] * LAYERS, (1, 1)]
    assert added_up == Counter([*layer * LAYERS, (V, H), (V, H), (H,), *recorded])


def test_exchanges_of_each_micro_batch_and_gradients_of_a_step(sparse):
    check_sparse(*sparse)


SPARSE_MUTATIONS = {
    "an exchange less": inside(" = AlltoAll(", " = Identity("),
    "exchanges of one micro-batch": lambda text: re.sub(
        r"= call (@\S*▸\S*LazyGraphModel)", r"= call @other_▸LazyGraphModel", text, count=1
    ),
    "a weight added up for each micro-batch": inside(SCALAR, MATRIX, behind=" = AllReduce("),
    "a weight that is not added up": everywhere(" = AllReduce(", " = Identity("),
}


@pytest.mark.parametrize("mutation", SPARSE_MUTATIONS)
def test_a_changed_sparse_graph_is_noticed(sparse, mutation):
    text, groups = sparse
    changed = SPARSE_MUTATIONS[mutation](text)
    assert changed != text
    with pytest.raises((AssertionError, DryrunError)):
        check_sparse(changed, groups)
