"""Sparse layers with different numbers of experts: DeepSpeed-MoE's pyramid."""

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor
from support.configs import model as small_model
from support.hf import SPARSE, hf_experts
from support.moe import hf_states
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.models.mixtral.modeling_mixtral import (
    MixtralSparseMoeBlock,
    load_balancing_loss_func,
)

from mistral_ms.checkpoint import open_checkpoint
from mistral_ms.checkpoint.save import save_model
from mistral_ms.config import (
    MoEArchitecture,
    ParallelConfig,
    RoutingConfig,
    RunConfig,
    from_hf,
    to_hf,
)
from mistral_ms.config.base import validate
from mistral_ms.config.computation import computation
from mistral_ms.config.hugging_face import to_native
from mistral_ms.errors import ConfigError
from mistral_ms.models import CausalLM, Objective
from mistral_ms.moe import Gate
from mistral_ms.parallel.graph.checks import check_run
from mistral_ms.parallel.memory import layer_memory
from mistral_ms.parallel.pipeline.costs import layer_costs
from mistral_ms.planner.load import balance
from mistral_ms.weights import by_name, specs

COUNTS = (2, 4)
V, H, S = 24, 8, 7


def pyramid(counts=COUNTS, **moe):
    return small_model(
        vocab_size=V, hidden_size=H, intermediate_size=12, num_hidden_layers=len(counts),
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
        initializer_range=0.3, moe={"num_local_experts": list(counts), **moe},
    )  # fmt: skip


def batch():
    rng = np.random.default_rng(1)
    ids = rng.integers(0, V, (2, S)).astype(np.int32)
    return ids, np.tile(np.arange(S, dtype=np.int32), (2, 1))


def hugging_face(config, weights):
    """Hugging Face's model, one of its blocks with fewer experts, and our weights."""
    sizes = dict(
        vocab_size=V, hidden_size=H, intermediate_size=12, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_experts_per_tok=2,
        rms_norm_eps=config.rms_norm_eps, rope_theta=config.rope_theta, sliding_window=None,
    )  # fmt: skip
    oracle = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4)).eval()
    fewer = MixtralConfig(**sizes, num_local_experts=2)
    setattr(oracle.model.layers[0], SPARSE, MixtralSparseMoeBlock(fewer))
    state, experts = {}, {}
    for name, values in weights.items():
        theirs = name if name.startswith("lm_head") else f"model.{name}"
        theirs = theirs.replace(".attention.", ".self_attn.").replace(
            ".moe.router.", f".{SPARSE}.gate."
        )
        if ".moe.experts." in name:
            path, w = theirs.replace(".moe.", f".{SPARSE}.").rsplit(".", 1)
            experts.setdefault(path, {})[w] = values
        else:
            state[theirs] = torch.tensor(values)
    for path, matrices in experts.items():
        state |= {name: torch.tensor(each) for name, each in hf_experts(path, matrices).items()}
    oracle.load_state_dict(state)
    return oracle


def test_equals_hugging_face_with_blocks_of_other_sizes():
    """Logits, the mean of each layer's load-balancing loss, and the gradients of gates."""
    config = pyramid()
    net = CausalLM(config)
    net.initialize(0)
    weights = {name: p.asnumpy().copy() for name, p in net.weights().items()}
    assert weights["layers.0.moe.experts.w1"].shape == (2, 12, H)
    assert weights["layers.1.moe.router.weight"].shape == (4, H)
    ids, positions = batch()
    oracle = hugging_face(config, weights)
    found = oracle(torch.tensor(ids, dtype=torch.long), output_router_logits=False)
    blocks = [getattr(layer, SPARSE) for layer in oracle.model.layers]
    logits = []

    def keep(gate, given, found):
        logits.append(hf_states(found))

    hooks = [b.gate.register_forward_hook(keep) for b in blocks]
    found = oracle(torch.tensor(ids, dtype=torch.long))
    for hook in hooks:
        hook.remove()
    got = net(Tensor(ids), Tensor(positions)).numpy()
    want = found.logits.detach().numpy()
    # float32 in two frameworks, exponentials good to 6e-6
    np.testing.assert_allclose(got, want, atol=5e-5 * np.abs(want).max())

    each = [
        load_balancing_loss_func((layer,), count, 2)
        for layer, count in zip(logits, COUNTS, strict=True)
    ]
    aux = (each[0] + each[1]) / 2
    labels = np.roll(ids, -1, 1)
    nll = torch.nn.functional.cross_entropy(
        found.logits.reshape(-1, V), torch.tensor(labels.ravel(), dtype=torch.long)
    )
    (nll + 0.5 * aux).backward()
    objective = Objective(net, router_aux_loss_coef=0.5, pooled_aux=False)
    gates = [net.weights()[f"layers.{i}.moe.router.weight"] for i in (0, 1)]
    forward = ms.value_and_grad(objective, None, gates, has_aux=True)
    (total, parts), gradients = forward(Tensor(ids), Tensor(labels), Tensor(positions))
    assert float(parts[1]) == pytest.approx(aux.item(), rel=1e-5)
    assert float(total) == pytest.approx((nll + 0.5 * aux).item(), rel=1e-5)
    for block, gradient in zip(blocks, gradients, strict=True):
        theirs = block.gate.weight.grad.numpy()
        limit = 2e-4 * np.abs(theirs).max()  # two layers of float32
        np.testing.assert_allclose(gradient.numpy(), theirs, atol=limit)
    routed = parts[3].numpy()
    assert routed.shape == (2, 4)
    assert not routed[0, 2:].any()
    np.testing.assert_array_equal(routed.sum(-1), 2 * ids.size)


def test_state_of_gates_is_moved_by_their_own_counts():
    config = pyramid(gate={"name": "sigmoid_top_k", "bias_update_rate": 0.5})
    net = CausalLM(config)
    net.update_gates(np.array([[3, 1, 0, 0], [1, 1, 1, 5]], np.float32))
    biases = [
        cell.buffers()["e_score_correction_bias"].asnumpy()
        for _, cell in net.cells_and_names()
        if isinstance(cell, Gate)
    ]
    np.testing.assert_array_equal(biases[0], [-0.5, 0.5])
    np.testing.assert_array_equal(biases[1], [0.5, 0.5, 0.5, -0.5])


def test_a_checkpoint_remembers_to_the_bit(tmp_path):
    config = pyramid()
    net = CausalLM(config)
    net.initialize(5)
    save_model(tmp_path / "saved", config, net.weights())
    with open_checkpoint(tmp_path / "saved") as source:
        assert source.config.moe == config.moe
        for name, parameter in net.weights().items():
            np.testing.assert_array_equal(source.read(name), parameter.asnumpy())


def test_ways_to_say_it():
    """A list, and what it becomes; equal numbers are one number."""
    moe = pyramid().moe
    assert (moe.num_local_experts, moe.layer_experts) == (4, COUNTS)
    assert validate(MoEArchitecture, moe.model_dump(mode="json"), "moe") == moe
    assert pyramid((4, 4)).moe == pyramid((4, 4)).model_copy().moe
    assert pyramid((4, 4)).moe.layer_experts is None
    config = pyramid((2, 4, 8), sparse_layers=[0, 1, 2])
    assert [config.of_layer(i).moe.num_local_experts for i in range(3)] == [2, 4, 8]
    found, _ = from_hf(to_native(config))
    assert computation(found) == computation(config)
    assert computation(config) != computation(pyramid((2, 8, 8), sparse_layers=[0, 1, 2]))
    with pytest.raises(ConfigError, match=r"moe\.layer_experts: \(2, 4, 8\)"):
        to_hf(config)


def test_a_dense_layer_counts_for_nothing():
    config = small_model(
        num_hidden_layers=4, moe={"num_local_experts": [4, 8], "sparse_layers": "every_other"}
    )
    held = by_name(specs(config))
    shapes = {i: held[f"layers.{i}.moe.router.weight"].shape[0] for i in (1, 3)}
    assert shapes == {1: 4, 3: 8}
    assert config.of_layer(0) is config
    costs = layer_costs(config, 16).layers
    assert costs[3] - costs[1] == 2 * config.hidden_size * 4


def test_memory_and_loads_are_those_of_the_layer():
    config = pyramid((2, 4))
    sizes = dict(rows=2, seq_length=8, itemsize=4, fused="all")
    few, many = (
        layer_memory(config, RoutingConfig(), ParallelConfig(), layer=i, **sizes) for i in (0, 1)
    )
    assert many.norms - few.norms == 2 * 16 * 2 * 4  # logits and probabilities of two experts more
    capacity = RoutingConfig(policy="capacity", capacity_factor=1.0)
    loads = [(0.75, 0.25, 0.0, 0.0), (0.25, 0.25, 0.25, 0.25)]
    # of 32 choices 24 want one of two experts with 16 slots; the other layer drops none
    assert balance(config, capacity, 1, 16, loads).dropped == pytest.approx(8 / 32 / 2)
    assert balance(config, RoutingConfig(), 2, 16, loads).slowest == pytest.approx(1.25)


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"num_local_experts": [2, 4, 8]}, r"\[2, 4, 8\] must have a number for each of the 2"),
        ({"num_local_experts": [1, 4]}, r"none may be less than num_experts_per_tok \(2\)"),
        ({"num_local_experts": ["2", 4]}, "must be a number, or one for each sparse layer"),
        ({"num_local_experts": 8, "layer_experts": [2, 4]}, r"must be num_local_experts \(8\)"),
    ],
)
def test_impossible_numbers(moe, message):
    with pytest.raises(ValueError, match=message):
        pyramid(**moe)


def test_layouts_and_losses_that_cannot_have_it():
    training = dict(max_steps=1, seq_length=8, global_batch_size=12, router_aux_loss_coef=0.01)
    run = dict(model=pyramid((4, 6)), training=training, routing={"aux_loss": "per_layer"})
    validate(RunConfig, {**run, "parallel": {"dp": 2, "ep": 2}}, "run")
    with pytest.raises(ConfigError, match=r"ep \(4\) must divide num_local_experts \(6\)"):
        validate(RunConfig, {**run, "parallel": {"dp": 4, "ep": 4}}, "run")
    with pytest.raises(ConfigError, match=r"aux_loss \(pooled\).*set routing\.aux_loss=per_layer"):
        validate(RunConfig, {**run, "routing": {}}, "run")
    with pytest.raises(ConfigError, match=r"num_local_experts: \[4, 6\].*execution=explicit"):
        check_run(validate(RunConfig, run, "run"), 2)
    with pytest.raises(ConfigError, match="pooled, with"):
        Objective(CausalLM(pyramid()), router_aux_loss_coef=0.1)
