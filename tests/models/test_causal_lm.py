"""Logits equal Hugging Face's for every kind of model; the future and padding change no bit."""

import numpy as np
import pytest
from mindspore import Tensor
from support.configs import TINY
from support.configs import model as small_model
from support.hf import KINDS, SCALED, hf_logits, make_mixed_pair, make_pair
from support.models import fill, ragged_batch

from mistral_ms.config import DROPLESS, RoutingConfig
from mistral_ms.errors import ConfigError
from mistral_ms.layers import CacheSpec
from mistral_ms.models import CausalLM

RELATIVE = 2e-5
"""The promised bound on the logit difference over the largest logit; 1e-6 to 3e-6 measured."""
LENGTHS = [17, 9, 1, 13]


def logits(model, ids, position_ids):
    return model(Tensor(ids), Tensor(position_ids)).numpy()


def assert_equals_hugging_face(pair, bound=RELATIVE):
    ids, position_ids = ragged_batch(LENGTHS, pair.config.vocab_size)
    want = hf_logits(pair, ids, position_ids)
    got = logits(
        fill(CausalLM(pair.config, positions=ids.shape[1]), pair.weights()), ids, position_ids
    )
    assert got.dtype == np.float32
    assert got.shape == want.shape
    real = position_ids >= 0
    assert np.abs(got - want)[real].max() <= bound * np.abs(want[real]).max()
    return got[real]


class TestEqualsHuggingFace:
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_kind_with_ragged_padding(self, kind):
        assert_equals_hugging_face(make_pair(kind))

    @pytest.mark.parametrize(
        "kind", ["mixtral", "mistral-sliding-window", "tied-head", "alternating-windows"]
    )
    def test_in_a_graph(self, kind, graph):
        assert_equals_hugging_face(make_pair(kind, seed=1))

    @pytest.mark.parametrize("kind", SCALED)
    def test_positions_stretched_to_longer_contexts(self, kind):
        pair = make_pair(kind)
        got = assert_equals_hugging_face(pair, bound=1e-5)
        ids, position_ids = ragged_batch(LENGTHS, pair.config.vocab_size)
        plain = pair.config.model_copy(update={"rope_scaling": None})
        unscaled = logits(
            fill(CausalLM(plain, positions=ids.shape[1]), pair.weights()), ids, position_ids
        )[position_ids >= 0]
        assert np.abs(got - unscaled).max() > 1e-3 * np.abs(got).max()  # the scaling matters

    @pytest.mark.parametrize("sparse_layers", [(1,), (0, 2)])
    def test_dense_and_sparse_layers_mixed(self, sparse_layers):
        assert_equals_hugging_face(make_mixed_pair(3, sparse_layers))

    @pytest.mark.parametrize("k", [1, 3])
    def test_top_k(self, k):
        assert_equals_hugging_face(make_pair("mixtral", num_experts_per_tok=k))

    def test_in_half_precision(self):
        """As close to float32 as Hugging Face's own half precision is, within a factor of 2."""
        pair = make_pair("mixtral", initializer_range=0.05)
        ids, position_ids = ragged_batch(LENGTHS, pair.config.vocab_size)
        exact = hf_logits(pair, ids, position_ids)[position_ids >= 0]
        model = CausalLM(pair.config, dtype="float16")
        assert {p.dtype for p in model.weights().values()} == {Tensor(ids).astype("float16").dtype}
        fill(model, pair.weights())
        pair.hf.half()
        theirs = np.abs(
            hf_logits(pair, ids, position_ids).astype(np.float32)[position_ids >= 0] - exact
        ).max()
        ours = np.abs(logits(model, ids, position_ids)[position_ids >= 0] - exact).max()
        assert 0 < ours <= 2 * theirs


ROUTINGS = {
    "dropless": DROPLESS,
    "capacity": RoutingConfig(policy="capacity", capacity_factor=0.5),
    "choice-major": RoutingConfig(
        policy="capacity", capacity_factor=0.5, drop_priority="choice_major"
    ),
}


class TestBitForBit:
    @pytest.mark.parametrize(("kind", "bound"), [("mixtral", 1e-5), ("mistral-sliding-window", 0)])
    def test_the_future_does_not_change_the_past(self, kind, bound):
        """Dropless up to rounding: an expert that later tokens choose, too, has more rows, and
        oneDNN adds up in another order for one row than for several.
        """
        pair = make_pair(kind)
        model = fill(CausalLM(pair.config), pair.weights())
        ids, position_ids = ragged_batch([16], pair.config.vocab_size)
        before = logits(model, ids, position_ids)
        ids[0, 11:] = ids[0, 11:][::-1] + 1
        after = logits(model, ids, position_ids)
        atol = bound * np.abs(before).max()
        np.testing.assert_allclose(before[0, :11], after[0, :11], rtol=0, atol=atol)
        assert (before[0, 11:] != after[0, 11:]).any(-1).all()

    def test_nor_does_it_under_a_token_major_capacity(self):
        """Earlier tokens are served first; choice-major order cannot promise this."""
        pair = make_pair("mixtral")
        model = fill(CausalLM(pair.config, ROUTINGS["capacity"]), pair.weights())
        ids, position_ids = ragged_batch([16], pair.config.vocab_size)
        before = logits(model, ids, position_ids)
        ids[0, 11:] = 7
        after = logits(model, ids, position_ids)
        np.testing.assert_array_equal(before[0, :11], after[0, :11])

    @pytest.mark.parametrize("routing", ROUTINGS)
    def test_padding_may_hold_anything(self, routing):
        pair = make_pair("mixtral")
        model = fill(CausalLM(pair.config, ROUTINGS[routing]), pair.weights())
        ids, position_ids = ragged_batch([11, 16, 0, 3], pair.config.vocab_size)
        before = model.hidden_states(Tensor(ids), Tensor(position_ids))
        other = np.where(position_ids >= 0, ids, (ids * 7 + 1) % pair.config.vocab_size).astype(
            np.int32
        )
        after = model.hidden_states(Tensor(other), Tensor(position_ids))
        assert np.isfinite(before[0].numpy()).all()  # also of the row that holds nothing
        real = (position_ids >= 0).ravel()
        np.testing.assert_array_equal(before[0].numpy()[real], after[0].numpy()[real])
        *sums, terms, counted = before[1]
        assert terms == ()  # this gate has no losses of its own
        np.testing.assert_array_equal(counted.numpy(), sums[1].numpy())
        for ours, theirs in zip(sums, after[1][:-2], strict=True):
            np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
        _, routed, kept, _, tokens = (part.numpy() for part in sums)
        assert (tokens == 30).all()
        assert (routed.sum(-1) == 60).all()
        assert (kept.sum(-1) < 60).all() == (routing != "dropless")

    def test_padding_may_stand_anywhere(self):
        """Left padding gives the same logits as right padding, up to the order of sums."""
        pair = make_pair("mixtral")
        model = fill(CausalLM(pair.config), pair.weights())
        ids, position_ids = ragged_batch([9], pair.config.vocab_size)
        left = np.pad(position_ids, ((0, 0), (4, 0)), constant_values=-1)
        got = logits(model, np.pad(ids, ((0, 0), (4, 0))), left)[:, 4:]
        want = logits(model, ids, position_ids)
        assert np.abs(got - want).max() <= RELATIVE * np.abs(want).max()


class TestWeights:
    def test_names_of_a_mixed_model(self):
        pair = make_mixed_pair(3, (1,))
        names = set(CausalLM(pair.config).weights())
        assert names == set(pair.weights())
        assert "layers.0.feed_forward.w1.weight" in names
        assert "layers.1.moe.experts.w1" in names
        assert "layers.1.feed_forward.w1.weight" not in names

    def test_experts_cannot_choose_among_tokens_that_are_not_there_yet(self):
        routing = RoutingConfig(policy="experts_choose")
        with pytest.raises(ConfigError, match=r"experts_choose with a cache.*generate dropless"):
            CausalLM(small_model(**TINY), routing, cache=CacheSpec(1, 4))
        dense = small_model(**TINY, moe=None)
        CausalLM(dense, routing, cache=CacheSpec(1, 4))

    def test_a_cache_adds_no_weight(self):
        config = make_pair("mixtral").config
        cached = CausalLM(config, cache=CacheSpec(2, 8))
        assert set(cached.weights()) == set(CausalLM(config).weights())

    def test_a_tied_head_is_the_embedding(self):
        model = CausalLM(make_pair("tied-head").config)
        assert model.head_weight() is model.embed_tokens.weight
        assert not any("lm_head" in name for name in model.weights())


class TestInitialize:
    def values(self, config, seed=3, **options):
        model = CausalLM(config, **options)
        model.initialize(seed)
        return {name: p.numpy() for name, p in model.weights().items()}

    def test_is_a_function_of_the_seed(self):
        config = make_pair("mixtral").config
        first, again, other = (self.values(config, seed) for seed in (3, 3, 4))
        for name in first:
            np.testing.assert_array_equal(first[name], again[name])
            if first[name].ndim > 1:
                assert (first[name] != other[name]).mean() > 0.99

    def test_does_not_depend_on_what_else_is_built(self):
        """Weights of the same name are the same in a deeper, a cached and a mixed model."""
        config = make_pair("mixtral").config
        first = self.values(config)
        deeper = config.model_copy(update={"num_hidden_layers": 3})
        mixed = make_mixed_pair(3, (1,)).config
        for other in (
            self.values(deeper),
            self.values(mixed),
            self.values(config, cache=CacheSpec(1, 4)),
        ):
            shared = set(first) & set(other)
            assert len(shared) > 10
            for name in shared:
                np.testing.assert_array_equal(first[name], other[name])

    def test_every_weight_is_drawn_on_its_own_with_the_configured_spread(self):
        config = make_pair("mixtral", initializer_range=0.05).config
        values = self.values(config)
        large = {n: v.ravel() for n, v in values.items() if v.ndim > 1}
        for name, value in large.items():
            # the standard error of a standard deviation is 1 / sqrt(2 n); 5 of them
            assert abs(value.std() / 0.05 - 1) < 5 / np.sqrt(2 * value.size), name
        starts = {v[:4].tobytes() for v in large.values()}
        assert len(starts) == len(large), "two weights share their values"
        assert all((v == 1).all() for v in values.values() if v.ndim == 1)


def test_positions_can_be_fewer_than_the_models():
    config = make_pair("mixtral").config
    model = CausalLM(config, positions=32)
    model.initialize(0)
    assert model.rotary.cos.shape[0] == 32
    full = CausalLM(config)
    full.initialize(0)
    ids, position_ids = ragged_batch([9], config.vocab_size)
    np.testing.assert_array_equal(logits(model, ids, position_ids), logits(full, ids, position_ids))


def test_frozen_weights_are_weights_and_the_cache_is_not():
    config = make_pair("mixtral").config
    model = CausalLM(config, cache=CacheSpec(batch=1, length=8))
    names = set(model.weights())
    model.layers[0].moe.experts.w1.requires_grad = False
    assert set(model.weights()) == names == set(CausalLM(config).weights())
