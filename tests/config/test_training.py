"""Training and run configuration: what is refused, what a run file may say."""

import json
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from mistral_ms.config import (
    InitFromConfig,
    LossScaleConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainingConfig,
    load_run_config,
    to_hf,
    to_mistral,
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
TRAINING = dict(max_steps=10, seq_length=8, global_batch_size=4)


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
            ("max_steps", 0),
            ("seq_length", 0),
            ("global_batch_size", 0),
            ("seed", -1),
            ("router_aux_loss_coef", -0.1),
            ("router_z_loss_coef", -0.1),
            ("max_grad_norm", 0.0),
            ("lr_scheduler_type", "step"),
            ("warmup_steps", -1),
            ("min_lr_ratio", 1.1),
            ("min_lr_ratio", -0.1),
        ],
    )
    def test_out_of_range(self, key, value):
        with pytest.raises(ValidationError, match=key):
            TrainingConfig(**TRAINING | {key: value})

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("learning_rate", 0.0),
            ("learning_rate", float("nan")),
            ("weight_decay", -1),
            ("name", ""),
        ],
    )
    def test_optimizer_out_of_range(self, key, value):
        with pytest.raises(ValidationError, match=key):
            OptimizerConfig(**{key: value})

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"pattern": ""}, "pattern"),
            ({"pattern": "*", "lr_factor": 0.0}, "lr_factor"),
            ({"pattern": "*", "weight_decay": -1.0}, "weight_decay"),
            ({"pattern": "*", "frozen": True, "lr_factor": 2.0}, "frozen weights have neither"),
            ({"pattern": "*", "freeze": True}, "freeze"),
        ],
    )
    def test_parameter_group_refused(self, values, message):
        with pytest.raises(ValidationError, match=message):
            TrainingConfig(**TRAINING, param_groups=[values])

    def test_the_warmup_must_end(self):
        TrainingConfig(**TRAINING, warmup_steps=10)
        with pytest.raises(ValidationError, match=r"warmup_steps \(11\) must not exceed .*\(10\)"):
            TrainingConfig(**TRAINING, warmup_steps=11)

    def test_clipping_can_be_switched_off(self):
        assert TrainingConfig(**TRAINING, max_grad_norm=None).max_grad_norm is None


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

    def test_a_name_does_not_replace_an_optimizers_settings(self, run_file):
        with pytest.raises(
            ConfigError, match=r"training\.optimizer: 'muon': must be a group of keys"
        ):
            load_run_config(run_file, ["training.optimizer=muon"])

    def test_truth_values_are_no_coefficients(self, run_file):
        with pytest.raises(ConfigError, match=r"router_losses: .*load: true and false are no"):
            load_run_config(run_file, ["training.router_losses={load: true}"])

    def test_another_model_comes_before_other_overrides(self, run_file):
        overrides = ["model.num_hidden_layers=3", f"model={run_file.parent.parent}/model/wide.yaml"]
        run = load_run_config(run_file, overrides)
        assert (run.model.hidden_size, run.model.num_hidden_layers) == (32, 3)

    def test_a_router_that_its_loss_does_not_move_is_refused_unless_asked_for(self, run_file):
        """Of one choice the renormalised weight is 1: no gradient leads to the router."""
        top1 = ["model.moe.num_local_experts=4", "model.moe.num_experts_per_tok=1"]
        with pytest.raises(
            ConfigError, match=r"no gradient.*training\.constant_router_weight=true"
        ):
            load_run_config(run_file, top1)
        for allowed in ("model.moe.norm_topk_prob=false", "training.constant_router_weight=true"):
            assert load_run_config(run_file, [*top1, allowed]).model.moe.num_experts_per_tok == 1
        alone = ["model.moe.num_local_experts=1", "model.moe.num_experts_per_tok=1"]
        assert load_run_config(run_file, alone).model.moe.num_local_experts == 1

    def test_weights_of_experts_that_choose_are_scaled_as_in_generation(self, run_file):
        chosen = ["model.moe.num_local_experts=4", "routing.policy=experts_choose"]
        with pytest.raises(ConfigError, match=r"later tokens decide.*allow_future=true"):
            load_run_config(run_file, chosen)
        chosen.append("routing.allow_future=true")
        with pytest.raises(ConfigError, match=r"rescale_survivors \(False\) must equal .*\(True\)"):
            load_run_config(run_file, chosen)
        for fits in ("model.moe.norm_topk_prob=false", "routing.rescale_survivors=true"):
            assert load_run_config(run_file, [*chosen, fits]).routing.policy == "experts_choose"
        load_run_config(run_file, [*chosen, "model.moe.num_experts_per_tok=1",
                                   "routing.rescale_survivors=true"])  # fmt: skip

    def test_weights_of_survivors_are_divided_in_generation_too(self, run_file):
        values = [
            "model.moe.num_local_experts=4",
            "routing.policy=capacity",
            "routing.rescale_survivors=true",
        ]
        assert load_run_config(run_file, values).routing.policy == "capacity"
        with pytest.raises(
            ConfigError, match=r"rescale_survivors \(True\).*norm_topk_prob \(False"
        ):
            load_run_config(run_file, [*values, "model.moe.norm_topk_prob=false"])

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
        with pytest.raises(ValidationError, match=r"seq_length \(33\).*embeddings is 32"):
            RunConfig(model=ModelConfig(**MODEL), training=longer)


class TestSteps:
    def test_either_steps_or_epochs(self):
        for values in ({}, {"max_steps": 3, "num_train_epochs": 1}):
            with pytest.raises(ValidationError, match="give either max_steps or num_train_epochs"):
                TrainingConfig(seq_length=8, global_batch_size=4, **values)

    @pytest.mark.parametrize(
        ("epochs", "sequences", "steps"),
        [(200, 62, 3100), (1, 8, 2), (1, 9, 3), (0.1, 8, 1), (2.5, 8, 5), (0.3, 40, 3)],
    )
    def test_epochs_are_counted_out(self, epochs, sequences, steps):
        config = TrainingConfig(num_train_epochs=epochs, seq_length=8, global_batch_size=4)
        counted = config.with_max_steps(sequences)
        assert (counted.max_steps, counted.num_train_epochs, counted.last_step) == (
            steps,
            None,
            steps,
        )
        assert counted.with_max_steps(99) == counted

    def test_a_warmup_longer_than_the_epochs(self):
        config = TrainingConfig(
            num_train_epochs=1, seq_length=8, global_batch_size=4, warmup_steps=3
        )
        message = (
            r"training \(num_train_epochs 1\).*warmup_steps \(3\) must not exceed max_steps \(2\)"
        )
        with pytest.raises(ConfigError, match=message):
            config.with_max_steps(8)

    def test_micro_batches_divide_the_batch(self):
        with pytest.raises(
            ValidationError, match=r"gradient_accumulation_steps \(3\) must divide .*\(4\)"
        ):
            TrainingConfig(**TRAINING, gradient_accumulation_steps=3)


class TestLossScale:
    def test_is_for_float16_which_has_one_anyway(self):
        assert TrainingConfig(**TRAINING).scaling is None
        assert TrainingConfig(**TRAINING, dtype="bfloat16").scaling is None
        assert TrainingConfig(**TRAINING, dtype="float16").scaling == LossScaleConfig()
        mine = LossScaleConfig(initial=8)
        assert TrainingConfig(**TRAINING, dtype="float16", loss_scale=mine).scaling == mine
        with pytest.raises(ValidationError, match="loss_scale is for dtype float16; float32"):
            TrainingConfig(**TRAINING, loss_scale=mine)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            (dict(initial=3.0), r"initial \(3\) must be a power of two"),
            (dict(initial=4.0, minimum=8.0), r"minimum \(8\) must not exceed initial"),
            (dict(growth_interval=0), "growth_interval"),
        ],
    )
    def test_refused(self, values, message):
        with pytest.raises(ValidationError, match=message):
            LossScaleConfig(**values)


class TestData:
    def write(self, run_file, **data):
        values = {"model": MODEL, "training": TRAINING, "data": data}
        run_file.write_text(yaml.safe_dump(values))
        return run_file

    def test_paths_in_the_file_are_beside_it(self, run_file):
        self.write(run_file, inputs=["a.txt", "/b.txt"], tokenizer="t.model")
        data = load_run_config(run_file).data
        assert data.inputs == (run_file.parent / "a.txt", Path("/b.txt"))
        assert data.tokenizer == str(run_file.parent / "t.model")

    def test_paths_on_the_command_line_are_where_you_are(self, run_file):
        self.write(run_file, dataset="set")
        assert load_run_config(run_file).data.dataset == run_file.parent / "set"
        run = load_run_config(run_file, ["data.dataset=mine", "init_from=theirs", "output=out"])
        assert run.data.dataset == Path("mine")
        assert (run.init_from.path, run.output) == (Path("theirs"), Path("out"))

    def test_packaged_tokenizers_are_names(self, run_file):
        self.write(run_file, inputs=["a.txt"], tokenizer="packaged-v3")
        assert load_run_config(run_file).data.tokenizer == "packaged-v3"

    def test_what_is_overridden_replaces_its_rival(self, run_file):
        self.write(run_file, inputs=["a.txt"], tokenizer="packaged-v1")
        run = load_run_config(run_file, ["data.dataset=set", "training.num_train_epochs=2"])
        assert run.data.dataset == Path("set") and not run.data.inputs
        assert (run.training.num_train_epochs, run.training.max_steps) == (2, None)

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ({}, "give either data.dataset or data.inputs"),
            (dict(dataset="a", inputs=["b"]), "give either data.dataset or data.inputs"),
            (dict(inputs=["b"]), "data.inputs need data.tokenizer"),
            (dict(dataset="a", packing={"add_bos": False}), "a dataset is packed already"),
        ],
    )
    def test_refused(self, run_file, data, message):
        with pytest.raises(ConfigError, match=message):
            load_run_config(self.write(run_file, **data))


class TestModelOfACheckpoint:
    @pytest.fixture
    def checkpoint(self, tmp_path):
        (tmp_path / "hf").mkdir()
        config = to_hf(ModelConfig(**MODEL))
        (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
        return tmp_path / "hf"

    def test_is_taken_when_the_run_names_none(self, run_file, checkpoint):
        run_file.write_text(yaml.safe_dump({"training": TRAINING}))
        run = load_run_config(run_file, [f"init_from={checkpoint}"])
        assert run.model == ModelConfig(**MODEL, head_dim=4)
        assert run.init_from == InitFromConfig(path=checkpoint)

    @pytest.mark.parametrize(
        "overrides",
        [["init_from.format=mistral"], ["init_from={path: HERE, format: mistral}"]],
        ids=["key", "group"],
    )
    def test_of_two_formats_the_named_one_is_taken(self, run_file, checkpoint, overrides):
        theirs = to_mistral(ModelConfig(**(MODEL | {"num_hidden_layers": 5})))
        (checkpoint / "params.json").write_text(json.dumps(theirs))
        start = {"path": str(checkpoint), "verify": False}
        run_file.write_text(yaml.safe_dump({"training": TRAINING, "init_from": start}))
        run = load_run_config(run_file, [o.replace("HERE", str(checkpoint)) for o in overrides])
        assert run.model.num_hidden_layers == 5
        verify = "init_from={" in overrides[0]  # a whole group replaces the file's
        assert run.init_from == InitFromConfig(path=checkpoint, format="mistral", verify=verify)

    def test_a_path_replaces_all_that_the_file_says(self, run_file, checkpoint):
        start = {"path": "elsewhere", "format": "mistral"}
        run_file.write_text(yaml.safe_dump({"training": TRAINING, "init_from": start}))
        run = load_run_config(run_file, [f"init_from={checkpoint}"])
        assert run.init_from == InitFromConfig(path=checkpoint)
        file_only = load_run_config(run_file, [f"model={checkpoint}"])
        assert file_only.init_from.path == run_file.parent / "elsewhere"

    def test_an_unknown_format(self, run_file, checkpoint):
        with pytest.raises(ConfigError, match=r"init_from\.format: 'gguf'.*'mistral-dump'"):
            load_run_config(run_file, [f"init_from={checkpoint}", "init_from.format=gguf"])

    def test_can_be_named_like_a_model_file(self, run_file, checkpoint):
        run = load_run_config(run_file, [f"model={checkpoint}", "model.num_hidden_layers=1"])
        assert run.model.num_hidden_layers == 1

    def test_a_directory_without_one(self, run_file, tmp_path):
        with pytest.raises(ConfigError, match=r"no model: .*config\.json or params\.json"):
            load_run_config(run_file, [f"model={tmp_path / 'run'}"])
