"""Sparse layers with shared and fine-grained experts against Hugging Face's blocks, forward and
backward, and against float64 loops.
"""

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor, nn
from support.configs import model as small_model
from support.hf import STACKED
from transformers import DeepseekV2Config, DeepseekV3Config, Dots1Config, Qwen2MoeConfig
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE
from transformers.models.dots1.modeling_dots1 import Dots1MoE
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

from mistral_ms.config import DROPLESS, RoutingConfig
from mistral_ms.moe import MoELayer

T, H, E, K = 21, 6, 8, 3
DENSE = 10
WIDTH = 4
"""Of a fine-grained expert."""
# MindSpore's exponential on CPU is good to 6e-6: so are router weights, SwiGLU and the gates
RELATIVE = 2e-5
GROUPS = {"n_group": 4, "topk_group": 2}
PUBLISHED = dict(
    hidden_size=H, intermediate_size=DENSE, moe_intermediate_size=WIDTH, num_experts_per_tok=K
)
DEEPSEEK = dict(
    PUBLISHED, n_routed_experts=E, n_shared_experts=2, routed_scaling_factor=2.5, **GROUPS
)
SIGMOID = {"name": "sigmoid_top_k", "routed_scaling_factor": 2.5, **GROUPS}
FAMILIES = {
    "qwen2": (
        lambda: Qwen2MoeSparseMoeBlock(
            Qwen2MoeConfig(
                **PUBLISHED,
                num_experts=E,
                shared_expert_intermediate_size=7,
                norm_topk_prob=False,
            )
        ),
        dict(
            shared_expert_intermediate_size=7,
            n_shared_experts=1,
            shared_expert_gate="sigmoid",
            norm_topk_prob=False,
        ),
    ),
    "deepseek-v1": (
        lambda: modeling_deepseek_v2.DeepseekV2MoE(
            DeepseekV2Config(
                **DEEPSEEK | dict(n_group=1, topk_group=1, routed_scaling_factor=1.0),
                topk_method="greedy",
                norm_topk_prob=False,
            )
        ),
        dict(n_shared_experts=2, norm_topk_prob=False, gate="group_limited_top_k"),
    ),
    "deepseek-v2": (
        lambda: modeling_deepseek_v2.DeepseekV2MoE(
            DeepseekV2Config(**DEEPSEEK, topk_method="group_limited_greedy", norm_topk_prob=False)
        ),
        dict(
            n_shared_experts=2,
            norm_topk_prob=False,
            gate={"name": "group_limited_top_k", "routed_scaling_factor": 2.5, **GROUPS},
        ),
    ),
    "deepseek-v3": (
        lambda: DeepseekV3MoE(DeepseekV3Config(**DEEPSEEK, norm_topk_prob=True)),
        dict(n_shared_experts=2, gate=SIGMOID),
    ),
    "dots1": (
        lambda: Dots1MoE(Dots1Config(**DEEPSEEK, norm_topk_prob=True)),
        dict(n_shared_experts=2, gate=SIGMOID),
    ),
}


def config(**moe):
    return small_model(
        vocab_size=8, hidden_size=H, intermediate_size=DENSE, num_hidden_layers=1,
        num_attention_heads=1, num_key_value_heads=1,
        moe={"num_local_experts": E, "num_experts_per_tok": K, "moe_intermediate_size": WIDTH,
             **moe},
    )  # fmt: skip


def layer(routing=DROPLESS, **moe):
    """With weights that were drawn, and those. Biases of the gate are so small that biased scores
    are positive: Hugging Face masks with zero.
    """
    cell, rng = MoELayer(config(**moe), routing), np.random.default_rng(0)
    weights = {}
    for name, parameter in cell.parameters_and_names():
        size = 2 if name.endswith("router.weight") else 1
        if name.endswith("correction_bias"):
            size = 0.1
        weights[name] = rng.normal(0, size / np.sqrt(parameter.shape[-1]), parameter.shape)
        weights[name] = weights[name].astype(np.float32)
        parameter.set_data(Tensor(weights[name]))
    return cell, weights


THEIRS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def hugging_face_name(name, published):
    """Of one tensor that is not stacked."""
    shared = "shared_expert" if "shared_expert_gate.weight" in published else "shared_experts"
    if name.startswith("router."):
        return name.replace("router", "gate")
    if name.startswith("shared_experts."):
        return f"{shared}.{THEIRS[name.split('.')[1]]}.weight"
    return name


def load(block, weights):
    state = {}
    for name, values in weights.items():
        if name.startswith("experts."):
            for e in range(E):
                state[f"experts.{e}.{THEIRS[name[-2:]]}.weight"] = torch.tensor(values[e])
        else:
            state[hugging_face_name(name, block.state_dict())] = torch.tensor(values)
    block.load_state_dict(state)
    return block


def inputs(seed=1):
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(T, H)) + rng.normal(size=H)).astype(np.float32)
    return x, rng.normal(size=(T, H)).astype(np.float32)


class Product(nn.Cell):
    def __init__(self, cell, valid):
        super().__init__()
        self.cell, self.valid = cell, valid

    def construct(self, x, dout):
        return (self.cell(x, self.valid)[0] * dout).sum()


@pytest.mark.skipif(STACKED, reason="blocks of transformers 4")
@pytest.mark.parametrize("name", FAMILIES)
def test_equals_hugging_face_forward_and_backward(name):
    make, moe = FAMILIES[name]
    cell, weights = layer(**moe)
    block = load(make(), weights)
    x, dout = inputs()
    theirs = torch.tensor(x, requires_grad=True)
    found = block(theirs[None])
    found = (found[0] if isinstance(found, tuple) else found).reshape(T, H)
    (found * torch.tensor(dout)).sum().backward()
    valid = Tensor(np.ones(T, np.float32))
    want = found.detach().numpy()
    got = cell(Tensor(x), valid)[0].numpy()
    np.testing.assert_allclose(got, want, atol=RELATIVE * np.abs(want).max())

    trained = [p for p in cell.get_parameters() if not p.name.endswith("correction_bias")]
    names = [n for n in weights if not n.endswith("correction_bias")]
    dx, gradients = ms.grad(Product(cell, valid), 0, trained)(Tensor(x), Tensor(dout))
    want = theirs.grad.numpy()
    np.testing.assert_allclose(dx.numpy(), want, atol=RELATIVE * np.abs(want).max())
    published = dict(block.named_parameters())
    for path, gradient in zip(names, gradients, strict=True):
        if path.startswith("experts."):
            each = [published[f"experts.{e}.{THEIRS[path[-2:]]}.weight"].grad for e in range(E)]
            zero = torch.zeros_like(published[f"experts.0.{THEIRS[path[-2:]]}.weight"])
            want = torch.stack([zero if g is None else g for g in each]).numpy()
        else:
            want = published[hugging_face_name(path, published)].grad.numpy()
        np.testing.assert_allclose(
            gradient.numpy(), want, atol=RELATIVE * np.abs(want).max(), err_msg=path
        )
        assert np.abs(want).max() > 0


def swiglu(x, w1, w2, w3):
    gate = x @ w1.T
    return (gate / (1 + np.exp(-gate)) * (x @ w3.T)) @ w2.T


def test_the_softmax_pair_weighs_both_results():
    """DeepSpeed's residual mixture: c = softmax(W x + b), c_0 of the experts and c_1 of the dense
    one; and a token that is turned away still has the dense one.
    """
    routing = RoutingConfig(policy="capacity", capacity_factor=0.5)
    moe = dict(n_shared_experts=1, shared_expert_gate="softmax_pair", num_experts_per_tok=1,
               norm_topk_prob=False, num_local_experts=2)  # fmt: skip
    cell, weights = layer(routing, **moe)
    x, _ = inputs()
    valid = np.ones(T, np.float32)
    y, sums = cell(Tensor(x), Tensor(valid))
    weights = {name: values.astype(np.float64) for name, values in weights.items()}
    shared = swiglu(x, *(weights[f"shared_experts.w{i}.weight"] for i in (1, 2, 3)))
    logits = x @ weights["shared_expert_gate.weight"].T + weights["shared_expert_gate.bias"]
    shares = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    scores = np.exp(x @ weights["router.weight"].T)
    scores /= scores.sum(-1, keepdims=True)
    left, dropped = [6, 6], 0  # ceil(0.5 * 21 / 2) slots
    for t in range(T):
        e, routed = int(scores[t].argmax()), np.zeros(H)
        if left[e]:
            left[e] -= 1
            routed = scores[t, e] * swiglu(x[t], *(weights[f"experts.w{i}"][e] for i in (1, 2, 3)))
        dropped += not routed.any()
        want = shares[t, 0] * routed + shares[t, 1] * shared[t]
        np.testing.assert_allclose(y.numpy()[t], want, atol=RELATIVE * np.abs(shared).max())
    assert dropped == T - int(sums[2].numpy().sum()) > 0


def test_names_and_shapes_of_the_weights():
    cell, _ = layer(n_shared_experts=2, shared_expert_gate="softmax_pair")
    shapes = {name: tuple(p.shape) for name, p in cell.parameters_and_names()}
    assert shapes["experts.w1"] == (E, WIDTH, H)
    assert shapes["shared_experts.w1.weight"] == (2 * WIDTH, H)
    assert shapes["shared_experts.w2.weight"] == (H, 2 * WIDTH)
    assert shapes["shared_expert_gate.weight"] == (2, H)
    assert shapes["shared_expert_gate.bias"] == (2,)
