"""Which layouts exist, and what is said about those that do not."""

import itertools
import time

import pytest
from support.configs import model

from mistral_ms.config.base import validate
from mistral_ms.config.layout import Rules, Sizes, divisors, factorisations
from mistral_ms.config.parallel import ParallelConfig
from mistral_ms.errors import ConfigError, TopologyError
from mistral_ms.parallel.topology import Topology


def test_one_process_is_the_default():
    config = ParallelConfig()
    assert (config.world, config.sizes) == (1, Sizes(1, 1, 1, 1))


@pytest.mark.parametrize("number", [1, 2, 12, 36, 97, 4096])
def test_divisors(number):
    assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]


@pytest.mark.parametrize("world", [1, 2, 6, 8, 12])
def test_the_search_covers_every_layout_once(world):
    numbers = range(1, world + 1)
    want = {
        Sizes(dp, mp, pp, ep)
        for dp, mp, pp, ep in itertools.product(numbers, repeat=4)
        if dp * mp * pp == world and dp % ep == 0
    }
    found = list(factorisations(world))
    assert len(found) == len(want)
    assert set(found) == want


@pytest.mark.parametrize(
    ("sizes", "world", "devices", "rule", "nearest"),
    [
        ((4, 1, 1, 3), 4, 8, r"ep \(3\) must divide dp \(4\)", "dp=4 mp=1 pp=1 ep=4"),
        (
            (4, 2, 1, 1),
            4,
            8,
            r"dp \* mp \* pp \(4 \* 2 \* 1 = 8\) must be the number of processes \(4\)",
            "dp=2 mp=2 pp=1 ep=1; dp=4 mp=1 pp=1 ep=1",
        ),
        ((0, 1, 1, 1), 4, 8, r"dp \(0\) must be at least 1", "dp="),
        ((3, 1, 1, 1), 3, 2, r"devices_per_node \(2\) must divide .* \(3\)", "no layout of these"),
        ((3, 1, 1, 1), 3, 0, r"devices_per_node \(0\) must be at least 1", "no layout of these"),
    ],
)
def test_an_impossible_layout_names_rule_and_neighbours(sizes, world, devices, rule, nearest):
    with pytest.raises(TopologyError, match=rule) as caught:
        Topology(Sizes(*sizes), devices, world)
    assert nearest in str(caught.value)
    assert "dp={} mp={} pp={} ep={}".format(*sizes) in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dp": 4, "ep": 3}, r"file: .*ep \(3\) must divide dp \(4\).*nearest legal layouts: dp=4"),
        ({"dp": 0}, "dp"),
        ({"micro_batch_interleave_num": 3}, "micro_batch_interleave_num"),
        ({"all_to_all": "hierarchic"}, "flat, hierarchical; perhaps hierarchical"),
        ({"all_to_all": "group_wise"}, "group_wise_a2a: true"),
        ({"pipeline_scheduler": "dual"}, "pipeline_scheduler"),
        ({"micro_batches": 2}, "unknown key"),
        ({"interleave": 2}, "unknown key: .*perhaps micro_batch_interleave_num"),
        ({"dp": 2, "group_wise_a2a": True}, r"needs tensor-parallel ranks \(mp > 1\)"),
        (
            {"dp": 12, "ep": 6, "devices_per_node": 4, "all_to_all": "hierarchical"},
            r"ep \* mp \(6 \* 1 = 6\) to divide devices_per_node \(4\)",
        ),
    ],
)
def test_bad_configurations(changes, message):
    with pytest.raises(ConfigError, match=message):
        validate(ParallelConfig, changes, "file")


@pytest.mark.parametrize(
    ("changes", "world", "rule"),
    [
        ({"dp": 16, "ep": 16}, None, r"ep \(16\) must divide num_local_experts \(8\)"),
        ({"mp": 3}, None, r"mp \(3\) must divide num_attention_heads \(8\)"),
        ({"mp": 4}, None, r"mp \(4\) must divide num_key_value_heads \(2\)"),
        ({"pp": 5}, None, r"pp \(5\) must not exceed num_hidden_layers \(4\)"),
        ({"dp": 2}, 4, r"must be the number of processes \(4\)"),
    ],
)
def test_the_model_must_divide(changes, world, rule):
    with pytest.raises(ConfigError, match=f"{rule}: nearest legal layouts: "):
        ParallelConfig(**changes).check(model(), world)


def test_rules_that_need_an_odd_model():
    one = ParallelConfig(mp=2)
    with pytest.raises(ConfigError, match=r"mp \(2\) must divide intermediate_size \(97\)"):
        one.check(model(intermediate_size=97))
    for moe, named in (
        ({"moe_intermediate_size": 25}, r"moe_intermediate_size \(25\)"),
        (
            {"n_shared_experts": 1, "shared_expert_intermediate_size": 9},
            r"shared_expert_intermediate_size \(9\)",
        ),
    ):
        with pytest.raises(ConfigError, match=rf"mp \(2\) must divide {named}"):
            one.check(model(moe=moe))
    # the width of dense layers where there are none is nobody's
    fine = {"moe_intermediate_size": 24}
    one.check(model(intermediate_size=97, moe=fine))
    with pytest.raises(ConfigError, match=r"mp \(2\) must divide intermediate_size \(97\)"):
        one.check(model(intermediate_size=97, moe=fine | {"extra_feed_forward": "after"}))
    with pytest.raises(ConfigError, match=r"mp \(2\) must divide vocab_size \(321\)"):
        one.check(model(vocab_size=321))
    with pytest.raises(ConfigError, match=r"ep \(2\) must be 1 for a model without experts"):
        ParallelConfig(dp=2, ep=2).check(model(moe=None))
    odd = model(hidden_size=65, head_dim=8)
    one.check(odd)
    with pytest.raises(ConfigError, match=r"mp \(2\) must divide hidden_size \(65\)"):
        ParallelConfig(mp=2, group_wise_a2a=True).check(odd)


def test_neighbours_are_legal_and_the_closest():
    rules, asked = Rules(world=8, model=model()), Sizes(4, 4, 1, 1)
    nearest = rules.nearest(asked)
    assert all(rules.broken_by(each) is None for each in nearest)
    # mp=4 does not divide the two key/value heads: half of it, the processes elsewhere
    assert nearest[0] == Sizes(4, 2, 1, 1)


def test_a_big_search_is_fast():
    start = time.process_time()
    with pytest.raises(TopologyError, match="nearest legal layouts"):
        Topology(Sizes(4096, 2, 1, 1), 8, 4096)
    assert time.process_time() - start < 1
