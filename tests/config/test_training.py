"""Training and run configuration: what is refused, what a run file may say."""

import pytest
import yaml
from pydantic import ValidationError

from mistral_ms.config import (
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    ScheduleConfig,
    TrainingConfig,
    load_run_config,
)
from mistral_ms.errors import ConfigError

MODEL = dict(
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=32,
)
TRAINING = dict(steps=10, seq_length=8, global_batch_size=4)


@pytest.fixture
def run_file(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "model" / "small.yaml").write_text(yaml.safe_dump(MODEL))
    (tmp_path / "model" / "wide.yaml").write_text(yaml.safe_dump(MODEL | {"hidden_size": 32}))
    path = tmp_path / "run" / "run.yaml"
    path.write_text(yaml.safe_dump({"model": "../model/small.yaml", "training": TRAINING}))
    return path


class TestTrainingConfig:
    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("steps", 0),
            ("seq_length", 0),
            ("global_batch_size", 0),
            ("seed", -1),
            ("aux_coef", -0.1),
            ("z_coef", -0.1),
            ("clip_norm", 0.0),
        ],
    )
    def test_out_of_range(self, key, value):
        with pytest.raises(ValidationError, match=key):
            TrainingConfig(**TRAINING | {key: value})

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("learning_rate", 0.0),
            ("beta1", 1.0),
            ("beta2", 1.0),
            ("eps", 0.0),
            ("weight_decay", -1),
        ],
    )
    def test_optimizer_out_of_range(self, key, value):
        with pytest.raises(ValidationError, match=key):
            OptimizerConfig(**{key: value})

    @pytest.mark.parametrize(
        ("key", "value"), [("kind", "step"), ("warmup_steps", -1), ("floor", 1.1), ("floor", -0.1)]
    )
    def test_schedule_out_of_range(self, key, value):
        with pytest.raises(ValidationError, match=key):
            ScheduleConfig(**{key: value})

    def test_the_warmup_must_end(self):
        TrainingConfig(**TRAINING, schedule=ScheduleConfig(warmup_steps=10))
        with pytest.raises(ValidationError, match=r"warmup_steps \(11\) must not exceed .*\(10\)"):
            TrainingConfig(**TRAINING, schedule=ScheduleConfig(warmup_steps=11))

    def test_clipping_can_be_switched_off(self):
        assert TrainingConfig(**TRAINING, clip_norm=None).clip_norm is None


class TestRunFile:
    def test_names_a_model_file_beside_it(self, run_file):
        run = load_run_config(run_file)
        assert run.model == ModelConfig(**MODEL)
        assert run.training == TrainingConfig(**TRAINING)
        assert run.routing.policy == "capacity"

    def test_may_hold_the_model_itself(self, run_file):
        run_file.write_text(yaml.safe_dump({"model": MODEL, "training": TRAINING}))
        assert load_run_config(run_file).model == ModelConfig(**MODEL)

    def test_overrides_reach_the_model_and_the_training(self, run_file):
        run = load_run_config(
            run_file, ["model.num_hidden_layers=3", "training.optimizer.learning_rate=1e-2"]
        )
        assert run.model.num_hidden_layers == 3
        assert run.model.hidden_size == 16
        assert run.training.optimizer.learning_rate == 1e-2

    def test_another_model_comes_before_other_overrides(self, run_file):
        overrides = ["model.num_hidden_layers=3", f"model={run_file.parent.parent}/model/wide.yaml"]
        run = load_run_config(run_file, overrides)
        assert (run.model.hidden_size, run.model.num_hidden_layers) == (32, 3)

    def test_a_missing_model_file_is_named(self, run_file):
        with pytest.raises(ConfigError, match=r"cannot read: .*none\.yaml: No such file"):
            load_run_config(run_file, ["model=none.yaml"])

    @pytest.mark.parametrize("model", [None, 3, ["a"]])
    def test_a_model_of_another_kind(self, run_file, model):
        run_file.write_text(yaml.safe_dump({"model": model, "training": TRAINING}))
        with pytest.raises(ConfigError, match=r"run\.yaml: model: .*must be the path of a model"):
            load_run_config(run_file)

    def test_unknown_keys_are_errors(self, run_file):
        with pytest.raises(ConfigError, match=r"unknown key: .*training\.momentum"):
            load_run_config(run_file, ["training.momentum=0.9"])

    def test_a_window_longer_than_the_model_allows_names_both(self):
        longer = TrainingConfig(**TRAINING | {"seq_length": 33})
        with pytest.raises(ValidationError, match=r"seq_length \(33\).*embeddings \(32\)"):
            RunConfig(model=ModelConfig(**MODEL), training=longer)
