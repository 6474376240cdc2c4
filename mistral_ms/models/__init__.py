"""The decoder and the causal language model on top of it."""

from mistral_ms.models.block import DecoderBlock
from mistral_ms.models.causal_lm import CausalLM, NextTokenLogits, check_weights
from mistral_ms.models.objective import LossReport, Objective, tokens_at_a_time
from mistral_ms.models.parts import Parts
from mistral_ms.models.recomputation import recompute
from mistral_ms.models.scores import Scores
from mistral_ms.models.segment import Segment

__all__ = [
    "CausalLM",
    "DecoderBlock",
    "LossReport",
    "NextTokenLogits",
    "Objective",
    "Parts",
    "Scores",
    "Segment",
    "check_weights",
    "recompute",
    "tokens_at_a_time",
]
