"""What configuration files of MindFormers mean; files of version 1.7 are made from its keys."""

from __future__ import annotations

import copy
import inspect
import re
from pathlib import Path
from types import SimpleNamespace

import mindspore as ms
import numpy as np
import pytest
import yaml
from mindspore.nn.utils import no_init_parameters

from mistral_ms import mindformers
from mistral_ms.checkpoint.keys import HF, HF_FUSED, MINDFORMERS
from mistral_ms.checkpoint.layout import format_layout, our_shapes
from mistral_ms.config import from_hf
from mistral_ms.config.capacity import expert_capacity
from mistral_ms.config.mindformers_keys import FIXED, MOE_FIXED, MOE_READ, MOE_WITHOUT_EFFECT
from mistral_ms.errors import CheckpointError, ConfigError, MissingExtraError
from mistral_ms.mindformers import run, run_file
from mistral_ms.mindformers.sections import SECTION_KEYS
from mistral_ms.parallel.graph.checks import check_prediction, check_run

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "mindformers").glob("*.yaml"))
SHIM = Path(__file__).parents[2] / "scripts" / "mindformers"
EXPERTS = dict(expert_num=8, num_experts_chosen=2, routing_policy="TopkRouterV2")


@pytest.fixture(scope="module")
def mf():
    """The classes; imported where they are used, for it takes seconds."""
    pytest.importorskip("mindformers", reason="MindFormers is not installed")
    from mindformers.core.lr import CosineWithWarmUpLR
    from mindformers.core.optim import AdamW
    from mindformers.core.parallel_config import build_parallel_config
    from mindformers.models.auto import AutoConfig, AutoModel, AutoModelForCausalLM
    from mindformers.models.build_model import build_network
    from mindformers.modules.transformer.moe import MoEConfig
    from mindformers.tools.register import (
        MindFormerConfig,
        MindFormerModuleType,
        MindFormerRegister,
    )
    from mindformers.wrapper import MFTrainOneStepCell

    from mistral_ms.mindformers import graph, registration

    return SimpleNamespace(
        **{name: getattr(registration, name) for name in mindformers.__all__},
        run_of=graph.run_of,
        prediction_of=graph.prediction_of,
        AdamW=AdamW,
        CosineWithWarmUpLR=CosineWithWarmUpLR,
        MoEConfig=MoEConfig,
        MindFormerConfig=MindFormerConfig,
        build_parallel_config=build_parallel_config,
        build_network=build_network,
        kinds=MindFormerModuleType,
        registered=MindFormerRegister.get_cls,
        MFTrainOneStepCell=MFTrainOneStepCell,
        made=MindFormerRegister.get_instance_from_cfg,
        AutoConfig=AutoConfig,
        AutoModels=(AutoModel, AutoModelForCausalLM),
    )


def version_1_7(model_type: str = "LlamaConfig", arch: str = "LlamaForCausalLM") -> dict:
    """A file with every key of the four files of 1.7's research/mixtral; see FOUR_FILES."""
    data = {
        "data_loader": {"type": "MindDataset", "dataset_dir": "", "shuffle": True},
        "input_columns": ["input_ids", "labels"],
        "num_parallel_workers": 8,
        "python_multiprocessing": False,
        "drop_remainder": True,
        "batch_size": 1,
        "repeat": 1,
        "numa_enable": False,
        "prefetch_size": 1,
    }
    task = {"type": "CausalLanguageModelDataset", "dataset_config": data}
    return {
        **dict(seed=0, output_dir="./output", run_mode="train", use_parallel=False),
        **dict(resume_training=False, only_save_strategy=False, auto_trans_ckpt=False),
        **dict(src_strategy_path_or_dir="", load_checkpoint="", load_ckpt_format="ckpt"),
        **dict(do_eval=False, eval_step_interval=-1, eval_epoch_interval=50),
        **dict(profile=False, profile_start_step=1, profile_stop_step=10, remote_save_url="None"),
        **dict(init_start_profile=False, profile_communication=False, profile_memory=True),
        **dict(auto_tune=False, filepath_prefix="./autotune", autotune_per_step=10),
        **dict(layer_scale=False, layer_decay=0.65, lr_scale_factor=256),
        **dict(micro_batch_interleave_num=1),
        "trainer": {"type": "CausalLanguageModelingTrainer", "model_name": "mixtral-8x7b"},
        "runner_config": {"epochs": 1, "batch_size": 1, "sink_mode": True, "sink_size": 1},
        "optimizer": {"type": "AdamW", "betas": [0.9, 0.95], "eps": 1e-8, "learning_rate": 1e-5},
        "lr_schedule": {
            "type": "CosineWithWarmUpLR",
            "learning_rate": 1e-5,
            "lr_end": 0,
            "warmup_ratio": 0.03,
            "total_steps": -1,
        },
        "moe_config": {
            **dict(expert_num=8, capacity_factor=1.1, aux_loss_factor=0.05, num_experts_chosen=2),
            **dict(routing_policy="TopkRouterV2", enable_sdrop=True, router_dense_type="float32"),
            **dict(use_fused_ops_topkrouter=False, balance_via_topk_bias=False),
            **dict(topk_bias_update_rate=0.001),
        },
        "train_dataset": data,
        "train_dataset_task": task,
        "eval_dataset": copy.deepcopy(data),
        "eval_dataset_task": copy.deepcopy(task),
        "parallel": {
            **dict(parallel_mode=1, gradients_mean=False, enable_alltoall=True, full_batch=True),
            **dict(search_mode="sharding_propagation", enable_parallel_optimizer=True),
            **dict(strategy_ckpt_save_file="./ckpt_strategy.ckpt"),
            "parallel_optimizer_config": {
                "gradient_accumulation_shard": False,
                "parallel_optimizer_threshold": 64,
            },
        },
        "parallel_config": {
            **dict(data_parallel=2, model_parallel=4, expert_parallel=2, pipeline_stage=2),
            **dict(micro_batch_num=16, use_seq_parallel=True, vocab_emb_dp=True),
            **dict(gradient_aggregation_group=4),
        },
        "recompute_config": {
            **dict(recompute=True, select_recompute=False, mp_comm_recompute=True),
            **dict(parallel_optimizer_comm_recompute=False, recompute_slice_activation=True),
        },
        "callbacks": [
            {"type": "MFLossMonitor"},
            {
                **dict(type="CheckpointMonitor", prefix="mixtral-8x7b", save_checkpoint_steps=500),
                **dict(integrated_save=False, async_save=False, checkpoint_format="ckpt"),
            },
        ],
        "context": {
            **dict(mode=0, device_target="Ascend", max_call_depth=10000, save_graphs=False),
            **dict(max_device_memory="58GB", save_graphs_path="./graph", device_id=0),
            **dict(memory_optimize_level="O0", mempool_block_size="59GB"),
            "jit_config": {"jit_level": "O1"},
            "ascend_config": {"precision_mode": "must_keep_origin_dtype"},
        },
        "model": {
            "model_config": {
                **dict(type=model_type, batch_size=1, seq_length=4096, hidden_size=4096),
                **dict(intermediate_size=14336, theta=1000000, num_layers=32, num_heads=32),
                **dict(vocab_size=32000, multiple_of=256, n_kv_heads=8, rms_norm_eps=1e-5),
                **dict(bos_token_id=1, eos_token_id=2, pad_token_id=0, ignore_token_id=-100),
                **dict(compute_dtype="bfloat16", layernorm_compute_type="float32"),
                **dict(softmax_compute_type="float16", rotary_dtype="float32"),
                **dict(param_init_type="float32", use_past=False, extend_method="None"),
                **dict(scaling_factor=1.0, offset=0, pp_interleave_num=1, qkv_has_bias=False),
                **dict(use_flash_attention=True, block_size=16, num_blocks=512),
                **dict(is_dynamic=False, checkpoint_name_or_path="", repetition_penalty=1),
                **dict(max_decode_length=512, top_k=3, top_p=1, do_sample=False),
                **dict(qkv_concat=False, ffn_dim_multiplier=None),
            },
            "arch": {"type": arch},
        },
        "processor": {
            "return_tensors": "ms",
            "tokenizer": {
                **dict(type="LlamaTokenizer", unk_token="<unk>", bos_token="<s>"),
                **dict(eos_token="</s>", pad_token="<unk>", vocab_file=""),
            },
            "type": "LlamaProcessor",
        },
        "metric": {"type": "PerplexityMetric"},
        "runner_wrapper": {
            "type": "MFTrainOneStepCell",
            "scale_sense": {
                **dict(type="DynamicLossScaleUpdateCell", loss_scale_value=65535),
                **dict(scale_factor=2, scale_window=1000),
            },
            "use_clip_grad": True,
        },
    }


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


def config_of(mf, file: dict, **changes):
    """What MindFormers' trainer makes of a file, before it builds the model."""
    keys = {**file["model"]["model_config"], **changes}
    kind = mf.registered(mf.kinds.CONFIG, keys.pop("type"))
    layout = {**file["parallel_config"], "recompute": file.get("recompute_config", {})}
    config = kind(parallel_config=layout, dataset_config={}, **keys)
    config.moe_config = mf.MoEConfig(**file.get("moe_config", {}))  # set later
    return config


def read(path: Path, *flags: str) -> dict:
    return run.read_config(*run.parser().parse_known_args(["--config", str(path), *flags]))


def test_everything_is_registered(mf):
    for kind, one in (
        (mf.kinds.CONFIG, mf.MixtralConfig),
        (mf.kinds.CONFIG, mf.MistralConfig),
        (mf.kinds.MODELS, mf.MixtralForCausalLM),
        (mf.kinds.MODELS, mf.MistralForCausalLM),
    ):
        assert mf.registered(kind, one.__name__) is one
    for name in ("MFTrainOneStepCell", "MoETrainOneStepCell"):
        found = mf.registered(mf.kinds.WRAPPER, name)
        assert found is mf.MoETrainOneStepCell
    assert type(mf.AutoConfig.for_model("mixtral")) is mf.MixtralConfig
    for auto in mf.AutoModels:
        assert auto._model_mapping[mf.MixtralConfig] is mf.MixtralForCausalLM


def test_their_own_launcher_finds_the_classes(mf, monkeypatch, tmp_path):
    """By ``--register_path`` and ``auto_register``, which copies the one file."""
    monkeypatch.setenv("REGISTER_PATH", str(SHIM))
    monkeypatch.chdir(tmp_path)
    keys = {"type": "MixtralConfig", "auto_register": "mixtral_shim.MixtralConfig"}
    config = mf.made(keys, mf.kinds.CONFIG)
    assert type(config) is mf.MixtralConfig


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


def test_attributes_that_are_set_later_count(mf):
    config = config_of(mf, version_1_7("MixtralConfig"))
    config.num_layers = 3
    config.moe_config.enable_sdrop = False
    assert config.architecture().num_hidden_layers == 3
    assert config.routing(training=True).drop_priority == "choice_major"
    config.moe_config.capacity_factor = -1
    assert config.routing(training=True).policy == "dropless"


@pytest.mark.parametrize("tokens", [7, 24, 100, 4096])
@pytest.mark.parametrize("mp", [1, 2, 4])
def test_the_old_rounding_of_the_capacity(mf, tokens, mp):
    """Against MindFormers' own function; theirs may exceed the tokens, of which a slot is empty."""
    from mindformers.modules.transformer.moe import calculate_expert_capacity_v2

    config = mf.MixtralConfig(
        moe_config={**EXPERTS, "capacity_factor": 1.1}, capacity_multiple_of=mp
    )
    routing = config.routing(training=True)
    found = expert_capacity(tokens, 8, 2, routing)
    assert found == min(tokens, calculate_expert_capacity_v2(2, tokens, 1.1, 8, mp))


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


@pytest.mark.parametrize(
    "keys, message",
    [
        (dict(num_layer=2), r"unknown key: model_config.num_layer: .*perhaps num_layers"),
        (dict(num_layers=2, num_hidden_layers=3), "contradiction: model_config.num_hidden_layers"),
        (dict(multiple_of=256), "missing key: model_config.intermediate_size"),
    ],
)
def test_unknown_and_missing_keys_are_refused(mf, keys, message):
    with pytest.raises(ConfigError, match=message):
        mf.MixtralConfig(**keys)


WRONG = {
    "is_dynamic": True, "extend_method": "PI", "scaling_factor": 2.0, "qkv_has_bias": True,
    "attn_proj_has_bias": True, "qkv_concat": True, "offset": [1, 0], "pp_interleave_num": 2,
    "fine_grain_interleave": 2, "ffn_dim_multiplier": 1.3, "use_rope_slice": True,
    "use_ring_attention": True, "use_eod_attn_mask_compression": True, "parallel_optimizer": True,
    "quant_config": {"method": "x"}, "quantization": "x",
    "quantization_config": {"method": "x"}, "pet_config": {"pet_type": "lora"},
    "parallel_decoding_params": {"x": 1}, "chunk_prefill": True, "return_hidden_states": True,
    "calculate_per_token_loss": True, "pipeline_stage": {"start_stage": 0}, "text_config": {},
    "vision_config": {}, "head_config": {}, "llm_backend": "x",
}  # fmt: skip


@pytest.mark.parametrize("key", FIXED)
def test_values_that_change_what_is_computed_are_refused(mf, key):
    config = mf.MixtralConfig(**{key: WRONG[key]})
    with pytest.raises(ConfigError, match=f"unsupported value: model_config.{key}"):
        config.architecture()


@pytest.mark.parametrize(
    "settings, found",
    [
        ({}, "none"),
        ({"recompute": True}, "full"),
        ({"select_recompute": True}, "selective"),
        ({"recompute": [2, 1]}, "recompute: .2, 1.: of all blocks the same"),
        (
            {"select_recompute": {"feed_forward": True}},
            "select_recompute: .*of all blocks the same",
        ),
        ({"mp_comm_recompute": False}, "mp_comm_recompute: False: .*exchange"),
        ({"select_comm_recompute": True}, "select_comm_recompute: True"),
    ],
)
def test_what_is_computed_again(mf, settings, found):
    config = mf.MixtralConfig(parallel_config={"recompute": settings})
    if found in ("none", "full", "selective"):
        assert config.recompute == found
        return
    with pytest.raises(ConfigError, match=found):
        _ = config.recompute


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(routing_policy="TopkRouterV1"), "routing_policy.*TopkRouterV1.*set 'TopkRouterV2'"),
        (dict(shared_expert_num=1), "shared_expert_num"),
        (dict(balance_via_topk_bias=True), "balance_via_topk_bias"),
        (dict(comp_comm_parallel=True), "comp_comm_parallel"),
    ],
)
def test_experts_of_other_models_are_refused(mf, changes, message):
    config = mf.MixtralConfig(moe_config=mf.MoEConfig(**{**EXPERTS, **changes}))
    with pytest.raises(ConfigError, match=message):
        config.architecture()


def test_contradictions_are_refused(mf):
    config = mf.MixtralConfig(num_local_experts=4, moe_config=EXPERTS)
    with pytest.raises(ConfigError, match=r"num_local_experts: 4: moe_config says 8"):
        config.architecture()
    with pytest.raises(ConfigError, match="has no experts"):
        mf.MistralConfig(moe_config=EXPERTS).architecture()
    with pytest.raises(ConfigError, match="sequence too long"):
        mf.MixtralConfig(seq_length=64, max_position_embeddings=32).architecture()


@pytest.mark.parametrize("name", ["MixtralConfig", "MistralConfig"])
def test_a_configuration_of_ours_survives(mf, name):
    kind = getattr(mf, name)
    architecture = kind(rope_theta=5e5, sliding_window=7, num_layers=2, head_dim=64).architecture()
    assert kind.of(architecture).architecture() == architecture


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


def test_processes_that_cannot_train_together_are_refused(mf, monkeypatch):
    """Whoever launches them: a divided graph on a CPU, each for itself, a mean of gradients."""
    from mistral_ms.mindformers import modeling, wrapper

    monkeypatch.setattr(modeling, "is_divided", lambda: True)
    config = mf.MixtralConfig(
        hidden_size=32, num_heads=2, n_kv_heads=2, num_layers=1, seq_length=8,
        parallel_config={"data_parallel": 2},
    )  # fmt: skip
    with pytest.raises(ConfigError, match="semi_auto_parallel on CPU: MindSpore divides graphs"):
        mf.MixtralForCausalLM(config)
    monkeypatch.setattr(wrapper.GlobalComm, "INITED", True)
    monkeypatch.setattr(wrapper, "get_group_size", lambda: 2)
    with pytest.raises(ConfigError, match="parallel_mode: stand_alone: processes that share"):
        wrapper.is_replicated()
    said = {"parallel_mode": "data_parallel", "gradients_mean": False}
    monkeypatch.setattr(wrapper.ms, "get_auto_parallel_context", said.get)
    assert wrapper.is_replicated()
    said["gradients_mean"] = True
    with pytest.raises(ConfigError, match="gradients_mean: True: the losses of processes"):
        wrapper.is_replicated()


def test_the_divided_graph_generates_as_the_model(mf, monkeypatch, tmp_path):
    """One process, its operators one by one: greedy, ragged, more prompts than rows; against whole
    sequences through the ordinary model.
    """
    from mistral_ms.mindformers import modeling

    keys = dict(
        hidden_size=32, intermediate_size=48, num_layers=2, num_heads=2, n_kv_heads=1,
        vocab_size=64, seq_length=16, initializer_range=0.2, num_local_experts=4,
        compute_dtype="float32",
    )  # fmt: skip
    plain = mf.MixtralForCausalLM(mf.MixtralConfig(**keys))
    plain.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(modeling, "is_divided", lambda: True)
    cached = mf.MixtralConfig(**keys, use_past=True, batch_size=2)
    with pytest.raises(ConfigError, match=r"no weights: .*weights_from"):
        mf.MixtralForCausalLM(cached)
    cached.weights_from = str(tmp_path / "model")
    model = mf.MixtralForCausalLM(cached)
    with pytest.raises(ConfigError, match="parts of a model"):
        model.save_pretrained(tmp_path / "parts")
    prompts = [[1, 5, 6, 7, 9], [1, 30, 4], [1, 7]]
    found = model.generate(prompts, max_new_tokens=3, do_sample=False, eos_token_id=[-1])
    for prompt, row in zip(prompts, found, strict=True):
        ids = list(prompt)
        for _ in range(3):
            positions = ms.Tensor(np.arange(len(ids), dtype=np.int32)[None])
            logits = plain.language_model(ms.Tensor(np.array([ids], np.int32)), positions)
            ids.append(int(logits.asnumpy()[0, -1].argmax()))
        assert list(map(int, row)) == ids


def test_what_router_monitor_says():
    pytest.importorskip("mindformers", reason="MindFormers is not installed")
    from mistral_ms.mindformers.monitor import StepLosses, describe

    routed, kept = np.array([[6.0, 2.0], [4.0, 4.0]]), np.array([[5.0, 2.0], [4.0, 4.0]])
    found = describe(StepLosses(2.5, 2.125, 0.5, routed, kept))
    assert found == (
        "lm_loss 2.500000, aux_loss 2.125000, z_loss 0.500000, dropped 0.0625, "
        "expert load max/min by layer 1.50/0.50 1.00/1.00"
    )
    stage = describe(StepLosses(None, 2.125, 0.5, routed[:1], routed[:1], layers=(3,)))
    assert stage.startswith("aux_loss 2.125000, z_loss 0.500000 of layers 3, dropped 0.0000")


def test_columns_are_those_that_the_file_names():
    pytest.importorskip("mindformers", reason="MindFormers is not installed")
    from mistral_ms.mindformers.wrapper import in_order

    assert in_order(("input_ids",), (1,)) == (1, None)
    assert in_order(("labels", "input_ids"), (1, 2)) == (2, 1)
    with pytest.raises(ValueError, match="other columns"):
        in_order(("input_ids",), (1, 2, 3))  # as with eod_reset


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


@pytest.mark.parametrize("kind", ["mixtral", "mistral"])
@pytest.mark.parametrize("table", [HF, HF_FUSED], ids=["transformers 4", "transformers 5"])
def test_weights_of_hugging_face_are_taken_by_name_or_refused(mf, kind, table):
    """All of them, in any order of the dictionary; experts by their numbers."""
    model_class = dict(mixtral=mf.MixtralForCausalLM, mistral=mf.MistralForCausalLM)[kind]
    keys = dict(
        hidden_size=16, intermediate_size=24, num_layers=2, num_heads=2, n_kv_heads=1,
        vocab_size=11, seq_length=8,
    )  # fmt: skip
    experts = {} if kind == "mistral" else {"num_local_experts": 3, "num_experts_per_tok": 2}
    architecture = model_class.config_class(**keys, **experts).architecture()
    generator = np.random.default_rng(0)
    source = {
        name: ms.Parameter(ms.Tensor(generator.standard_normal(shape).astype(np.float32)))
        for name, shape in reversed(format_layout(architecture, table).shapes.items())
    }
    found = model_class.convert_weight_dict(source, model_config={"type": "x", **keys})
    assert {name: each.shape for name, each in found.items()} == our_shapes(architecture)
    assert set(map(model_class.convert_name, source)) <= set(found)
    for name in ("lm_head.weight", "layers.0.moe.router.weight", "adam_m.norm.weight"):
        assert model_class.convert_name(name) == name  # ours, and MindFormers' own
    block = "model.layers.1.block_sparse_moe.experts"
    if kind == "mixtral" and table is HF:
        w2 = [source[f"{block}.{e}.w2.weight"].asnumpy() for e in range(3)]
    elif kind == "mixtral":
        w2 = source["model.layers.1.mlp.experts.down_proj"].asnumpy()
        both = source["model.layers.1.mlp.experts.gate_up_proj"].asnumpy()
        halves = [found[f"layers.1.moe.experts.{w}"].asnumpy() for w in ("w1", "w3")]
        assert np.array_equal(np.concatenate(halves, 1), both)
    if kind == "mixtral":
        assert np.array_equal(found["layers.1.moe.experts.w2"].asnumpy(), w2)
    del source["model.layers.1.self_attn.q_proj.weight"]
    with pytest.raises(CheckpointError, match=r"missing tensor.*layers\.1\.self_attn\.q_proj"):
        model_class.convert_weight_dict(source, model_config=keys)


def test_weights_that_a_checkpoint_lacks_are_named(mf):
    """MindFormers makes the model without values, loads what there is, and logs the rest."""
    config = mf.MistralConfig(
        hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, n_kv_heads=1,
        vocab_size=11, seq_length=8,
    )  # fmt: skip
    with no_init_parameters():
        model = mf.MistralForCausalLM(config)
    for name, parameter in model.weights().items():
        if name != "norm.weight":
            parameter.set_data(ms.Tensor(np.ones(parameter.shape, np.float32)))
    with pytest.raises(CheckpointError, match=r"norm\.weight: the checkpoint lacks 1 of 12"):
        model.init_parameters_data()


def test_ckpt_files_of_1_x_under_their_own_launcher(mf, tmp_path):
    """Its training reads them by names that it does not change: that nothing fits is an error which
    says what to set. The model itself reads them.
    """
    from mindformers.trainer.utils import load_ckpt
    from mindformers.wrapper.wrapper import DataOrderWrapperCell

    keys = dict(
        hidden_size=16, intermediate_size=24, num_layers=1, num_heads=2, n_kv_heads=1,
        vocab_size=11, seq_length=8, moe_config=dict(EXPERTS, expert_num=3),
    )  # fmt: skip
    architecture = mf.MixtralConfig(**keys).architecture()
    held = {
        name: np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        for name, shape in format_layout(architecture, MINDFORMERS).shapes.items()
    }
    file = tmp_path / "mixtral_rank_0-1_2.ckpt"
    ms.save_checkpoint([{"name": n, "data": ms.Tensor(a)} for n, a in held.items()], str(file))
    with no_init_parameters():
        model = mf.MixtralForCausalLM(mf.MixtralConfig(**keys))
    network = DataOrderWrapperCell(["input_ids"], model)
    rate = mf.CosineWithWarmUpLR(learning_rate=1e-3, warmup_steps=0, total_steps=2)
    mf.MoETrainOneStepCell(network, mf.AdamW(model.trainable_params(), learning_rate=rate))
    given = dict(
        checkpoint={"load_path": str(tmp_path)}, load_ckpt_format="ckpt", runner_config={},
        model={"model_config": {}},
    )  # fmt: skip
    load_ckpt(mf.MindFormerConfig(**given), network)
    with pytest.raises(CheckpointError, match=r"lacks 11 of 13 weights: set model_config\.weights"):
        network.init_parameters_data()
    reads = mf.MixtralForCausalLM(mf.MixtralConfig(**keys, weights_from=str(file)))
    w2 = reads.weights()["layers.0.moe.experts.w2"].asnumpy()
    assert np.array_equal(w2, held["model.layers.0.feed_forward.ffn.w2.weight"])


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
