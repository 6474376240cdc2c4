"""MindFormers' configuration files: read, changed from the command line, and checked as a whole.

MindFormers ignores keys that it does not know at the top of a file, and resets others with a line
in its log. Here every key has a meaning or is refused by name; see
:mod:`mistral_ms.mindformers.sections` for what sections hold, and
:mod:`mistral_ms.mindformers.config` for the model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mistral_ms.config.mindformers_keys import RECOMPUTE_FIXED, Fixed, check_fixed
from mistral_ms.config.names import perhaps
from mistral_ms.errors import ConfigError
from mistral_ms.mindformers.sections import check_sections

SECTIONS = frozenset(
    {
        *("trainer", "runner_config", "optimizer", "lr_schedule", "grouped_lr_schedule"),
        *("train_dataset", "train_dataset_task", "eval_dataset", "eval_dataset_task"),
        *("parallel", "parallel_config", "recompute_config", "swap_config", "moe_config"),
        *("callbacks", "eval_callbacks", "context", "model", "processor", "metric"),
        *("runner_wrapper", "monitor_config", "tensorboard", "checkpoint", "generation_config"),
    }
)
VALUES = frozenset(
    {
        *("seed", "output_dir", "run_mode", "use_parallel", "resume_training", "do_eval"),
        *("load_checkpoint", "load_ckpt_format", "auto_trans_ckpt", "transform_process_num"),
        *("src_strategy_path_or_dir", "only_save_strategy", "load_ckpt_async", "use_legacy"),
        *("use_legacy_format", "pretrained_model_dir", "balanced_load", "reshard_worker_num"),
        *("eval_step_interval", "eval_epoch_interval", "ignore_data_skip", "data_skip_steps"),
        *("profile", "profile_communication", "profile_memory", "init_start_profile"),
        *("profile_start_step", "profile_stop_step", "profile_rank_ids", "profile_pipeline"),
        *("profile_level", "mstx", "layer_scale", "layer_decay", "lr_scale", "lr_scale_factor"),
        *("micro_batch_interleave_num", "remote_save_url", "save_file", "input_data"),
        *("predict_batch_size", "adapter_id", "exclude_cann_cpu", "train_precision_sync"),
        *("infer_precision_sync", "postprocess_use_numpy", "print_separate_loss"),
        *("remove_redundancy", "trust_remote_code", "top_k", "modal_type"),
        *("calculate_per_token_loss", "base_config"),
        # of version 1.7, where later ones have nothing in their place
        *("auto_tune", "filepath_prefix", "autotune_per_step", "runner_type"),
    }
)
KNOWN = SECTIONS | VALUES

FIXED: Mapping[str, Fixed] = {
    "use_legacy": Fixed((True, None), "the models are of MindFormers' legacy trainer"),
    "context.mode": Fixed((0, "GRAPH_MODE", None), "mode 1 is another trainer, for other models"),
    "micro_batch_interleave_num": Fixed(
        (1, None), "MindFormers would cut the batch in a way that the router's losses do not see"
    ),
    "layer_scale": Fixed((False, None), "one learning rate for all layers"),
    "base_config": Fixed((None,), "a file is read alone: write what it is based on into it"),
    "modal_type": Fixed((None,), "the models read text"),
    "adapter_id": Fixed((None,), "low-rank adapters are not supported"),
    "pretrained_model_dir": Fixed(
        ("", None), "load_checkpoint names the weights, processor.tokenizer the tokenizer"
    ),
    "use_legacy_format": Fixed((True, None), "newer forms of checkpoints were never tried here"),
    "checkpoint": Fixed((None,), "it asks for newer forms of checkpoints, never tried here"),
    "swap_config.swap": Fixed((False, None), "nothing moves to the host's memory and back"),
    "monitor_config.max_attention_logit_format": Fixed((None,), "attention keeps no logits"),
    "parallel.strategy_ckpt_load_file": Fixed(("", None), "layouts come from a table"),
    **{
        f"{data}.{key}": fixed
        for data in ("train_dataset", "eval_dataset")
        for key, fixed in {
            "eod_reset": Fixed((False, None), "attention does not end at end-of-text tokens"),
            "dynamic_batch": Fixed((False, None), "shapes are static"),
        }.items()
    },
    "parallel_config.context_parallel": Fixed((1, None), "there is no context parallelism"),
    "parallel_config.seq_split_num": Fixed((1, None), "there is no context parallelism"),
    **{f"recompute_config.{key}": fixed for key, fixed in RECOMPUTE_FIXED.items()},
    "calculate_per_token_loss": Fixed((False, None), "the loss is a mean over the counted tokens"),
}

REPLICATED = (0, "DATA_PARALLEL", None)
"""Values of ``parallel.parallel_mode``: every process has the whole model."""
DIVIDED = (1, "SEMI_AUTO_PARALLEL")
"""The same of a graph that MindSpore divides among processes."""
PARALLEL: Mapping[str, Fixed] = {
    "run_mode": Fixed(
        ("train", "finetune", "predict"), "several processes train or predict; one evaluates"
    ),
    "do_eval": Fixed((False, None), "several processes train; one evaluates"),
    "parallel.parallel_mode": Fixed(
        DIVIDED + REPLICATED, "layouts are given, or every process has the whole model"
    ),
    "parallel.gradients_mean": Fixed((False, None), "the loss is a sum of shares already"),
    "runner_wrapper.use_skip_data_by_global_norm": Fixed((False, None), "no step is left out"),
    "runner_wrapper.local_norm": Fixed((False, None), "norms are of all processes"),
}
"""What must stand in a file with ``use_parallel``; None: nothing."""
OF_DIVIDED: Mapping[str, Fixed] = {
    "parallel.full_batch": Fixed((True, None), "every process counts the whole batch"),
    "runner_config.gradient_accumulation_steps": Fixed(
        (1, None), "of a divided graph a pipeline's micro-batches alone add up gradients"
    ),
}
"""The same of a divided graph."""
OF_DIVIDED_TRAINING: Mapping[str, Fixed] = {
    "parallel.enable_alltoall": Fixed((True,), "else a change of layout is an AllGather and a cut"),
}
"""The same where it is trained."""
_WHOLE = "parallel_mode 0 gives every process the whole model (1 divides it, on Ascend)"
OF_REPLICATED: Mapping[str, Fixed] = {
    "parallel.enable_parallel_optimizer": Fixed((False, None), _WHOLE),
    **{
        f"parallel_config.{key}": Fixed((1, None), _WHOLE)
        for key in ("model_parallel", "expert_parallel", "pipeline_stage", "micro_batch_num")
    },
}
"""The same where every process has the whole model."""

MODELS = {
    "mixtral": ("MixtralConfig", "MixtralForCausalLM"),
    "mistral": ("MistralConfig", "MistralForCausalLM"),
}
"""The two lines of a file that name a model: its configuration's type, and its own."""


def read(path: Path) -> dict[str, Any]:
    """A configuration file as it stands.

    Raises:
        ConfigError: no such file, or no YAML mapping.
    """
    if not path.is_file():
        raise ConfigError("no such file", where=path)
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError("not a YAML file", where=path, value=error) from error
    if not isinstance(found, dict):
        raise ConfigError("not a YAML mapping", where=path)
    return found


def get(config: Mapping[str, Any], key: str, default: Any = None) -> Any:
    """The value at a dotted key."""
    found: Any = config
    for part in key.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return default
        found = found[part]
    return found


def put(config: dict[str, Any], key: str, value: Any) -> None:
    """Sets the value at a dotted key; numbers choose entries of lists.

    Raises:
        ConfigError: something that is no section stands in the way.
    """
    *parents, last = key.split(".")
    place: Any = config
    for part in parents:
        if isinstance(place, list):
            place = place[_entry(place, part, key)]
        else:
            if place.get(part) is None:  # absent, or a section that is empty
                place[part] = {}
            place = place[part]
        if not isinstance(place, dict | list):
            raise ConfigError("not a section", where=key, value=repr(place))
    if isinstance(place, list):
        place[_entry(place, last, key)] = value
    else:
        place[last] = value


def _entry(entries: list[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(entries):
        raise ConfigError(
            "no such entry",
            where=key,
            value=part,
            rule=f"the list has {len(entries)} entries, from 0 on",
        )
    return int(part)


def name_model(config: dict[str, Any], model: str) -> None:
    """Sets the two lines that name a model."""
    config_type, model_type = MODELS[model]
    put(config, "model.model_config.type", config_type)
    put(config, "model.arch.type", model_type)


def check(config: Mapping[str, Any], where: Path) -> None:
    """Checks a file as a whole.

    Args:
        config: with everything that the command line changes.
        where: its path.

    Raises:
        ConfigError: an unknown key; a value that is not supported, with the reason.
    """
    for key in config:
        if key not in KNOWN:
            raise ConfigError(
                "unknown key",
                where=f"{where}: {key}",
                rule="no key is ignored",
                todo=perhaps(key, sorted(KNOWN)),
            )
    check_sections(config, where)
    for key, fixed in FIXED.items():
        check_fixed(f"{where}: {key}", get(config, key, ...), fixed)
    training = config.get("run_mode") in ("train", "finetune")
    if training and get(config, "optimizer.type") == "FP32StateAdamWeightDecay":
        raise ConfigError(
            "unsupported value",
            where=f"{where}: optimizer.type",
            value="FP32StateAdamWeightDecay",
            rule="MindFormers 1.7 had removed it already",
            todo="set type: AdamW, and betas: [0.9, 0.95] in the place of beta1 and beta2",
        )
    for key in ("resume_training", "auto_trans_ckpt"):
        if config.get(key) and not config.get("load_checkpoint"):
            raise ConfigError(
                "contradiction",
                where=f"{where}: {key}",
                value=config[key],
                rule="there is no load_checkpoint to begin with",
                todo="set load_checkpoint",
            )
    if get(config, "context.device_target") == "CPU" and get(
        config, "runner_config.sink_mode", True
    ):
        raise ConfigError(
            "unsupported value",
            where=f"{where}: runner_config.sink_mode",
            value="True (MindFormers' default)",
            rule="a CPU sinks no data: MindFormers would run an epoch for every sink_size steps",
            todo="set sink_mode: False",
        )
    _check_processes(config, where)
    if config.get("use_parallel"):
        _check_parallel(config, where)
    types = get(config, "model.model_config.type"), get(config, "model.arch.type")
    if types not in MODELS.values():
        raise ConfigError(
            "another model",
            where=f"{where}: model.model_config.type, model.arch.type",
            value=", ".join(map(str, types)),
            rule=" or ".join(", ".join(each) for each in MODELS.values()),
            todo="change the two lines, or use --model mixtral",
        )


def is_divided(config: Mapping[str, Any]) -> bool:
    """Whether MindSpore divides the model among processes."""
    mode = get(config, "parallel.parallel_mode")
    return bool(config.get("use_parallel")) and mode in DIVIDED


def _check_processes(config: Mapping[str, Any], where: Path) -> None:
    """Checks that msrun, and a file of several processes, come together."""
    started = os.environ.get("MS_WORKER_NUM")
    if config.get("use_parallel"):
        if started is None and get(config, "context.device_target") == "CPU":
            raise ConfigError(
                "one process",
                where=f"{where}: use_parallel",
                value=True,
                rule="on a CPU msrun starts several",
                todo="start it by scripts/msrun_launcher.sh, or set use_parallel: False",
            )
    elif started not in (None, "1"):
        raise ConfigError(
            "contradiction",
            where=f"{where}: use_parallel",
            value=config.get("use_parallel"),
            rule=f"each of {started} processes would do the same, and write into the same files",
            todo="set use_parallel: True",
        )


def _check_parallel(config: Mapping[str, Any], where: Path) -> None:
    """Checks a file of several processes."""
    divided = is_divided(config)
    rules = {**PARALLEL, **(OF_DIVIDED if divided else OF_REPLICATED)}
    if divided and config.get("run_mode") != "predict":
        rules |= OF_DIVIDED_TRAINING
    for key, fixed in rules.items():
        check_fixed(f"{where}: {key}", get(config, key), fixed)
    on_cpu = get(config, "context.device_target") == "CPU"
    if divided and on_cpu:
        raise ConfigError(
            "unsupported value",
            where=f"{where}: parallel.parallel_mode",
            value=f"{get(config, 'parallel.parallel_mode')} on a CPU",
            rule="MindSpore divides graphs for Ascend alone",
            todo="set parallel_mode: 0, which gives every process the whole model",
        )
    if not divided and config.get("resume_training") and on_cpu:
        raise ConfigError(
            "unsupported value",
            where=f"{where}: resume_training",
            value=f"{config['resume_training']} on a CPU",
            rule="MindFormers' loading for several processes calls Barrier, which a CPU has not",
            todo="go on in one process, with gradient_accumulation_steps in the place of processes",
        )
    processes = os.environ.get("MS_WORKER_NUM")
    if divided or processes is None:
        return
    predicts = config.get("run_mode") == "predict"
    weights = get(config, "model.model_config.weights_from")
    if predicts and not (config.get("load_checkpoint") or weights):
        raise ConfigError(
            "no weights",
            where=f"{where}: load_checkpoint",
            rule="several processes draw none to generate with",
        )
    if predicts and len(config["input_data"]) < int(processes):
        raise ConfigError(
            "fewer prompts than processes",
            where=f"{where}: input_data",
            value=f"{len(config['input_data'])} of {processes}",
            rule="processes with whole models share the prompts",
        )
    check_fixed(
        f"{where}: parallel_config.data_parallel",
        get(config, "parallel_config.data_parallel"),
        Fixed((int(processes), 1, None), f"{processes} processes have the whole model each"),
    )


def accumulate(config: dict[str, Any]) -> None:
    """Has the training step of a whole model accumulate gradients, which MindFormers resets to 1:
    ``runner_config.batch_size`` becomes the rows of an update, those of one process.

    Raises:
        ConfigError: no whole number of micro-batches.
    """
    key = "runner_config.gradient_accumulation_steps"
    steps = get(config, key) or 1
    if is_divided(config) or steps == 1:
        return
    if not isinstance(steps, int) or steps < 1:
        raise ConfigError("invalid value", where=key, value=repr(steps), rule="a whole number")
    put(config, key, 1)
    put(config, "runner_config.batch_size", steps * int(get(config, "runner_config.batch_size", 1)))
    put(config, "runner_wrapper.micro_batch_num", steps)
