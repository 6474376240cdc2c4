"""Run files of MindFormers, and what its trainer makes of them; files of version 1.7 are made from
its keys.
"""

from __future__ import annotations

import copy
from pathlib import Path

from mistral_ms.mindformers import run

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs" / "mindformers").glob("*.yaml"))
EXPERTS = dict(expert_num=8, num_experts_chosen=2, routing_policy="TopkRouterV2")


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
