"""The loop over experts: Hugging Face's block, our decoder's layer and routed Cells do the same."""

import mindspore as ms
import numpy as np
import torch
from mindspore import Tensor, nn
from support.moe import hf_block, hf_states, moe_config, moe_layer

from mistral_ms.mixtures.fastmoe import NaiveGate
from mistral_ms.mixtures.naive import NaiveMoELayer
from mistral_ms.mixtures.routed import RoutedFeedForward

CLOSE = dict(rtol=2e-5, atol=2e-6)
"""Float32 sums of tens of products; MindSpore's exp on the CPU is good to 6e-6."""


class SwiGLU(nn.Cell):
    def __init__(self, w1, w2, w3):
        super().__init__()
        self.w1, self.w2, self.w3 = (dense(w) for w in (w1, w2, w3))

    def construct(self, x):
        return self.w2(ms.ops.silu(self.w1(x)) * self.w3(x))


def dense(w):
    made = nn.Dense(w.shape[1], w.shape[0], has_bias=False)
    made.weight.set_data(Tensor(np.ascontiguousarray(w)))
    return made


def test_it_is_mixtrals_block_and_our_layer():
    config = moe_config()
    layer, weights = moe_layer(config)
    stacked = [weights[f"experts.{w}"] for w in ("w1", "w2", "w3")]
    experts = [SwiGLU(*(w[e] for w in stacked)) for e in range(4)]
    naive = NaiveMoELayer(experts, dense(weights["router.weight"]), 2)
    x = np.random.default_rng(3).normal(0, 1, (11, 6)).astype(np.float32)
    found = naive(Tensor(x)).asnumpy()
    theirs = hf_states(hf_block(config, weights)(torch.tensor(x)[None]))
    np.testing.assert_allclose(found, theirs[0].detach().numpy(), **CLOSE)
    ours, _ = layer(Tensor(x), Tensor(np.ones(11, np.float32)))
    np.testing.assert_allclose(ours.asnumpy(), found, **CLOSE)


def test_routed_cells_do_the_same_and_have_the_same_gradients():
    rng = np.random.default_rng(4)
    drawn = [[rng.normal(0, 0.5, s) for s in ((9, 6), (6, 9), (9, 6))] for _ in range(5)]
    experts = [SwiGLU(*(w.astype(np.float32) for w in each)) for each in drawn]
    gate = NaiveGate(6, 5, 2, seed=1)
    routed = RoutedFeedForward(experts, gate)

    class Logits(nn.Cell):
        def __init__(self):
            super().__init__()
            self.gate = gate

        def construct(self, x):
            return self.gate.logits(x)

    naive = NaiveMoELayer(experts, Logits(), 2)
    x = Tensor(rng.normal(0, 1, (3, 4, 6)).astype(np.float32))
    np.testing.assert_allclose(routed(x).asnumpy(), naive(x).asnumpy(), **CLOSE)
    weights = [gate.weight, *(e.w1.weight for e in experts)]
    direction = Tensor(rng.normal(0, 1, (3, 4, 6)).astype(np.float32))
    found = ms.grad(lambda x: (routed(x) * direction).sum(), 0, weights)(x)
    want = ms.grad(lambda x: (naive(x) * direction).sum(), 0, weights)(x)
    np.testing.assert_allclose(found[0].asnumpy(), want[0].asnumpy(), rtol=1e-4, atol=1e-5)
    for mine, other in zip(found[1], want[1], strict=True):
        np.testing.assert_allclose(mine.asnumpy(), other.asnumpy(), rtol=1e-4, atol=1e-5)
