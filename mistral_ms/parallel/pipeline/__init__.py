"""Stages and schedules of the pipeline: arithmetic and a picture, without MindSpore."""

from mistral_ms.parallel.pipeline.checks import check_objective, check_trained
from mistral_ms.parallel.pipeline.costs import LayerCosts, layer_costs
from mistral_ms.parallel.pipeline.holding import held_specs
from mistral_ms.parallel.pipeline.picture import schedule_png
from mistral_ms.parallel.pipeline.program import Transfer, common_order, program
from mistral_ms.parallel.pipeline.schedule import (
    EXPLICIT_BACKWARD,
    Phase,
    Schedule,
    Step,
    in_flight,
    make_schedule,
    stage_order,
)
from mistral_ms.parallel.pipeline.stages import Stage, balance, stages_of

__all__ = [
    "EXPLICIT_BACKWARD",
    "LayerCosts",
    "Phase",
    "Schedule",
    "Stage",
    "Step",
    "Transfer",
    "balance",
    "check_objective",
    "check_trained",
    "common_order",
    "held_specs",
    "in_flight",
    "layer_costs",
    "make_schedule",
    "program",
    "schedule_png",
    "stage_order",
    "stages_of",
]
