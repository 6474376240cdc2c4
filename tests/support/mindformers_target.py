"""A training step of MindFormers around our graph, as its trainer puts it together; compiled by the
dry run for a rank of Ascend. Not a test: the process that compiles imports it.

A layout's strategy files go to ``LAYOUT/strategy`` below what LOCAL_DEFAULT_PATH names. A rank
whose part of a training lies in ``LAYOUT/parts/rank_R`` loads and saves it, see :class:`Rank`.
"""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from mindspore import Tensor, nn

H, V, S, E, WIDE = 64, 160, 24, 8, 96
MICRO = 2


class Layout(NamedTuple):
    """Of the processes; dense: of Mistral, else of Mixtral."""

    dp: int = 1
    mp: int = 1
    ep: int = 1
    pp: int = 1
    dense: bool = False

    @property
    def world(self) -> int:
        return self.dp * self.mp * self.pp

    @property
    def rows(self) -> int:
        """Of a batch: one for each micro-batch of each data-parallel rank."""
        return self.dp * (MICRO if self.pp > 1 else 1)


LAYOUTS = {
    "dp2_mp2": Layout(dp=2, mp=2, dense=True),
    "dp2_mp2_ep2_pp2": Layout(dp=2, mp=2, ep=2, pp=2),
}


class Rank:
    """A compiled step that then, as MindFormers' trainer does, loads the rank's part of a training
    by its names, and saves everything as CheckpointMonitor does.
    """

    def __init__(self, cell: nn.Cell, parts: Path, output: Path) -> None:
        self.cell, self.parts, self.output = cell, parts, output

    def compile(self, *inputs: Tensor) -> None:
        self.cell.compile(*inputs)
        rank = f"rank_{os.environ['RANK_ID']}"
        if not (self.parts / rank).is_dir():
            return
        import mindspore as ms

        from mistral_ms.errors import CheckpointError

        found: dict = {}
        try:  # as where the checkpoint has nothing
            self.cell.network.init_parameters_data()
        except CheckpointError as error:
            found["gap"] = str(error)
        (file,) = (self.parts / rank).iterdir()
        held = ms.load_checkpoint(str(file), format="safetensors")
        found["left out"] = ms.load_param_into_net(self.cell, held)
        self.cell.network.init_parameters_data()
        self.cell.init_parameters_data(auto_parallel_mode=True)
        (self.output / rank).mkdir(parents=True, exist_ok=True)
        saved = self.output / rank / f"mixtral_{rank}-1_3.safetensors"
        counters = {"epoch_num": 1, "step_num": 3, "loss_scale": 65536.0}
        ms.save_checkpoint(self.cell, str(saved), False, append_dict=counters, format="safetensors")
        (self.output / f"{rank}.json").write_text(json.dumps(found))


class Step(NamedTuple):
    """What the dry run compiles."""

    cell: Rank | nn.Cell
    inputs: tuple[Tensor, ...]


def sections(layout: Layout) -> dict:
    """Those of a configuration file that the step is made of."""
    name = "Mistral" if layout.dense else "Mixtral"
    experts = {
        **dict(expert_num=E, num_experts_chosen=2, routing_policy="TopkRouterV2"),
        **dict(capacity_factor=1.1, enable_sdrop=True, aux_loss_factor=0.05),
    }
    return {
        "use_parallel": True,
        "use_legacy": True,
        "run_mode": "train",
        "parallel": {
            **dict(parallel_mode=1, gradients_mean=False, enable_alltoall=True, full_batch=True),
            "enable_parallel_optimizer": True,
        },
        "parallel_config": {
            **dict(data_parallel=layout.dp, model_parallel=layout.mp, expert_parallel=layout.ep),
            **dict(pipeline_stage=layout.pp, micro_batch_num=MICRO if layout.pp > 1 else 1),
        },
        "context": {"mode": 0, "device_target": "Ascend", "max_device_memory": "58GB"},
        "moe_config": {} if layout.dense else experts,
        "runner_config": {"batch_size": 1, "epochs": 1, "sink_mode": True},
        "trainer": {"type": "CausalLanguageModelingTrainer", "model_name": "mixtral"},
        "model": {
            "model_config": {
                **dict(type=f"{name}Config", batch_size=1, seq_length=S, hidden_size=H),
                **dict(intermediate_size=WIDE, num_layers=layout.pp, num_heads=4),
                **dict(vocab_size=V, n_kv_heads=2, compute_dtype="float16", pad_token_id=0),
            },
            "arch": {"type": f"{name}ForCausalLM"},
        },
    }


def build(name: str) -> Step:
    """As base_trainer.py: build_context, the model, the cells around it, optimizer, step."""
    layout, place = LAYOUTS[name], Path(os.environ["LOCAL_DEFAULT_PATH"]) / name
    os.environ["LOCAL_DEFAULT_PATH"] = str(place)
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

    config = MindFormerConfig(**sections(layout))
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
    options: dict = {}
    step_name = "MFTrainOneStepCell"
    if layout.pp > 1:
        network = nn.PipelineCell(network, MICRO)
        step_name, options = "MFPipelineWithLossScaleCell", {"micro_batch_num": MICRO}
    network = _VirtualDatasetCell(network)
    optimizer = AdamW(
        [{"params": list(model.trainable_params()), "weight_decay": 0.01}],
        learning_rate=CosineWithWarmUpLR(learning_rate=1e-3, warmup_steps=2, total_steps=100),
    )
    cell = MindFormerRegister.get_cls(MindFormerModuleType.WRAPPER, step_name)(
        network,
        optimizer,
        use_clip_grad=True,
        scale_sense=nn.DynamicLossScaleUpdateCell(65536, 2, 1000),
        **options,
    )
    cell.set_train()
    rank = Rank(cell, place / "parts", place / "checkpoint")
    return Step(rank, (Tensor(np.zeros((layout.rows, S + 1), np.int32)),))


def predict() -> Step:
    """A rank of two that generate, as run_mode predict builds it; the graph of whole prompts. What
    it holds after the graph of one token was compiled goes into ``predict/weights.npz``.
    """
    place = Path(os.environ["LOCAL_DEFAULT_PATH"])
    from mindformers.core.context import build_context
    from mindformers.core.parallel_config import build_parallel_config
    from mindformers.models.build_model import build_network
    from mindformers.tools.register import MindFormerConfig

    from mistral_ms.mindformers import registration  # noqa: F401

    given = sections(Layout(dp=1, mp=2))
    given["run_mode"] = "predict"
    given["parallel"]["enable_alltoall"] = False  # as 1.7's file has it
    given["model"]["model_config"] |= {"use_past": True, "weights_from": str(place / "whole")}
    given["model"]["model_config"] |= {"num_layers": 2, "batch_size": 2}
    config = MindFormerConfig(**given)
    build_context(config)
    build_parallel_config(config)
    sizes = {"parallel_config": config.parallel_config, "moe_config": config.moe_config}
    model = build_network(config.model, default_args=sizes)
    (place / "predict").mkdir(exist_ok=True)
    held = {name: each.asnumpy() for name, each in model.weights().items()}
    np.savez(place / "predict" / "weights.npz", **held)
    ids = Tensor(np.zeros((2, S), np.int32))
    return Step(model.net, (ids, ids, Tensor(np.zeros(2, np.int32))))


dp2_mp2, dp2_mp2_ep2_pp2 = (partial(build, name) for name in LAYOUTS)
