"""Throughput that others have published, and what the planner says of the same trainings.

One point fits the one constant; the others are predictions. What a source leaves open stands beside
its point, with other values that it may have had, and :func:`table` shows how all predictions
depend on it and on numbers of the hardware that nobody has measured.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mistral_ms.config import RunConfig
from mistral_ms.config.base import validate
from mistral_ms.parallel.pipeline import layer_costs
from mistral_ms.planner.hardware import Cluster, Hardware, load_hardware
from mistral_ms.planner.load import Loads, zipf
from mistral_ms.planner.program import OURS, Program
from mistral_ms.planner.search import judge
from mistral_ms.planner.sensitivity import scaled

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
        program: what its sparse layers do otherwise than ours.
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
    program: Program = OURS
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

    def predicted(
        self,
        name: str | None = None,
        *,
        hardware: Hardware | None = None,
        slowdown: float | None = None,
        loads: tuple[Loads, ...] = (),
    ) -> float:
        """What the planner says, in the point's unit.

        Args:
            name: of other values of what is open; None: those that are assumed.
            hardware: another than the point's.
            slowdown: another constant than the hardware's.
            loads: of the experts; none: even.
        """
        run = self.run(name)
        kind = load_hardware(self.hardware) if hardware is None else hardware
        judged = judge(
            run,
            Cluster.of(kind, run.parallel.world),
            loads=loads,
            program=self.program,
            slowdown=slowdown,
        )
        rate = judged.tokens_per_s_per_card
        return rate if self.unit == TOKENS else rate * _flops(run) / 1e12

    def error(self, name: str | None = None) -> float:
        """The prediction's, as a share of the published value."""
        return self.predicted(name) / self.value - 1


TOKENS, TFLOPS = "tokens/s per card", "TFLOP/s per card"
CAPACITY = {"policy": "capacity", "capacity_factor": 1.1}
BATCH_OF_128 = {"seq_length": 4096, "global_batch_size": 128, "gradient_accumulation_steps": 16}
MODELLINK = Program(one_hot_dispatch=True, gathers_for_each_matrix=True)
"""MindSpeed, mindspeed/moe/moe_layer.py and ModelLink, modellink/model/moe.py of May 2024, without
``--enable-token-rearrange-opt``, which the scripts do not give."""
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
"""Fits ``compute.slowdown`` of the files of hardware."""
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
        open="pp, micro-batches, batch, sequence, recompute, capacity, optimizer, program",
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
            "course, optimizer on the host": {"training": {"offload_optimizer": "host"}},
        },
    ),
    Point(
        name="ModelLink, 32 cards, 32k",
        source="ModelLink 4a683f8 (2024-05-17), examples/mixtral: README.md and "
        "pretrain_mixtral_8x7b_ptd.sh; MindSpeed-LLM 1.0.RC1",
        value=487,
        unit=TOKENS,
        hardware="atlas_800t_a2",
        parallel={"dp": 1, "mp": 8, "pp": 4, "ep": 1, "recompute": "full"},
        training={"seq_length": 32768, "global_batch_size": 8, "gradient_accumulation_steps": 8},
        routing=CAPACITY,
        program=MODELLINK,
        open="the variant of the chip; operators are launched one by one",
    ),
    Point(
        name="ModelLink, 16 cards, 4k",
        source="ModelLink ce01706 (2024-03-29), examples/mixtral: README.md and "
        "pretrain_mixtral_8x7b_ptd.sh",
        value=1053.6,
        unit=TOKENS,
        hardware="atlas_800t_a2",
        parallel={"dp": 2, "pp": 8, "ep": 2, "recompute": "full", "optimizer_parallel": False},
        training={**BATCH_OF_128, "gradient_accumulation_steps": 64},
        routing=CAPACITY,
        program=MODELLINK,
        open="the variant of the chip; operators are launched one by one",
    ),
    Point(
        name="Megatron-Core 0.9",
        source="Megatron-LM, megatron/core/transformer/moe/README.md",
        value=468,
        unit=TFLOPS,
        hardware="h100",
        parallel={"dp": 8, "pp": 4, "ep": 8, "pp_interleave_num": 8, "recompute": "none"},
        training={"seq_length": 4096, "global_batch_size": 256, "gradient_accumulation_steps": 32},
        routing={"policy": "dropless"},
        open="cards of the result (the example has 32), batch, recompute",
        others={
            "Megatron-Core, batch 128": {
                "training": {"gradient_accumulation_steps": 16, "global_batch_size": 128}
            },
            "Megatron-Core, selective recompute": {"parallel": {"recompute": "selective"}},
        },
    ),
)
POINTS = (FITTED, *PREDICTED)


@dataclass(frozen=True)
class Row:
    """All points under one assumption.

    Attributes:
        name: of what is assumed otherwise.
        slowdown: the constant that then meets the fitted point.
        errors: of the predictions, in the order of :data:`PREDICTED`.
    """

    name: str
    slowdown: float
    errors: tuple[float, ...]


def fitted(hardware: Hardware, name: str | None = None) -> float:
    """The constant that meets the fitted point.

    A step's seconds grow with it, linearly as long as the same events are on the critical path: a
    few secants meet it.

    Args:
        hardware: of the point.
        name: other values of what the point leaves open.
    """

    def too_slow(slowdown: float) -> float:
        predicted = FITTED.predicted(name, hardware=hardware, slowdown=slowdown)
        return FITTED.value / predicted - 1

    before, now = 1.0, hardware.compute.slowdown
    error = too_slow(before)
    while abs(now - before) > 1e-4:
        last, error_now = now, too_slow(now)
        now -= error_now * (now - before) / (error_now - error)
        before, error = last, error_now
    return now


_CHIP, _BACKWARD, _CURVE = "compute.peak_tflops", "compute.attention_backward", "compute.efficiency"


def table() -> Iterator[Row]:
    """What each prediction becomes under other assumptions, the constant fitted again each time.

    Numbers of the hardware are changed on all Ascend points alike, and on H100 by the same factor;
    what does not belong to a point leaves it as the constant alone changes it.
    """
    yield _row("as assumed", {})
    yield _row("910B3 (313 TFLOP/s)", {_CHIP: 313 / 353.9}, gpu=False)
    yield _row("910B1 (400 TFLOP/s)", {_CHIP: 400 / 353.9}, gpu=False)
    for by, text in ((1 / 1.5, "divided by 1.5"), (1.5, "times 1.5")):
        yield _row(f"gradient of attention {text}", {_BACKWARD: by})
        yield _row(f"network in a node {text}", {"inside.efficiency": by})
        yield _row(f"memory bandwidth {text}", {"compute.memory_gb_per_s": by})
    yield _row("products of short axes divided by 1.5", {_CURVE: 1 / 1.5})
    yield _row("latency in a node times 10", {"inside.latency_us": 10})
    yield _row("MindFormers without recompute", {}, name="MindFormers, no recompute")
    yield _row("loads of experts Zipf 0.3", {}, loads=(zipf(8, 0.3),))


def _row(
    title: str,
    changes: Mapping[str, float],
    *,
    gpu: bool = True,
    name: str | None = None,
    loads: tuple[Loads, ...] = (),
) -> Row:
    kinds = {kind: load_hardware(kind) for kind in {point.hardware for point in POINTS}}
    for kind, hardware in kinds.items():
        if gpu or hardware.device == "Ascend":
            for key, by in changes.items():
                hardware = _short_axes(hardware, by) if key == _CURVE else scaled(hardware, key, by)
            kinds[kind] = hardware
    slowdown = fitted(kinds[FITTED.hardware], name)
    return Row(
        title,
        slowdown,
        tuple(
            point.predicted(hardware=kinds[point.hardware], slowdown=slowdown, loads=loads)
            / point.value
            - 1
            for point in PREDICTED
        ),
    )


def _short_axes(hardware: Hardware, by: float) -> Hardware:
    """Another curve, whose last point stays: it alone is measured."""
    *short, last = hardware.compute.efficiency
    curve = (*((length, share * by) for length, share in short), last)
    compute = hardware.compute.model_copy(update={"efficiency": curve})
    return hardware.model_copy(update={"compute": compute})


def _flops(run: RunConfig) -> float:
    """Operations of a token, forward and backward, as published figures count them: without
    padding, without what is computed again, with all keys that a query could see.
    """
    costs = layer_costs(run.model, run.training.seq_length)
    return 3 * (sum(costs.layers) + costs.head)
