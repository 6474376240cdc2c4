"""Activation bytes against the tensors that PyTorch saves in Hugging Face's model, and by hand."""

import pytest
from support.configs import TINY

from mistral_ms.config import (
    ModelConfig,
    MoEArchitecture,
    ParallelConfig,
    RoutingConfig,
    TrainingConfig,
)
from mistral_ms.parallel.memory import (
    GIB,
    activation_memory,
    expert_rows,
    layer_memory,
    too_large,
)

DENSE = ModelConfig(**TINY | {"num_hidden_layers": 4})
SPARSE = ModelConfig(**TINY, moe=MoEArchitecture(num_local_experts=4))
ONE, DROPLESS = ParallelConfig(), RoutingConfig()
SIZES = dict(layer=0, rows=2, seq_length=12, itemsize=4, fused="none")


def saved_by_torch(layers, rows, length):
    """Bytes of the distinct tensors, weights left out, that gradients are computed from."""
    import torch
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=4, head_dim=4, sliding_window=None,
        attn_implementation="eager",
    )  # fmt: skip
    model = MistralForCausalLM(config)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    ids = torch.zeros((rows, length), dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=ids, use_cache=False)
    return sum(nbytes for nbytes, _ in saved.values())


def test_a_dense_layer_keeps_what_torch_saves_of_hugging_faces():
    """Which has the same operations; as many key/value as query heads, because it copies those. It
    adds the visible keys as numbers and keeps none of them.
    """
    rows, length = 2, 12
    model = ModelConfig(
        vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, head_dim=4,
    )  # fmt: skip
    sizes = SIZES | {"rows": rows, "seq_length": length}
    ours = layer_memory(model, DROPLESS, ONE, **sizes).total
    theirs = saved_by_torch(2, rows, length) - saved_by_torch(1, rows, length)
    visible = rows * model.num_attention_heads * length * length
    assert ours - visible == theirs


def test_what_the_graph_keeps_of_a_block_that_is_computed_again():
    """Its input, rotated queries and keys, and the rows that came back: tests/dryrun/test_live.py
    counts them. In 16 bits the router computes from a copy in float32.
    """
    sizes = SIZES | {"fused": "all", "itemsize": 2}
    model = SPARSE
    found = layer_memory(model, DROPLESS, ONE, **sizes)
    T, H, D = 24, model.hidden_size, model.head_size
    heads = model.num_attention_heads + model.num_key_value_heads
    K = model.moe.num_experts_per_tok
    assert found.kept("full", in_graph=True) == 2 * (T * H + T * heads * D + T * K * H)
    assert found.kept("full") == 2 * T * H
    half = RoutingConfig(router_dtype="bfloat16")
    assert found.norms - layer_memory(model, half, ONE, **sizes).norms == 2 * T * H
    assert found.probabilities == 2 * T * model.num_attention_heads * 8 * 4


def test_a_sparse_layer_by_hand():
    T, H, E, K = 24, SPARSE.hidden_size, 4, SPARSE.moe.num_experts_per_tok
    dense, sparse = (layer_memory(m, DROPLESS, ONE, **SIZES) for m in (DENSE, SPARSE))
    assert sparse.feed_forward == K * dense.feed_forward
    assert sparse.dispatch == 2 * T * K * H * 4
    assert sparse.norms - dense.norms == 2 * T * E * 4


def test_shared_experts_keep_the_activations_of_a_dense_layer_and_two_results():
    T, K = 24, SPARSE.moe.num_experts_per_tok
    I, H = DENSE.intermediate_size, SPARSE.hidden_size  # noqa: E741
    fine = SPARSE.moe.model_copy(update={"moe_intermediate_size": I // 2, "n_shared_experts": 3})
    shared = SPARSE.model_copy(update={"moe": fine})
    dense, found = (layer_memory(m, DROPLESS, ONE, **SIZES) for m in (DENSE, shared))
    assert found.feed_forward == (K + 3) * dense.feed_forward // 2 + 2 * T * H * 4


def test_extra_feed_forwards_keep_what_dense_layers_keep_without_attention():
    T, H = 24, DENSE.hidden_size
    both = SPARSE.moe.model_copy(update={"extra_feed_forward": "both"})
    extra = SPARSE.model_copy(update={"moe": both})
    dense, plain, found = (layer_memory(m, DROPLESS, ONE, **SIZES) for m in (DENSE, SPARSE, extra))
    assert found.feed_forward - plain.feed_forward == 2 * dense.feed_forward
    # of each norm what it normalised, and gave, and unfused the normalised states; the mean squares
    assert found.norms - plain.norms == 2 * (3 * T * H + T) * 4
    assert found.results - plain.results == 2 * 2 * T * H * 4


def test_rows_of_experts():
    capacity = RoutingConfig(policy="capacity", capacity_factor=1.5)
    shared = ParallelConfig(dp=4, ep=4, devices_per_node=4)
    assert expert_rows(SPARSE, capacity, ONE, 100) == 4 * 75
    assert expert_rows(SPARSE, capacity, shared, 100) == 4 * 75
    assert expert_rows(SPARSE, DROPLESS, ONE, 100) == 200
    assert expert_rows(SPARSE, DROPLESS, shared, 100) == 4 * 100  # all ranks' tokens, once


def activations(execution="explicit", stage=0, micro_batches=1, **parallel):
    training = TrainingConfig(
        max_steps=1, seq_length=12, global_batch_size=8, gradient_accumulation_steps=micro_batches
    )
    return activation_memory(
        DENSE,
        DROPLESS,
        training,
        ParallelConfig(**parallel),
        stage=stage,
        execution=execution,
        fused="all" if execution == "graph" else "none",
        logit_tokens=None,
        gradients=100,
    )


def test_recomputing_leaves_less():
    """Nothing of the attention probabilities, nor of what attention and the norms gave, which are
    computed again with them (unfused norms keep two tensors more); of whole blocks their input.
    """
    none, selective, full = (activations(recompute=r) for r in ("none", "selective", "full"))
    rows, length, heads = 8, 12, DENSE.num_attention_heads
    probabilities = rows * heads * length * length * (4 + 1)  # and whether a key is visible
    states = rows * length * DENSE.hidden_size * 4
    result = rows * length * heads * DENSE.head_size * 4
    assert none.layers - selective.layers == 4 * (probabilities + 4 * states + result)
    assert full.layers == 4 * rows * length * DENSE.hidden_size * 4
    assert full.working - none.working == (none.layers - full.layers) // 4
    assert none.logits == 3 * rows * length * DENSE.vocab_size * 4


def test_a_pipeline():
    """1F1B of two stages and four micro-batches: the first has begun two when the first comes
    back. Stages of explicit collectives keep their inputs, those of a graph their layers'.
    """
    whole = activations(micro_batches=4)
    explicit = activations(pp=2, micro_batches=4)
    graph = activations("graph", pp=2, micro_batches=4)
    last = activations("graph", pp=2, micro_batches=4, stage=1)
    assert (explicit.in_flight, graph.in_flight, last.in_flight) == (2, 2, 1)
    assert explicit.layers == whole.layers // 2
    assert explicit.stage_inputs == 2 * (2 * 12 * DENSE.hidden_size * 4)
    assert graph.layers == 2 * last.layers
    assert (graph.stage_inputs, graph.logits) == (0, 0)
    assert last.logits > 0


def test_interleaved_chunks():
    """Two stages of two chunks and four micro-batches: the first stage goes ahead four times, and
    then once before each gradient. One chunk is computed at a time, half of a stage.
    """
    plain = activations(pp=2, micro_batches=4)
    chunks = activations(pp=2, pp_interleave_num=2, micro_batches=4)
    last = activations(pp=2, pp_interleave_num=2, micro_batches=4, stage=1)
    assert (chunks.in_flight, last.in_flight) == (5, 3)
    assert chunks.stage_inputs == 5 * plain.stage_inputs // plain.in_flight
    assert chunks.layers == plain.layers // 2
    assert last.logits > chunks.logits == 0


@pytest.mark.parametrize(
    ("gib", "limit", "device", "warned"),
    [
        (70, None, "Ascend", True),
        (60, None, "Ascend", False),
        (70, None, "CPU", False),
        (31, 30.0, "CPU", True),
    ],
)
def test_what_does_not_fit_is_said(gib, limit, device, warned):
    said = too_large(gib * GIB, limit, device)
    assert (said is not None) == warned
    if warned:
        assert f"about {gib}.0 GiB" in said
        assert "parallel.recompute" in said
