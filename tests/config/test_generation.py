"""The rules of a generation request."""

import pytest

from mistral_ms.config import GenerationConfig
from mistral_ms.config.base import validate
from mistral_ms.errors import ConfigError


def test_defaults_are_greedy_and_filter_nothing():
    config = GenerationConfig()
    assert config.greedy
    assert config.max_new_tokens == 128
    assert (config.top_k, config.top_p, config.repetition_penalty) == (0, 1.0, 1.0)
    assert (config.seed, config.stop) == (0, ())


def test_a_temperature_means_sampling():
    assert not GenerationConfig(temperature=0.7).greedy


def test_lists_of_stop_strings_as_yaml_gives_them():
    config = validate(GenerationConfig, {"stop": ["\n\n", "</s>"]}, "run.yaml")
    assert config.stop == ("\n\n", "</s>")


@pytest.mark.parametrize(
    "values",
    [
        {"max_new_tokens": 1},
        {"temperature": 1e-4},
        {"temperature": 100.0},
        {"top_k": 1},
        {"top_p": 1e-6},
        {"repetition_penalty": 0.01},
        {"repetition_penalty": 100.0},
        {"seed": 2**70},
    ],
)
def test_values_at_the_edge_are_allowed(values):
    config = validate(GenerationConfig, values, "edge")
    assert all(getattr(config, key) == value for key, value in values.items())


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("max_new_tokens", 0, "greater than or equal to 1"),
        ("temperature", -0.1, "greater than or equal to 0"),
        ("temperature", float("nan"), "finite number"),
        ("temperature", float("inf"), "finite number"),
        ("top_k", -1, "greater than or equal to 0"),
        ("top_k", 1.5, "valid integer"),
        ("top_p", 0.0, "greater than 0"),
        ("top_p", 1.01, "less than or equal to 1"),
        ("top_p", float("nan"), "less than or equal to 1"),
        ("repetition_penalty", 0.0, "greater than or equal to 0.01"),
        ("repetition_penalty", 1e-300, "greater than or equal to 0.01"),
        ("repetition_penalty", 1e300, "less than or equal to 100"),
        ("repetition_penalty", float("inf"), "finite number"),
        ("seed", -1, "greater than or equal to 0"),
        ("stop", "text", "valid tuple"),
    ],
)
def test_a_broken_rule_names_the_key(key, value, rule):
    with pytest.raises(ConfigError, match=rf"request: {key}: .*{rule}"):
        validate(GenerationConfig, {key: value}, "request")


def test_a_temperature_too_small_to_divide_by():
    with pytest.raises(
        ConfigError, match=r"temperature \(1e-05\) must be 0 \(greedy\) or at least"
    ):
        validate(GenerationConfig, {"temperature": 1e-5}, "request")


def test_an_empty_stop_string():
    with pytest.raises(ConfigError, match=r"request: stop.1: '': .*at least 1 character"):
        validate(GenerationConfig, {"stop": ["a", ""]}, "request")


def test_an_unknown_key():
    with pytest.raises(
        ConfigError, match=r"unknown key: request: temprature: .*known keys: .*temper"
    ):
        validate(GenerationConfig, {"temprature": 1.0}, "request")
