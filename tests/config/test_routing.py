"""The routing policy's values."""

import pytest

from mistral_ms.config import DROPLESS, RoutingConfig
from mistral_ms.config.base import validate
from mistral_ms.errors import ConfigError


def test_the_default_drops_nobody():
    assert RoutingConfig() == DROPLESS
    assert DROPLESS.policy == "dropless"
    assert (DROPLESS.capacity_factor, DROPLESS.drop_priority) == (1.1, "token_major")
    assert (DROPLESS.rescale_survivors, DROPLESS.router_dtype) == (False, "float32")
    assert DROPLESS.aux_loss == "pooled"


def test_experts_that_choose_know_no_order_of_choices():
    values = {"policy": "experts_choose", "drop_priority": "choice_major"}
    with pytest.raises(ConfigError, match=r"drop_priority \(choice_major\) is an order among"):
        validate(RoutingConfig, values, "run.yaml")


def test_experts_that_choose_have_no_first_choices_to_count():
    values = {"policy": "experts_choose", "aux_choices": "first"}
    with pytest.raises(ConfigError, match=r"aux_choices \(first\) is about choices of tokens"):
        validate(RoutingConfig, values, "run.yaml")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("policy", "drop"),
        ("capacity_factor", 0),
        ("capacity_factor", -1.0),
        ("capacity_factor", float("inf")),
        ("capacity_factor", float("nan")),
        ("drop_priority", "lottery"),
        ("capacity_rounding", "up"),
        ("min_capacity", 0),
        ("capacity_multiple_of", 0),
        ("eval_capacity_factor", 0),
        ("aux_choices", "second"),
        ("router_dtype", "float64"),
        ("aux_loss", "mean"),
        ("capacity", 1.1),
    ],
)
def test_bad_values_are_errors_that_name_the_key(key, value):
    with pytest.raises(ConfigError, match=rf"run\.yaml: {key}: {value!r}"):
        validate(RoutingConfig, {key: value}, "run.yaml")


def test_evaluation_drops_nothing_unless_it_is_told():
    assert RoutingConfig(policy="capacity", router_dtype="float16").evaluation == DROPLESS
    told = RoutingConfig(policy="capacity", eval_capacity_factor=2.0, min_capacity=4)
    assert told.evaluation == told.model_copy(update={"capacity_factor": 2.0})
    for policy in ("dropless", "experts_choose"):
        values = {"policy": policy, "eval_capacity_factor": 2}
        with pytest.raises(ConfigError, match=rf"eval_capacity_factor \(2\) needs.*not {policy}"):
            validate(RoutingConfig, values, "run.yaml")


def test_slots_of_an_expert_relative_to_an_even_share():
    per_choice = RoutingConfig(policy="capacity", capacity_factor=1.2)
    assert per_choice.relative_capacity(2) == 1.2
    per_token = per_choice.model_copy(update={"capacity_per": "token"})
    assert per_token.relative_capacity(2) == 0.6
    for policy in ("dropless", "experts_choose"):
        assert RoutingConfig(policy=policy).relative_capacity(2) is None
