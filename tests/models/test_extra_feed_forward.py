"""Dense feed-forwards beside the experts of a block, against Hugging Face's pieces put together in
torch: OpenMoE has one after them (arXiv:2402.01739), ST-MoE tried both sides (arXiv:2202.08906).
"""

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor, nn
from support.configs import TINY
from support.configs import model as small_model
from support.hf import BASE, STACKED, make_mixed_pair
from support.models import fill, ragged_batch
from transformers.models.mistral.modeling_mistral import MistralMLP, MistralRMSNorm

from mistral_ms.checkpoint import open_checkpoint, save_native
from mistral_ms.checkpoint.load import load_weights
from mistral_ms.config import DROPLESS, to_hf, to_mistral
from mistral_ms.config.mindformers_yaml import to_mindformers
from mistral_ms.errors import ConfigError
from mistral_ms.layers import CacheSpec
from mistral_ms.models import CausalLM, DecoderBlock, LayerFactory

SPARSE = 1
RELATIVE = 2e-5
"""As without them: MindSpore's exponential on CPU is good to 6e-6."""
PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


class Extra(torch.nn.Module):
    """norm, then feed-forward; the caller adds."""

    def __init__(self, config, generator):
        super().__init__()
        self.norm, self.mlp = MistralRMSNorm(config.hidden_size), MistralMLP(config)
        self.norm.variance_epsilon = config.rms_norm_eps
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(std=BASE["initializer_range"], generator=generator)
            self.norm.weight.add_(1.0)

    def forward(self, x):
        return self.mlp(self.norm(x))

    def named(self, side):
        """Under the names of our weights."""
        found = {"layernorm": self.norm.weight}
        for ours, theirs in PARTS.items():
            found[f"feed_forward.{ours}"] = getattr(self.mlp, theirs).weight
        return {f"layers.{SPARSE}.extra_{side}.{n}.weight": p for n, p in found.items()}


def with_extra(sides):
    """A mixed pair whose sparse block has them, and the torch pieces by side."""
    pair = make_mixed_pair(2, (SPARSE,))
    generator = torch.Generator().manual_seed(1)
    extra = {side: Extra(pair.hf.config, generator) for side in sides}
    block, entered = pair.hf.model.layers[SPARSE], []

    def enter(module, given, named):
        entered.append(given[0] if given else named["hidden_states"])

    def attended(module, given, result):
        before = result[0] + extra["before"](entered.pop() + result[0])
        return (before, *result[1:])

    def leave(module, given, result):
        states = result[0] if isinstance(result, tuple) else result
        states = states + extra["after"](states)
        return (states, *result[1:]) if isinstance(result, tuple) else states

    if "before" in sides:  # the block adds attention's result to what it was given
        block.register_forward_pre_hook(enter, with_kwargs=True)
        block.self_attn.register_forward_hook(attended)
    if "after" in sides:
        block.register_forward_hook(leave)
    key = "both" if len(sides) == 2 else sides[0]
    moe = pair.config.moe.model_copy(update={"extra_feed_forward": key})
    return pair.hf, pair, pair.config.model_copy(update={"moe": moe}), extra


class Product(nn.Cell):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def construct(self, ids, positions, dout):
        return (self.model(ids, positions) * dout).sum()


@pytest.mark.skipif(STACKED, reason="one version of the oracle is enough")
@pytest.mark.parametrize("sides", [("before",), ("after",), ("before", "after")], ids="+".join)
def test_logits_and_gradients_equal_those_of_torch(sides):
    hf, pair, config, extra = with_extra(sides)
    ids, positions = ragged_batch([9, 5], config.vocab_size)
    dout = np.random.default_rng(2).normal(size=(2, 9, config.vocab_size)).astype(np.float32)
    dout[positions < 0] = 0
    logits = hf(torch.tensor(ids).long(), attention_mask=torch.tensor(positions >= 0).long()).logits
    (logits * torch.tensor(dout)).sum().backward()
    named = {n: p for side, each in extra.items() for n, p in each.named(side).items()}
    weights = pair.weights() | {n: p.detach().numpy() for n, p in named.items()}
    model = fill(CausalLM(config, positions=9), weights)
    got, want = model(Tensor(ids), Tensor(positions)).numpy(), logits.detach().numpy()
    real = positions >= 0
    assert np.abs(got - want)[real].max() <= RELATIVE * np.abs(want[real]).max()

    parameters = [model.weights()[name] for name in named]
    given = Tensor(ids), Tensor(positions), Tensor(dout)
    for gradient, (name, theirs) in zip(
        ms.grad(Product(model), None, parameters)(*given), named.items(), strict=True
    ):
        want = theirs.grad.numpy()
        np.testing.assert_allclose(
            gradient.numpy(), want, atol=RELATIVE * np.abs(want).max(), err_msg=name
        )
        assert np.abs(want).max() > 0


def config(side="both"):
    return small_model(**TINY, moe={"sparse_layers": (1,), "extra_feed_forward": side})


def test_a_checkpoint_keeps_them_and_tokens_one_by_one_give_the_same(tmp_path):
    model = CausalLM(config(), positions=6)
    model.initialize(3)
    held = ((n, p.shape, "float32", p.asnumpy()) for n, p in model.weights().items())
    save_native(tmp_path / "ours", config(), held)
    ids, positions = ragged_batch([6], 48)
    want = model(Tensor(ids), Tensor(positions)).numpy()
    with open_checkpoint(tmp_path / "ours") as source:
        assert source.config.moe.extra_feed_forward == "both"
        cached = CausalLM(source.config, DROPLESS, cache=CacheSpec(1, 6))
        load_weights(source, cached.weights())
    found = [
        cached(Tensor(ids[:, i : i + 1]), Tensor(positions[:, i : i + 1])).numpy() for i in range(6)
    ]
    got = np.concatenate(found, 1)
    np.testing.assert_allclose(got, want, atol=RELATIVE * np.abs(want).max())


def test_selective_recompute_takes_their_norms():
    block = DecoderBlock(LayerFactory(config("after"), DROPLESS), SPARSE)
    assert block.extra_before is None
    assert block.extra_after.layernorm in block.recomputed_selectively()
    assert DecoderBlock(LayerFactory(config(), DROPLESS), 0).extra_after is None  # a dense block


@pytest.mark.parametrize("to", [to_hf, to_mistral, to_mindformers])
def test_other_formats_cannot_express_them(to):
    every = small_model(**TINY, moe={"extra_feed_forward": "after"})
    with pytest.raises(ConfigError, match=r"moe\.extra_feed_forward: after"):
        to(every)
