"""Optimizers by name: what is spelled out, what is refused."""

import pytest
from support.updates import training

from mistral_ms.config import OptimizerConfig, TrainingConfig
from mistral_ms.errors import ConfigError
from mistral_ms.optimizers import AdamWConfig, Rule, register, settings_of, with_settings


def test_every_setting_is_spelled_out_and_survives_a_file():
    config = with_settings(training({"learning_rate": 0.5, "adam_beta2": 0.75}))
    assert isinstance(config.optimizer, AdamWConfig)
    want = dict(
        name="adamw",
        learning_rate=0.5,
        weight_decay=0.1,
        adam_beta1=0.9,
        adam_beta2=0.75,
        adam_epsilon=1e-8,
    )
    assert config.model_dump(mode="json")["optimizer"] == want
    again = TrainingConfig.model_validate_json(config.model_dump_json())
    assert with_settings(again) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"name": "adamv"},
            r"training\.optimizer\.name: adamv: .*perhaps adamw",
        ),
        (
            {"name": "adamw", "momentum": 0.9},
            r"optimizer\.momentum: .*setting of muon and sgd",
        ),
        (
            {"name": "sgd", "adam_beta1": 0.9},
            r"training\.optimizer\.adam_beta1: .*of adamw and muon.*optimizer=\{name: sgd\}",
        ),
        (
            {"name": "sgd", "momentun": 0.9},
            r"unknown key: training\.optimizer: momentun.*perhaps momentum; .*nesterov",
        ),
        (
            {"name": "muon", "betas": [0.9, 0.95]},
            r"unknown key: training\.optimizer: betas.*perhaps adam_beta1 or adam_beta2",
        ),
        ({"adam_beta1": 1.0}, r"training\.optimizer: adam_beta1: 1\.0"),
        ({"adam_beta2": 1.0}, r"training\.optimizer: adam_beta2: 1\.0"),
        ({"adam_epsilon": 0.0}, r"training\.optimizer: adam_epsilon: 0\.0"),
        ({"name": "muon", "ns_steps": 0}, r"training\.optimizer: ns_steps: 0"),
        ({"name": "muon", "adjust_lr": "none"}, r"training\.optimizer: adjust_lr: 'none'"),
    ],
)
def test_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        settings_of(OptimizerConfig(**values))


def test_a_name_is_given_once():
    with pytest.raises(ValueError, match="named 'adamw' already"):
        register("adamw", AdamWConfig, Rule)


def test_settings_that_take_any_key_are_none():
    with pytest.raises(ValueError, match="OptimizerConfig must be declared with extra"):
        register("another", OptimizerConfig, Rule)
