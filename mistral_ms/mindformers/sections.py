"""The keys that sections of MindFormers' configuration files may hold.

Of some sections MindFormers refuses an unknown key with a traceback; of others it drops it, with a
line in its log at most. Here all are refused before anything is built. What is not listed is read
by a class that takes no other arguments: ``optimizer``, ``lr_schedule``, ``callbacks``, ``metric``,
``processor``, data loaders; ``model_config`` has tables of its own.

Sources: ``ConfigTemplate``, ``ContextConfig``, ``MFContextConfig``, ``CausalLanguageModelDataset``
and ``MFTrainOneStepCell`` of MindFormers 1.9 and 2.1, and ``set_auto_parallel_context`` of
MindSpore.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mistral_ms.config.mindformers_keys import (
    MOE_FIXED,
    MOE_OF_OTHER_FILES,
    MOE_READ,
    MOE_WITHOUT_EFFECT,
)
from mistral_ms.config.names import perhaps
from mistral_ms.errors import ConfigError

_DATASET = frozenset(
    {
        *("data_loader", "input_columns", "output_columns", "construct_args_key", "batch_size"),
        *("drop_remainder", "num_parallel_workers", "python_multiprocessing", "repeat", "seed"),
        *("prefetch_size", "numa_enable", "eod_reset", "eod_token_id", "dynamic_batch", "divisor"),
        *("remainder", "pad_token_id", "auto_tune", "filepath_prefix", "autotune_per_step"),
        *("profile", "token_monitor", "token_monitor_config"),
    }
)
_DATASET_TASK = frozenset({"type", "dataset_config"})

SECTION_KEYS: Mapping[str, frozenset[str]] = {
    "trainer": frozenset({"type", "model_name"}),
    "runner_config": frozenset(
        {
            *("batch_size", "epochs", "sink_mode", "sink_size", "gradient_accumulation_steps"),
            *("num_classes", "stop_step"),
        }
    ),
    "parallel_config": frozenset(
        {
            *("data_parallel", "model_parallel", "context_parallel", "expert_parallel"),
            *("pipeline_stage", "micro_batch_num", "seq_split_num", "use_seq_parallel"),
            *("optimizer_shard", "gradient_aggregation_group", "vocab_emb_dp"),
            *("context_parallel_algo", "ulysses_degree_in_cp", "mem_coeff"),
        }
    ),
    "recompute_config": frozenset(
        {
            *("recompute", "select_recompute", "parallel_optimizer_comm_recompute"),
            *("select_comm_recompute", "mp_comm_recompute", "recompute_slice_activation"),
            *("select_recompute_exclude", "select_comm_recompute_exclude"),
        }
    ),
    "swap_config": frozenset({"swap", "layer_swap", "op_swap", "default_prefetch"}),
    "moe_config": MOE_READ | MOE_FIXED.keys() | MOE_WITHOUT_EFFECT.keys() | MOE_OF_OTHER_FILES,
    "parallel": frozenset(
        {
            *("parallel_mode", "device_num", "global_rank", "gradients_mean", "gradient_fp32_sync"),
            *("loss_repeated_mean", "search_mode", "auto_parallel_search_mode"),
            *("parameter_broadcast", "strategy_ckpt_load_file", "strategy_ckpt_save_file"),
            *("strategy_ckpt_config", "group_ckpt_save_file", "full_batch", "dataset_strategy"),
            *("enable_parallel_optimizer", "parallel_optimizer_config", "enable_alltoall"),
            *("all_reduce_fusion_config", "comm_fusion", "pipeline_stages", "pipeline_config"),
            *("pipeline_segments", "pipeline_result_broadcast", "auto_pipeline"),
            *("grad_accumulation_step", "communi_parallel_mode", "optimizer_weight_shard_size"),
            *("optimizer_weight_shard_aggregated_save", "sharding_propagation"),
            *("force_fp32_communication", "dump_local_norm", "dump_local_norm_path"),
            *("dump_device_local_norm", "auto_parallel_new_interface", "init_param_in_compile"),
        }
    ),
    "context": frozenset(
        {
            *("mode", "device_target", "device_id", "save_graphs", "save_graphs_path"),
            *("max_call_depth", "max_device_memory", "mempool_block_size"),
            *("memory_optimize_level", "jit_config", "ascend_config"),
            *("dataset_broadcast_opt_level", "exclude_cann_cpu", "postprocess_use_numpy"),
            *("train_precision_sync", "infer_precision_sync", "use_graceful_exit"),
            *("affinity_cpu_list", "affinity_config", "monitor_local_loss"),
            "monitor_device_local_loss",
        }
    ),
    "train_dataset": _DATASET,
    "train_dataset_task": _DATASET_TASK,
    "eval_dataset": _DATASET,
    "eval_dataset_task": _DATASET_TASK,
    "model": frozenset({"model_config", "arch", "generation_config"}),
    "runner_wrapper": frozenset(
        {
            *("type", "scale_sense", "use_clip_grad", "max_grad_norm", "micro_batch_num"),
            *("local_norm", "use_skip_data_by_global_norm", "global_norm_spike_threshold"),
            *("calculate_per_token_loss", "print_separate_loss"),
        }
    ),
    "monitor_config": frozenset(
        {
            *("monitor_on", "dump_path", "target", "invert", "step_interval"),
            *("local_loss_format", "local_norm_format", "device_local_norm_format"),
            *("device_local_loss_format", "optimizer_state_format", "weight_state_format"),
            *("max_attention_logit_format", "throughput_baseline", "print_struct"),
            *("check_for_global_norm", "global_norm_spike_threshold"),
            *("global_norm_spike_count_threshold", "stable_rank_config", "health_checkpoint"),
        }
    ),
}
"""What each section may hold."""


def check_sections(config: Mapping[str, Any], where: object) -> None:
    """Raises for a key that no reader of its section knows.

    Args:
        config: a configuration file.
        where: its path.

    Raises:
        ConfigError: such a key, with the nearest that is known; a section that is no mapping.
    """
    for section, keys in _sections(config):
        known = SECTION_KEYS[section]
        if not isinstance(keys, Mapping):
            raise ConfigError("not a section", where=f"{where}: {section}", value=repr(keys))
        for key in keys:
            if key not in known:
                raise ConfigError(
                    "unknown key",
                    where=f"{where}: {section}.{key}",
                    rule="no key is ignored",
                    todo=perhaps(str(key), sorted(known)),
                )


def _sections(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Those that are there; an empty one says nothing."""
    for section in SECTION_KEYS:
        if config.get(section) is not None:
            yield section, config[section]
