"""What run files of MindFormers mean, and the command that takes them."""

from __future__ import annotations

import copy
import inspect
import re

import numpy as np
import pytest
import yaml
from support.mindformers_files import CONFIGS, config_of, read, version_1_7

from mistral_ms import mindformers
from mistral_ms.config import from_hf
from mistral_ms.config.mindformers_keys import MOE_FIXED, MOE_READ, MOE_WITHOUT_EFFECT
from mistral_ms.errors import ConfigError, MissingExtraError
from mistral_ms.mindformers import run, run_file
from mistral_ms.mindformers.sections import SECTION_KEYS
from mistral_ms.parallel.graph.checks import check_prediction, check_run

FOUR_FILES = {
    "pretrain": {"do_eval": False, "model.model_config.compute_dtype": "float16"},
    "pretrain, as the README has it": {
        **{"parallel_config.data_parallel": 8, "parallel_config.model_parallel": 1},
        **{"parallel_config.expert_parallel": 8, "parallel_config.use_seq_parallel": False},
        "moe_config.capacity_factor": 2.0,
    },
    "pretrain_32k": {
        **{"parallel_config.data_parallel": 1, "parallel_config.model_parallel": 8},
        **{"parallel_config.expert_parallel": 1, "parallel_config.vocab_emb_dp": False},
        **{"model.model_config.seq_length": 32768, "context.memory_optimize_level": "O1"},
        "model.model_config.param_init_type": "bfloat16",
    },
    "finetune": {"run_mode": "finetune", "model.model_config.rotary_dtype": "float16"},
    "predict": {
        **{"run_mode": "predict", "input_data": ["I love"], "parallel.enable_alltoall": False},
        "parallel_config": {
            **dict(data_parallel=1, model_parallel=8, pipeline_stage=1, micro_batch_num=1),
            **dict(use_seq_parallel=False, vocab_emb_dp=True, gradient_aggregation_group=4),
        },
        **{"optimizer.type": "FP32StateAdamWeightDecay", "recompute_config.recompute": False},
        **{"model.model_config.use_past": True, "model.model_config.compute_dtype": "float16"},
        "runner_wrapper.scale_sense.loss_scale_value": 4294967296,
        "remote_save_url": "Please input obs url on AICC platform.",
    },
}
"""What matters here and differs among them; all are of several processes."""
FOUR_LAYOUTS = {
    "pretrain": (2, 4, 2, 2), "pretrain, as the README has it": (8, 1, 8, 2),
    "pretrain_32k": (1, 8, 1, 2), "finetune": (2, 4, 2, 2), "predict": (1, 8, 1, 1),
}  # fmt: skip
"""Their dp, mp, ep, pp."""


@pytest.mark.parametrize("name", FOUR_FILES)
def test_the_four_files_of_1_7_are_taken_as_they_are(mf, tmp_path, monkeypatch, name):
    """By ``--model mixtral``, and of as many processes as their layout has."""
    config = version_1_7()
    for key, value in {"use_parallel": True, **FOUR_FILES[name]}.items():
        run_file.put(config, key, copy.deepcopy(value))
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    file = read(path, "--model", "mixtral")
    made = config_of(mf, file)
    parallel = (mf.prediction_of if name == "predict" else mf.run_of)(made).parallel
    assert (parallel.dp, parallel.mp, parallel.ep, parallel.pp) == FOUR_LAYOUTS[name]
    monkeypatch.setenv("MS_WORKER_NUM", str(parallel.world))
    assert run.check_model(file) == made.architecture()
    monkeypatch.setenv("MS_WORKER_NUM", "4")
    with pytest.raises(ConfigError, match=rf"4 processes: .* is {parallel.world}$"):
        run.check_model(file)


def test_a_file_of_1_7_works_with_two_lines_changed(mf, tmp_path):
    old = tmp_path / "pretrain.yaml"
    old.write_text(yaml.safe_dump(version_1_7()))
    with pytest.raises(ConfigError, match="change the two lines"):
        read(old)
    file = read(old, "--model", "mixtral")
    two_lines = version_1_7("MixtralConfig", "MixtralForCausalLM")
    assert file == two_lines
    config = config_of(mf, file)
    expected = dict(
        model_type="mixtral", vocab_size=32000, hidden_size=4096, intermediate_size=14336,
        num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-5,
        rope_theta=1e6, sliding_window=None, num_local_experts=8, num_experts_per_tok=2,
        pad_token_id=0, router_aux_loss_coef=0.05,
    )  # fmt: skip
    assert config.architecture() == from_hf(expected)[0]
    routing = config.routing(training=True)
    assert (routing.policy, routing.capacity_factor) == ("capacity", 1.1)
    assert routing.drop_priority == "token_major"
    assert config.routing(training=False).policy == "dropless"
    assert config.router_loss_coefficients() == (0.05, 0.0)
    assert config.weight_dtype == "float32"
    assert config.recompute == "full"
    for key, value in dict(
        hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2, n_kv_heads=1, vocab_size=64
    ).items():
        run_file.put(file, f"model.model_config.{key}", value)
    run_file.put(file, "model.model_config.seq_length", 8)
    old.write_text(yaml.safe_dump(file))
    made = mf.MindFormerConfig(str(old), run_mode="train")  # refuses what it does not know
    mf.build_parallel_config(made)
    model = mf.build_network(
        made.model,
        default_args=dict(
            parallel_config=made.parallel_config,
            moe_config=made.moe_config,
            dataset_config=made.train_dataset,
            calculate_per_token_loss=False,
            batch_size=1,
        ),
    )
    assert type(model) is mf.MixtralForCausalLM
    assert model.language_model.config.moe.num_local_experts == 8


def leaves(value: object) -> set[str]:
    """The last part of every key."""
    if isinstance(value, list):
        return set().union(*(leaves(each) for each in value if isinstance(each, dict)))
    found: set[str] = set()
    for key, each in value.items() if isinstance(value, dict) else ():
        below = leaves(each)
        found |= below or {key}
    return found


def test_every_key_of_1_7_has_its_row_in_both_languages():
    """And the pages have the same commands, and tables of the same rows."""
    pages = [
        (CONFIGS[0].parents[2] / "docs" / f"mindformers{end}.md").read_text(encoding="utf-8")
        for end in ("", "_CN")
    ]
    rows = [[line for line in page.splitlines() if line.startswith("|")] for page in pages]
    assert len(rows[0]) == len(rows[1])
    for page_rows in rows:
        words = set(re.findall(r"\w+", " ".join(re.findall("`([^`]+)`", "".join(page_rows)))))
        assert not leaves(version_1_7()) - words
        for path in CONFIGS:
            assert path.stem in words
    for pattern in ("```.*?```", "^#+ "):
        found = [re.findall(pattern, page, re.S | re.M) for page in pages]
        assert len(found[0]) == len(found[1])
    shell = [re.findall("```bash.*?```", page, re.S) for page in pages]
    assert shell[0] == shell[1]


def test_every_key_of_their_classes_is_known(mf):
    from mindformers.core.config_args import MFContextConfig, ParallelContextConfig
    from mindformers.tools.register import template
    from mindspore.parallel._auto_parallel_context import _set_auto_parallel_context_func_map

    theirs = set(inspect.signature(mf.MoEConfig).parameters)
    assert theirs == {*MOE_READ, *MOE_FIXED, *MOE_WITHOUT_EFFECT}
    for section, kind in template.CONFIG_NAME_TO_CLASS.items():
        if section in SECTION_KEYS and section != "moe_config":
            assert set(kind.keys()) <= SECTION_KEYS[section], section
            if kind._raise_error_for_unexpected_key:
                assert set(kind.keys()) == SECTION_KEYS[section], section
    assert set(ParallelContextConfig.get_supported_kwargs()) <= SECTION_KEYS["parallel"]
    assert set(_set_auto_parallel_context_func_map) == SECTION_KEYS["parallel"]
    own = set(MFContextConfig.get_supported_kwargs())
    assert own <= SECTION_KEYS["context"] | run_file.VALUES
    steps = inspect.signature(mf.MFTrainOneStepCell).parameters
    passed = {"self", "network", "optimizer", "kwargs"}
    assert set(steps) - passed == SECTION_KEYS["runner_wrapper"] - {"type", "micro_batch_num"}


REPLICATED = {
    "use_parallel": True,
    "parallel.parallel_mode": 0,
    "parallel.enable_parallel_optimizer": False,
    "parallel_config": {},
}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"micro_batch_interleave_num": 2}, "micro_batch_interleave_num: 2"),
        ({"mico_batch_interleave_num": 2}, "perhaps micro_batch_interleave_num"),
        ({"context.mode": 1}, "context.mode: 1"),
        ({"use_legacy": False}, "use_legacy: False"),
        ({"recompute_config.mp_comm_recompute": False}, "mp_comm_recompute: False"),
        ({"context.device_target": "CPU"}, "sink_mode: True .*set sink_mode: False"),
        ({"use_parallel": True, "parallel.enable_alltoall": None}, "enable_alltoall: None"),
        ({"use_parallel": True, "do_eval": True}, "do_eval: True: several processes train"),
        ({"use_parallel": True, "parallel.parallel_mode": 3}, "parallel_mode: 3: layouts are"),
        (
            {
                "use_parallel": True,
                "context.device_target": "CPU",
                "runner_config.sink_mode": False,
            },
            "parallel_mode: 1 on a CPU: MindSpore divides graphs for Ascend alone: set .* 0",
        ),
        (
            {"use_parallel": True, "parallel.parallel_mode": 0},
            "parallel.enable_parallel_optimizer: True: .*whole model",
        ),
        (
            {**REPLICATED, "parallel_config.model_parallel": 2},
            "parallel_config.model_parallel: 2: .*whole model",
        ),
        ({**REPLICATED, "parallel_config.data_parallel": 4}, "data_parallel: 4: 2 processes have"),
        (
            {"use_parallel": True, "run_mode": "eval"},
            "several processes train or predict; one evaluates",
        ),
        (
            {
                **REPLICATED,
                **{"run_mode": "predict", "input_data": ["x"], "load_checkpoint": "y"},
            },
            "input_data: 1 of 2",
        ),
        (
            {**REPLICATED, "run_mode": "predict", "input_data": ["x", "y"]},
            "no weights: .*load_checkpoint: several processes draw none",
        ),
        (
            {
                **REPLICATED,
                **{"resume_training": True, "context.device_target": "CPU"},
                **{"runner_config.sink_mode": False, "load_checkpoint": "x"},
            },
            "resume_training: True on a CPU: .*Barrier",
        ),
        ({"modal_type": "image"}, "modal_type: 'image': the models read text"),
        ({"adapter_id": "x"}, "adapter_id: 'x': low-rank adapters"),
        ({"base_config": "other.yaml"}, "base_config: .*a file is read alone"),
        ({"pretrained_model_dir": "x"}, "pretrained_model_dir: 'x': load_checkpoint names"),
        ({"checkpoint": {"load_path": "x"}}, "checkpoint: .*newer forms of checkpoints"),
        ({"swap_config": {"swap": True}}, "swap_config.swap: True"),
        ({"train_dataset.eod_reset": True}, "train_dataset.eod_reset: True"),
        ({"parallel.strategy_ckpt_load_file": "x"}, "strategy_ckpt_load_file: 'x': layouts come"),
        ({"resume_training": True}, "resume_training: True: there is no load_checkpoint"),
        ({"auto_trans_ckpt": True}, "auto_trans_ckpt: True: there is no load_checkpoint"),
        (
            {"optimizer.type": "FP32StateAdamWeightDecay"},
            "FP32StateAdamWeightDecay: MindFormers 1.7 had removed it already: set type: AdamW",
        ),
        ({"use_parallel": False}, "use_parallel: False: each of 2 processes would do the same"),
        ({"runner_config.batchsize": 4}, "runner_config.batchsize: .*perhaps batch_size"),
        ({"parallel_config.data_paralel": 2}, "data_paralel: .*perhaps data_parallel"),
        ({"context.devic_target": "CPU"}, "context.devic_target: .*perhaps device_target"),
        ({"moe_config.expert_nums": 2}, "moe_config.expert_nums: .*perhaps expert_num"),
        ({"runner_wrapper.use_clip_gard": True}, "use_clip_gard: .*perhaps use_clip_grad"),
        ({"train_dataset.input_column": []}, "input_column: .*perhaps input_columns"),
        ({"context": 3}, "not a section: .*context: 3"),
        ({"run_mode": "predict"}, "no prompts: input_data: --predict_data"),
        ({"run_mode": "training"}, "must be one of train, finetune, eval, predict"),
    ],
)
def test_files_that_mean_something_else_are_refused(tmp_path, monkeypatch, changes, message):
    monkeypatch.setenv("MS_WORKER_NUM", "2")
    config = version_1_7("MixtralConfig", "MixtralForCausalLM")
    for key, value in changes.items():
        run_file.put(config, key, copy.deepcopy(value))
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match=message):
        read(path)


def test_flags_are_those_of_their_launcher(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(version_1_7("MixtralConfig", "MixtralForCausalLM")))
    config = read(
        path,
        *("--train_data", "a.mindrecord", "--run_mode", "finetune", "--use_parallel", "False"),
        *("--epochs", "3", "--gradient_accumulation_steps", "4", "--resume_training", "x.ckpt"),
        *("--load_check", "y", "--num_samples", "8"),
        *("--model.model_config.seq_length=128", "--callbacks.1.prefix", "mine"),
        *("--options", "optimizer.eps=1.0e-6", "optimizer.betas=[0.9, 0.99]"),
        *("--lr_schedule.learning_rate", "1e-5", "--src_strategy_path_or_dir=", "--seed=3"),
    )
    assert config["train_dataset"]["data_loader"]["dataset_dir"] == "a.mindrecord"
    assert config["run_mode"] == "finetune"
    assert config["runner_config"]["epochs"] == 3
    assert config["runner_config"]["batch_size"] == 4  # rows of an update
    assert config["runner_wrapper"]["micro_batch_num"] == 4
    assert (config["resume_training"], config["load_checkpoint"]) == ("x.ckpt", "y")
    for data in ("train_dataset", "eval_dataset"):
        assert config[data]["data_loader"]["num_samples"] == 8
    assert config["model"]["model_config"]["seq_length"] == 128
    assert config["callbacks"][1]["prefix"] == "mine"
    assert (config["optimizer"]["eps"], config["optimizer"]["betas"]) == (1e-6, [0.9, 0.99])
    assert config["lr_schedule"]["learning_rate"] == 1e-5  # to YAML a text
    assert (config["src_strategy_path_or_dir"], config["seed"]) == ("", 3)
    for wrong, message in (
        (("mode",), "unknown argument: mode"),
        (("--options", "seed"), "unknown argument: seed: options are KEY=VALUE"),
        (("--seed.x", "{"), "not a value: --seed.x"),
        (("--seed.x", "1"), "not a section: seed.x: 0"),
        (("--callbacks.7.prefix", "x"), "no such entry: callbacks.7.prefix"),
        (("--strategy_load", "x"), "strategy_ckpt_load_file: 'x': layouts come from a table"),
    ):
        with pytest.raises(ConfigError, match=re.escape(message)):
            read(path, *wrong)
    with pytest.raises(SystemExit):
        read(path, "--tr", "x")  # train_dataset_dir, transform_process_num, or trust_remote_code


def test_bad_input_ends_with_2(tmp_path, capsys):
    pytest.importorskip("mindformers.core", reason="MindFormers is not installed")
    assert run.main(["--config", str(tmp_path / "absent.yaml"), "--run_mode", "train"]) == 2
    assert "no such file" in capsys.readouterr().err


def test_data_are_looked_at_before_the_trainer_begins(mf, tmp_path, capsys, monkeypatch):
    """Each of these ends MindFormers with a traceback, after the model is built."""
    from mindspore.mindrecord import FileWriter

    def write(name, length):
        writer = FileWriter(str(tmp_path / f"{name}-{length}.mindrecord"), 1)
        writer.add_schema({name: {"type": "int32", "shape": [-1]}}, "ids")
        writer.write_raw_data([{name: np.arange(length, dtype=np.int32)}] * 4)
        writer.commit()
        return str(tmp_path / f"{name}-{length}.mindrecord")

    (tmp_path / "broken.mindrecord").write_text("abc")
    (tmp_path / "broken.mindrecord.db").write_text("")
    (tmp_path / "empty").mkdir()
    ours, long = write("tokens", 16), write("input_ids", 18)
    begun = []
    monkeypatch.setattr(run, "run", begun.append)
    for given, message in (
        ([], "no data: train_dataset.data_loader.dataset_dir: --train_data FILE"),
        ([str(tmp_path / "empty")], "names of files end in mindrecord"),
        ([str(tmp_path / "data.bin")], "unknown kind of file"),
        ([str(tmp_path / "none.mindrecord")], "no such file: train_dataset: "),
        ([str(tmp_path / "broken.mindrecord")], "not a MindRecord file: "),
        ([ours], f"no column input_ids: {ours}: it has tokens: input_columns are input_ids"),
        ([long], f"rows of another length: {long}: input_ids: 18 tokens: seq_length + 1 is 17"),
    ):
        words = ["--config", str(CONFIGS[0].with_name("pretrain_mixtral_tiny.yaml"))]
        words += [part for each in given for part in ("--train_data", each)]
        assert run.main(words) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
    assert not begun
    page = (CONFIGS[0].parents[2] / "docs" / "mindformers.md").read_text()
    (snippet,) = re.findall(r"^writer = FileWriter.*?(?=```)", page, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for length in (16, 17):
        rows = np.arange(4 * length, dtype=np.int32).reshape(4, length)
        exec(snippet, {"FileWriter": FileWriter, "rows": rows})
        assert run.main([*words[:2], "--train_data", "DATA.mindrecord"]) == 0
    assert len(begun) == 2


def test_without_mindformers_its_commands_say_so(monkeypatch, capsys):
    monkeypatch.setattr(mindformers, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'pip install "mistral_ms\[mindformers\]"'):
        mindformers.MixtralConfig  # noqa: B018
    assert run.main(["--config", "run.yaml"]) == 2
    assert "mistral_ms[mindformers]" in capsys.readouterr().err


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_files_are_read_and_built(mf, path):
    file = read(path, "--predict_data", "x", "--load_checkpoint", "x")
    if file["use_parallel"]:
        predicts, config = file["run_mode"] == "predict", config_of(mf, file)
        run = mf.prediction_of(config) if predicts else mf.run_of(config)
        check_prediction(run) if predicts else check_run(run, run.model.num_hidden_layers)
        assert run.parallel.execution == "graph"
        assert f"{run.parallel.world} cards" in path.read_text()
    config = config_of(
        mf, file, hidden_size=32, intermediate_size=48, num_layers=1, num_heads=2, n_kv_heads=1,
        vocab_size=64, seq_length=8, compute_dtype="float32", param_init_type="float32",
    )  # fmt: skip
    name = file["model"]["arch"]["type"]
    model = mf.registered(mf.kinds.MODELS, name)(config)
    assert (model.language_model.config.moe is None) == (name == "MistralForCausalLM")
    assert model.use_past == (file["run_mode"] == "predict")
