"""Throughput that others have published, and what the planner says of the same trainings.

One point fits the one constant; the others are predictions. Most leave something open: what is
open stands beside each point, with other values that it may have had.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mistral_ms.config import RunConfig
from mistral_ms.config.base import validate
from mistral_ms.parallel.pipeline import layer_costs
from mistral_ms.planner.hardware import Cluster, load_hardware
from mistral_ms.planner.search import judge

MIXTRAL_8X7B: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "moe": {"num_local_experts": 8, "num_experts_per_tok": 2},
}


@dataclass(frozen=True)
class Point:
    """A published result.

    Attributes:
        name: of the system.
        source: where it is published.
        value: the result.
        unit: tokens/s per card, or TFLOP/s per card of the model's own operations.
        hardware: a file of configs/hardware.
        parallel: the layout.
        training: batch and sequence.
        routing: the policy.
        chunks: of layers on each stage.
        open: what the source does not say, and what is assumed for it.
        others: other values of what is open, by a name: changes of ``parallel``, ``training`` and
            ``routing``.
    """

    name: str
    source: str
    value: float
    unit: str
    hardware: str
    parallel: Mapping[str, Any]
    training: Mapping[str, Any]
    routing: Mapping[str, Any]
    chunks: int = 1
    open: str = ""
    others: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def run(self, name: str | None = None) -> RunConfig:
        """The training, with the values that are assumed or with others by their name."""
        changes = self.others[name] if name is not None else {}
        values = {
            "model": MIXTRAL_8X7B,
            "parallel": {"execution": "graph", "optimizer_parallel": True, **self.parallel},
            "training": {"max_steps": 1, "dtype": "bfloat16", **self.training},
            "routing": {"aux_loss": "per_layer", **self.routing},
        }
        for group, new in changes.items():
            values[group] = {**values[group], **new}
        return validate(RunConfig, values, self.name)

    def predicted(self, name: str | None = None) -> float:
        """What the planner says, in the point's unit.

        Args:
            name: of other values of what is open; None: those that are assumed.
        """
        run = self.run(name)
        cluster = Cluster.of(load_hardware(self.hardware), run.parallel.world)
        rate = judge(run, cluster, chunks=self.chunks).tokens_per_s_per_card
        return rate if self.unit == TOKENS else rate * _flops(run) / 1e12

    def error(self, name: str | None = None) -> float:
        """The prediction's, as a share of the published value."""
        return self.predicted(name) / self.value - 1


TOKENS, TFLOPS = "tokens/s per card", "TFLOP/s per card"
CAPACITY = {"policy": "capacity", "capacity_factor": 1.1}
BATCH_OF_128 = {"seq_length": 4096, "global_batch_size": 128, "gradient_accumulation_steps": 16}
FITTED = Point(
    name="MindFormers 1.2, finetune",
    source="MindFormers 1.2, model performance; research/mixtral/finetune_mixtral-8x7b.yaml",
    value=1678,
    unit=TOKENS,
    hardware="atlas_800t_a2",
    parallel={"dp": 8, "pp": 2, "ep": 8, "recompute": "full"},
    training=BATCH_OF_128,
    routing=CAPACITY,
    open="the variant of the chip; the file has full recompute and one sequence a micro-batch",
    others={"MindFormers, no recompute": {"parallel": {"recompute": "none"}}},
)
"""Fits ``SLOWDOWN``."""
PREDICTED = (
    Point(
        name="course, 32 cards, ep 8, mp 1",
        source="the course that this project follows",
        value=1147,
        unit=TOKENS,
        hardware="atlas_800t_a2",
        parallel={"dp": 8, "pp": 4, "ep": 8, "recompute": "full"},
        training=BATCH_OF_128,
        routing=CAPACITY,
        open="pp, micro-batches, batch, sequence, recompute",
        others={
            "course, 8 micro-batches": {
                "training": {"gradient_accumulation_steps": 8, "global_batch_size": 64}
            },
            "course, 4 micro-batches": {
                "training": {"gradient_accumulation_steps": 4, "global_batch_size": 32}
            },
            "course, pp 2": {
                "parallel": {"pp": 2, "dp": 16},
                "training": {"global_batch_size": 256},
            },
            "course, sequence 2048": {"training": {"seq_length": 2048}},
            "course, capacity 2.0": {"routing": {"capacity_factor": 2.0}},
        },
    ),
    Point(
        name="MindSpeed-LLM 1.0.RC1, 32k",
        source="MindSpeed-LLM 1.0.RC1, examples/mixtral",
        value=487,
        unit=TOKENS,
        hardware="atlas_800t_a2",
        parallel={"dp": 1, "mp": 8, "pp": 4, "ep": 1, "recompute": "full"},
        training={"seq_length": 32768, "global_batch_size": 8, "gradient_accumulation_steps": 8},
        routing={"policy": "dropless"},
        open="recompute, routing, schedule",
        others={
            "MindSpeed-LLM, no recompute": {"parallel": {"recompute": "none"}},
            "MindSpeed-LLM, capacity 1.1": {"routing": CAPACITY},
        },
    ),
    Point(
        name="Megatron-Core 0.9",
        source="Megatron-LM, megatron/core/transformer/moe/README.md",
        value=468,
        unit=TFLOPS,
        hardware="h100",
        parallel={"dp": 8, "pp": 4, "ep": 8, "recompute": "none"},
        training={"seq_length": 4096, "global_batch_size": 256, "gradient_accumulation_steps": 32},
        routing={"policy": "dropless"},
        chunks=8,
        open="cards of the result (the example has 32), batch, recompute",
        others={
            "Megatron-Core, batch 128": {
                "training": {"gradient_accumulation_steps": 16, "global_batch_size": 128}
            },
            "Megatron-Core, selective recompute": {"parallel": {"recompute": "selective"}},
        },
    ),
)


def _flops(run: RunConfig) -> float:
    """Operations of a token, forward and backward, as published figures count them: without
    padding, without what is computed again, with all keys that a query could see.
    """
    costs = layer_costs(run.model, run.training.seq_length)
    return 3 * (sum(costs.layers) + costs.head)
