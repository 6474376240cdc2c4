"""The gate that hashes tokens: against Threefry in NumPy's integers, and a loop over experts."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from support.configs import TINY
from support.configs import model as small_model
from support.gates import gated
from support.moe import moe_layer
from support.routing import silu

from mistral_ms.checkpoint import open_checkpoint, save_native
from mistral_ms.checkpoint.load import load_weights
from mistral_ms.config import DROPLESS, MoEArchitecture
from mistral_ms.config.base import validate
from mistral_ms.config.token_counts import read_token_counts, token_counts_text
from mistral_ms.errors import ConfigError
from mistral_ms.layers import CacheSpec
from mistral_ms.models import CausalLM, NextTokenLogits
from mistral_ms.moe import make_gate

H, E = 6, 7


def threefry(key, counter):
    """The first word of Threefry-2x32 with 20 rounds, in uint32 that wraps."""
    keys = [np.uint32(k) for k in key]
    keys.append(np.uint32(0x1BD11BDA) ^ keys[0] ^ keys[1])
    x, y = counter.astype(np.uint32) + keys[0], np.zeros(len(counter), np.uint32) + keys[1]
    for injection in range(5):
        for bits in ((13, 15, 26, 6), (17, 29, 16, 24))[injection % 2]:
            x = x + y
            y = ((y << np.uint32(bits)) | (y >> np.uint32(32 - bits))) ^ x
        x = x + keys[(injection + 1) % 3]
        y = y + keys[(injection + 2) % 3] + np.uint32(injection + 1)
    return x


def experts_of(ids, seed=0, layer=0):
    return ((threefry((seed, layer), ids) >> np.uint32(9)).astype(np.float64) + 0.5) * E // 2**23


@pytest.mark.parametrize(("seed", "layer"), [(0, 0), (5, 0), (0, 3)])
def test_the_expert_is_a_function_of_seed_layer_and_id(seed, layer):
    gate = make_gate(gated({"name": "hash_top_1", "hash_seed": seed}, 1, False), DROPLESS, layer)
    assert not list(gate.get_parameters())
    ids = np.arange(32000, dtype=np.int32)
    x = Tensor(np.zeros((32000, 1), np.float32))
    weights, experts, scores, logits, _ = (
        part.numpy() if isinstance(part, Tensor) else part for part in gate(x, None, Tensor(ids))
    )
    want = experts_of(ids, seed, layer)
    np.testing.assert_array_equal(experts[:, 0], want)
    assert (weights == 1).all()
    assert not logits.any()
    np.testing.assert_array_equal(scores, np.eye(E)[experts[:, 0]])
    # chi-square with 6 degrees of freedom: 35 is passed once in 2e5 times; the control is the
    # hash with one id in twenty sent to the first expert
    for each, even in ((want, True), (np.where(ids % 20 == 0, 0, want), False)):
        counts = np.bincount(each.astype(int), minlength=E)
        assert (((counts - 32000 / E) ** 2).sum() * E / 32000 < 35) == even
    if (seed, layer) != (0, 0):
        same = (want == experts_of(ids)).mean()
        assert abs(same - 1 / E) < 4 * np.sqrt(1 / E / 32000), "another map"


def test_a_layer_equals_one_dense_expert_for_each_token(mode):
    layer, weights = moe_layer(gated("hash_top_1", 1, False))
    rng = np.random.default_rng(1)
    x, ids = rng.normal(size=(40, H)).astype(np.float32), rng.integers(0, 20, 40).astype(np.int32)
    want = np.zeros((40, H))
    for t, e in enumerate(experts_of(ids).astype(int)):
        w1, w2, w3 = (weights[f"experts.w{i}"][e].astype(np.float64) for i in (1, 2, 3))
        want[t] = w2 @ (silu(w1 @ x[t]) * (w3 @ x[t]))
    got, sums = layer(Tensor(x), Tensor(np.ones(40, np.float32)), None, Tensor(ids))
    # MindSpore's exponential is good to 6e-6
    np.testing.assert_allclose(got.numpy(), want, atol=2e-5 * np.abs(want).max())
    counts = np.bincount(experts_of(ids).astype(int), minlength=E)
    np.testing.assert_array_equal(sums[1].numpy(), counts)


def zipf_text(size, vocab_size, seed):
    shares = 1 / np.arange(1, vocab_size + 1)
    return np.random.default_rng(seed).choice(vocab_size, size, p=shares / shares.sum())


def test_a_table_by_frequency_is_stored_and_evens_the_load_of_texts(tmp_path):
    """On another text than the one that was counted; each layer has a table of its own."""
    V, path = TINY["vocab_size"], tmp_path / "token_counts.json"
    counted = np.bincount(zipf_text(20000, V, 0), minlength=V)
    path.write_text(token_counts_text({i: int(n) for i, n in enumerate(counted) if n}, V))
    loads, tables = {}, []
    for table in ("hash", "frequency"):
        gate = {"name": "hash_top_1", "table": table}
        if table == "frequency":
            gate["token_counts"] = str(path)
        moe = {"gate": gate, "num_local_experts": 4, "num_experts_per_tok": 1,
               "norm_topk_prob": False}  # fmt: skip
        model = CausalLM(small_model(**TINY, moe=moe))
        model.initialize(0)
        ids = zipf_text(20000, V, 1).astype(np.int32)
        x = Tensor(np.zeros((20000, 1), np.float32))
        for layer in model.layers:
            router = layer.moe.router
            chosen = router(x, None, Tensor(ids))[1].numpy()[:, 0]
            loads.setdefault(table, []).append(np.bincount(chosen, minlength=4))
            if table == "frequency":
                tables.append(router.expert_of_token.numpy())
                np.testing.assert_array_equal(chosen, tables[-1][ids])
    varies = {name: [each.std() / each.mean() for each in ls] for name, ls in loads.items()}
    # an expert has 5000 tokens, and their number a deviation of 61: 0.012; 4 of those
    assert max(varies["frequency"]) < 0.05
    assert min(varies["hash"]) > 0.1
    assert (tables[0] != tables[1]).any()
    name = "layers.1.moe.router.expert_of_token"
    held = ((n, p.shape, "float32", p.asnumpy()) for n, p in model.weights().items())
    save_native(tmp_path / "model", model.config, held)
    path.unlink()  # is of the first moment alone
    with open_checkpoint(tmp_path / "model") as source:
        again = CausalLM(source.config)
        load_weights(source, again.weights())
    np.testing.assert_array_equal(again.weights()[name].numpy(), tables[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"table": "frequency"}, "table frequency with token_counts None: the table frequency"),
        ({"token_counts": "c.json"}, r"table hash with token_counts c\.json"),
        ({"table": "balanced", "hash_seed": 3}, r"hash_seed \(3\) needs table hash, not balanced"),
    ],
)
def test_contradicting_settings(settings, message):
    with pytest.raises(ConfigError, match=message):
        validate(
            MoEArchitecture,
            {"num_local_experts": 4, "gate": {"name": "hash_top_1", **settings}},
            "moe",
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", r"no token counts: .*: \[\]: must have vocab_size and counts"),
        ('{"vocab_size":47,"counts":{}}', r"vocab_size 47: model\.vocab_size is 48"),
        ('{"vocab_size":48,"counts":{"48":1}}', r"id '48': ids are 0 to 47"),
        ('{"vocab_size":48,"counts":{"7":-1}}', r"-1 times id 7: must be a whole number"),
        (None, "cannot read: .*: No such file"),
    ],
)
def test_bad_counts(tmp_path, text, message):
    path = tmp_path / "c.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_token_counts(path, 48)


def test_two_experts_a_token_are_refused():
    with pytest.raises(ConfigError, match="hash_top_1 sends a token to one expert"):
        make_gate(gated("hash_top_1", 2, True), DROPLESS)


def test_a_model_with_a_cache_routes_the_same():
    """Token by token against the whole text; few tokens take an operator of their own."""
    moe = {"gate": "hash_top_1", "num_experts_per_tok": 1, "norm_topk_prob": False}
    config = small_model(**TINY, moe=moe)
    whole, cached = CausalLM(config), CausalLM(config, cache=CacheSpec.for_model(config, 1, 9, 4))
    whole.initialize(0)
    for name, parameter in cached.weights().items():
        parameter.set_data(whole.weights()[name].value())
    ids = np.random.default_rng(0).integers(3, 48, (1, 9)).astype(np.int32)
    places, step = np.arange(9, dtype=np.int32)[None], NextTokenLogits(cached)
    want = whole(Tensor(ids), Tensor(places)).numpy()[0]
    for first, last in ((0, 4), (4, 5), (5, 9)):
        part = Tensor(ids[:, first:last]), Tensor(places[:, first:last])
        got = step(*part, Tensor([last - first - 1], ms.int32)).numpy()[0]
        # 1e-6 to 3e-6 measured for other gates: sums of float32 in another order
        np.testing.assert_allclose(got, want[last - 1], atol=2e-5 * np.abs(want).max())
