"""Random routed experts: the map, what it does, and a domain as a model of its own."""

import numpy as np
import pytest
from mindspore import Tensor
from support.configs import TINY, model
from support.models import fill
from support.routing import silu

from mistral_ms.checkpoint import convert, open_checkpoint, save_native
from mistral_ms.config import RoutingConfig
from mistral_ms.config.token_counts import token_counts_text
from mistral_ms.errors import ConfigError
from mistral_ms.layers import CacheSpec
from mistral_ms.mixtures.domains import DomainLM, extract_domain
from mistral_ms.mixtures.expand import remove_experts
from mistral_ms.models import CausalLM, NextTokenLogits

V = 48


def config(experts=6, domains=3, sparse=(1,), **settings):
    gate = {"name": "random_routed", "domains": domains, **settings}
    moe = {
        "num_local_experts": experts,
        "num_experts_per_tok": 1,
        "sparse_layers": sparse,
        "gate": gate,
    }
    return model(**TINY, moe=moe, torch_dtype="float32")


def drawn(made):
    model = CausalLM(made)
    model.initialize(1)
    return model


def saved(path, made):
    values = {n: p.asnumpy() for n, p in made.weights().items()}
    save_native(path, made.config, [(n, v.shape, "float32", v) for n, v in values.items()])
    return values


@pytest.fixture
def batch():
    ids = np.random.default_rng(2).integers(0, V, (4, 8)).astype(np.int32)
    places = np.tile(np.arange(8, dtype=np.int32), (4, 1))
    places[1, 5:] = -1  # padding
    return ids, places


def test_tables_of_layers_and_domains_differ_and_are_the_seeds():
    made = DomainLM(config(sparse=(0, 1)))
    made.initialize(3)
    tables = [made.weights()[f"layers.{i}.moe.router.expert_of_token"].asnumpy() for i in (0, 1)]
    rows = np.concatenate(tables)
    assert len({row.tobytes() for row in rows}) == 6
    assert set(np.unique(rows)) == {0.0, 1.0}
    again = DomainLM(config(sparse=(0, 1)))
    again.initialize(3)
    found = again.weights()["layers.1.moe.router.expert_of_token"].asnumpy()
    np.testing.assert_array_equal(found, tables[1])


def test_tables_by_counts_give_experts_of_a_group_as_many_tokens(tmp_path):
    counts = {token: 1000 // (token + 1) for token in range(V)}
    path = tmp_path / "token_counts.json"
    path.write_text(token_counts_text(counts, V))
    made = DomainLM(config(token_counts=str(path)))
    made.initialize(0)
    for row in made.weights()["layers.1.moe.router.expert_of_token"].asnumpy():
        loads = np.bincount(row.astype(int), list(counts.values()), minlength=2)
        assert abs(loads[0] - loads[1]) <= min(counts.values())  # what came last filled a gap


def test_a_layer_by_tokens(batch):
    """Each token by the expert that the table names, its weight 1."""
    made = DomainLM(config())
    made.initialize(0)
    layer, (ids, places) = made.layers[1].moe, batch
    values = {n: p.asnumpy() for n, p in layer.parameters_and_names()}
    x = np.random.default_rng(4).normal(0, 1, (32, 16)).astype(np.float32)
    domain = np.repeat([2, 0, 1, 2], 8).astype(np.int32)
    valid = (places.ravel() >= 0).astype(np.float32)
    found, sums = layer(Tensor(x), Tensor(valid), None, Tensor(domain * V + ids.ravel()))
    want, counts = np.zeros((32, 16)), np.zeros(6)
    table = values["router.expert_of_token"]
    for t in range(32):
        if valid[t]:
            e = domain[t] * 2 + int(table[domain[t], ids.ravel()[t]])
            w1, w2, w3 = (values[f"experts.{w}"][e].astype(float) for w in ("w1", "w2", "w3"))
            want[t], counts[e] = w2 @ (silu(w1 @ x[t]) * (w3 @ x[t])), counts[e] + 1
    np.testing.assert_allclose(found.asnumpy(), want, rtol=2e-5, atol=2e-6)
    np.testing.assert_array_equal(sums[1].asnumpy(), counts)
    assert (counts > 0).sum() >= 5


@pytest.mark.parametrize("policy", ["dropless", "capacity"])
@pytest.mark.parametrize("domain", [0, 2])
def test_an_extracted_group_computes_the_same_bits(domain, policy, batch, tmp_path):
    """Other domains' experts and tables scrambled after the extraction."""
    made = DomainLM(config())
    made.initialize(1)
    values = saved(tmp_path / "whole", made)
    with open_checkpoint(tmp_path / "whole") as source:
        result = extract_domain(source, tmp_path / "one", domain)
    assert result.experts == 2
    for name, array in values.items():
        if ".moe.experts." in name:
            own = array[2 * domain : 2 * domain + 2].copy()
            array[:] = np.random.default_rng(9).normal(0, 7, array.shape)
            array[2 * domain : 2 * domain + 2] = own
        elif name.endswith("expert_of_token"):
            array[[d for d in range(3) if d != domain]] = 0
    # dropping would depend on how many experts share the tokens
    routing = RoutingConfig(policy=policy, capacity_factor=100.0)
    whole = fill(DomainLM(config(), routing), values)
    with open_checkpoint(tmp_path / "one") as source:
        assert source.config.moe.num_local_experts == 2
        one = DomainLM(source.config, routing)
        fill(one, {name: source.read(name) for name in source.names()})
    ids, places = (Tensor(each) for each in batch)
    want = whole(ids, places, Tensor(np.full(4, domain, np.int32))).asnumpy()
    found = one(ids, places, Tensor(np.zeros(4, np.int32))).asnumpy()
    np.testing.assert_array_equal(found, want)
    other = whole(ids, places, Tensor(np.full(4, 1, np.int32))).asnumpy()
    assert np.abs(other - want).max() > 0.01
    size = sum(v.nbytes for v in values.values())
    assert result.source_bytes == size
    assert result.bytes == sum(p.asnumpy().nbytes for p in one.weights().values())
    assert result.ratio == result.bytes / size < 0.75


def test_one_domain_is_generated_from(batch):
    """Token by token with a cache as a whole text without one: the ids alone name the experts."""
    values = {n: p.asnumpy() for n, p in drawn(config(experts=3, domains=1)).weights().items()}
    ids = batch[0][:1]
    places = np.arange(8, dtype=np.int32)[None]
    whole = fill(CausalLM(config(experts=3, domains=1)), values)(Tensor(ids), Tensor(places))
    cached = fill(CausalLM(config(experts=3, domains=1), cache=CacheSpec(1, 8)), values)
    step, last = NextTokenLogits(cached), Tensor(np.zeros(1, np.int32))
    for place in range(8):
        at = slice(place, place + 1)
        found = step(Tensor(ids[:, at].copy()), Tensor(places[:, at].copy()), last).asnumpy()
        np.testing.assert_allclose(found, whole.asnumpy()[:, place], rtol=1e-4, atol=1e-5)


def test_a_group_of_one_expert_is_a_dense_model(batch, tmp_path):
    """Mistral's architecture, which has no gate and no experts left."""
    made = DomainLM(config(experts=3))
    made.initialize(1)
    saved(tmp_path / "whole", made)
    with open_checkpoint(tmp_path / "whole") as source:
        assert extract_domain(source, tmp_path / "one", 1).experts == 0
    with open_checkpoint(tmp_path / "one") as source:
        assert source.config.moe is None
        dense = CausalLM(source.config)
        fill(dense, {name: source.read(name) for name in source.names()})
    ids, places = (Tensor(each) for each in batch)
    want = made(ids, places, Tensor(np.ones(4, np.int32))).asnumpy()
    found = dense(ids, places).asnumpy()
    np.testing.assert_array_equal(found[places.asnumpy() >= 0], want[places.asnumpy() >= 0])


def test_what_is_refused(batch, tmp_path):
    ids, places = (Tensor(each) for each in batch)
    unknown = r"unknown domains: model\.moe\.gate: 3 domains: routes by"
    with pytest.raises(ConfigError, match=unknown):
        CausalLM(config())(ids, places)
    with pytest.raises(ConfigError, match=unknown):  # generation, before anything is compiled
        CausalLM(config(), cache=CacheSpec(4, 8))
    with pytest.raises(ConfigError, match="2 of 6 experts, 3 domains: random_routed has one"):
        moe = config().moe.model_copy(update={"num_experts_per_tok": 2})
        DomainLM(config().model_copy(update={"moe": moe}))
    with pytest.raises(ConfigError, match="1 of 6 experts, 4 domains"):
        DomainLM(config(domains=4))
    made = DomainLM(config())
    made.initialize(0)
    saved(tmp_path / "whole", made)
    with (
        open_checkpoint(tmp_path / "whole") as source,
        pytest.raises(ConfigError, match="no such domain: domain: 3: there are 0 to 2"),
    ):
        extract_domain(source, tmp_path / "one", 3)


@pytest.mark.parametrize(
    ("key", "value"), [("n_shared_experts", 1), ("extra_feed_forward", "after")]
)
def test_a_domain_of_one_expert_beside_others_is_no_dense_model(tmp_path, key, value):
    plain = config(experts=3)
    moe = plain.moe.model_copy(update={key: value})
    made = DomainLM(plain.model_copy(update={"moe": moe}))
    made.initialize(0)
    saved(tmp_path / "whole", made)
    with (
        open_checkpoint(tmp_path / "whole") as source,
        pytest.raises(ConfigError, match=rf"no dense model: model\.moe\.{key}: {value}"),
    ):
        extract_domain(source, tmp_path / "one", 0)
    assert not (tmp_path / "one").exists()


def test_a_table_of_numbers_survives_a_smaller_dtype(tmp_path):
    """Experts beyond 256 are no bfloat16; and none is removed from under the table."""
    made = DomainLM(config(experts=900, domains=1))
    made.initialize(0)
    values = saved(tmp_path / "whole", made)
    convert(tmp_path / "whole", tmp_path / "half", "mindspore", "bf16")
    name = "layers.1.moe.router.expert_of_token"
    with open_checkpoint(tmp_path / "half") as source:
        np.testing.assert_array_equal(source.read(name, "float32"), values[name])
        assert source.dtype("layers.1.moe.experts.w1") == "bfloat16"
        with pytest.raises(ConfigError, match=r"experts with numbers: .*random_routed"):
            remove_experts(source, tmp_path / "less", [1])
