"""PanGu Pro's gate against loops."""

import numpy as np
import pytest
from mindspore import Tensor
from support.moe import moe_config

from mistral_ms.config import DROPLESS, MoEArchitecture
from mistral_ms.errors import ConfigError
from mistral_ms.moe import make_gate

T, H, E, K = 100, 6, 12, 4


def gate(n_group, normalize=True):
    moe = MoEArchitecture(
        num_local_experts=E,
        num_experts_per_tok=K,
        norm_topk_prob=normalize,
        gate={"name": "grouped_top_k", "n_group": n_group},
    )
    cell = make_gate(moe_config(H=H, E=E, K=K).model_copy(update={"moe": moe}), DROPLESS)
    weight = np.random.default_rng(0).normal(size=(E, H)).astype(np.float32)
    cell.weight.set_data(Tensor(weight))
    return cell, weight


@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize("n_group", [1, 2, 4])
def test_as_many_experts_of_every_group(n_group, normalize):
    cell, weight = gate(n_group, normalize)
    x = np.random.default_rng(1).normal(size=(T, H)).astype(np.float32)
    logits = x.astype(np.float64) @ weight.T
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    weights, experts, scores, _, terms = cell(Tensor(x))
    assert terms == ()
    others = 0
    for t in range(T):
        want = []
        for group in np.arange(E).reshape(n_group, -1):
            want += sorted(group, key=lambda e: -probs[t, e])[: K // n_group]
        want.sort(key=lambda e: -probs[t, e])
        assert experts.numpy()[t].tolist() == want
        others += set(want) != set(np.argsort(-probs[t])[:K])
        total = probs[t, want].sum() if normalize else 1.0
        # MindSpore's exponential is good to 6e-6
        np.testing.assert_allclose(weights.numpy()[t], probs[t, want] / total, rtol=2e-5)
    assert (others > 0) == (n_group > 1)
    np.testing.assert_allclose(scores.numpy(), probs, rtol=2e-5)


@pytest.mark.parametrize("n_group", [5, 3, 8])
def test_impossible_groups(n_group):
    with pytest.raises(ConfigError, match="impossible groups of experts"):
        gate(n_group)
