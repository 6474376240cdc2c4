"""The decoder and the causal language model on top of it."""

from mistral_ms.models.adapters import insert_adapters
from mistral_ms.models.block import DecoderBlock
from mistral_ms.models.causal_lm import CausalLM, NextTokenLogits, check_weights
from mistral_ms.models.distillation import DistillationObjective
from mistral_ms.models.layer_factory import LayerFactory
from mistral_ms.models.model_chunk import ModelChunk
from mistral_ms.models.objective import LossReport, Objective, tokens_at_a_time
from mistral_ms.models.preference import PreferenceObjective
from mistral_ms.models.recomputation import recompute
from mistral_ms.models.scores import Scores
from mistral_ms.models.shared import share_parameters
from mistral_ms.models.stage_chunks import StageChunks, StageObjectives

__all__ = [
    "CausalLM",
    "DecoderBlock",
    "DistillationObjective",
    "LayerFactory",
    "LossReport",
    "ModelChunk",
    "NextTokenLogits",
    "Objective",
    "PreferenceObjective",
    "Scores",
    "StageChunks",
    "StageObjectives",
    "check_weights",
    "insert_adapters",
    "recompute",
    "share_parameters",
    "tokens_at_a_time",
]
