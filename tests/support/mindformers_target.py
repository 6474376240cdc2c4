"""A training step of MindFormers around our graph, as its trainer puts it together; compiled by the
dry run for a rank of Ascend. Not a test: the process that compiles imports it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from mindspore import Tensor, nn

H, V, S, E, WIDE = 64, 160, 24, 8, 96
MICRO = 2


class Step(NamedTuple):
    """What the dry run compiles."""

    cell: nn.Cell
    inputs: tuple[Tensor, ...]


def sections() -> dict:
    """Those of a configuration file that the step is made of: two stages of two ranks."""
    return {
        "use_parallel": True,
        "use_legacy": True,
        "run_mode": "train",
        "parallel": {
            **dict(parallel_mode=1, gradients_mean=False, enable_alltoall=True, full_batch=True),
            "enable_parallel_optimizer": True,
        },
        "parallel_config": {
            **dict(data_parallel=2, expert_parallel=2, pipeline_stage=2, micro_batch_num=MICRO),
        },
        "context": {"mode": 0, "device_target": "Ascend", "max_device_memory": "58GB"},
        "moe_config": {
            **dict(expert_num=E, num_experts_chosen=2, routing_policy="TopkRouterV2"),
            **dict(capacity_factor=1.1, enable_sdrop=True, aux_loss_factor=0.05),
        },
        "runner_config": {"batch_size": 1, "epochs": 1, "sink_mode": True},
        "trainer": {"type": "CausalLanguageModelingTrainer", "model_name": "mixtral"},
        "model": {
            "model_config": {
                **dict(type="MixtralConfig", batch_size=1, seq_length=S, hidden_size=H),
                **dict(intermediate_size=WIDE, num_layers=2, num_heads=4),
                **dict(vocab_size=V, n_kv_heads=2, compute_dtype="float16", pad_token_id=0),
            },
            "arch": {"type": "MixtralForCausalLM"},
        },
    }


def build() -> Step:
    """As base_trainer.py: build_context, the model, the cells around it, optimizer, step."""
    from mindformers.core.context import build_context
    from mindformers.core.lr import CosineWithWarmUpLR
    from mindformers.core.optim import AdamW
    from mindformers.core.parallel_config import build_parallel_config
    from mindformers.models.build_model import build_network
    from mindformers.tools.register import (
        MindFormerConfig,
        MindFormerModuleType,
        MindFormerRegister,
    )
    from mindformers.wrapper.wrapper import DataOrderWrapperCell
    from mindspore.nn.wrap.cell_wrapper import _VirtualDatasetCell

    from mistral_ms.mindformers import registration  # noqa: F401

    config = MindFormerConfig(**sections())
    build_context(config)
    build_parallel_config(config)
    model = build_network(
        config.model,
        default_args={
            "parallel_config": config.parallel_config,
            "moe_config": config.moe_config,
        },
    )
    network = DataOrderWrapperCell(["input_ids"], model)
    network = _VirtualDatasetCell(nn.PipelineCell(network, MICRO))
    optimizer = AdamW(
        [{"params": list(model.trainable_params()), "weight_decay": 0.01}],
        learning_rate=CosineWithWarmUpLR(learning_rate=1e-3, warmup_steps=2, total_steps=100),
    )
    step = MindFormerRegister.get_cls(MindFormerModuleType.WRAPPER, "MFPipelineWithLossScaleCell")
    cell = step(
        network,
        optimizer,
        use_clip_grad=True,
        scale_sense=nn.DynamicLossScaleUpdateCell(65536, 2, 1000),
        micro_batch_num=MICRO,
    )
    cell.set_train()
    return Step(cell, (Tensor(np.zeros((2 * MICRO, S + 1), np.int32)),))
