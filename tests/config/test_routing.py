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


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("policy", "drop"),
        ("capacity_factor", 0),
        ("capacity_factor", -1.0),
        ("capacity_factor", float("inf")),
        ("capacity_factor", float("nan")),
        ("drop_priority", "random"),
        ("router_dtype", "float64"),
        ("aux_loss", "mean"),
        ("capacity", 1.1),
    ],
)
def test_bad_values_are_errors_that_name_the_key(key, value):
    with pytest.raises(ConfigError, match=rf"run\.yaml: {key}: {value!r}"):
        validate(RoutingConfig, {key: value}, "run.yaml")
