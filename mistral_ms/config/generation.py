"""How text is generated: lengths, sampling, where to stop."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, StringConstraints, model_validator

from mistral_ms.config.base import Frozen

LOWEST_TEMPERATURE = 1e-4  # far below any use; float32 logits divided by less could overflow
LEAST_REPETITION_PENALTY = 0.01
LARGEST_REPETITION_PENALTY = 100.0  # both far beyond any use, and safe for logits of float16


class GenerationConfig(Frozen):
    """One generation request; the defaults are greedy decoding.

    Attributes:
        max_new_tokens: the most tokens to generate for each sequence.
        temperature: the logits are divided by it before sampling. 0 means greedy: always the most
            likely token, the smallest id among equals; top_k, top_p and seed then play no part.
        top_k: sample among the so many most likely tokens; 0 means all.
        top_p: sample among the fewest most likely tokens whose probabilities, after temperature
            and top_k, add up to at least this; 1 means all.
        repetition_penalty: logits of tokens that the sequence already holds, the prompt included,
            are divided by it where positive and multiplied where negative (CTRL,
            arXiv:1909.05858, section 4.1). 1 means none; 0.01 to 100. Greedy decoding heeds it too.
        seed: of all random draws; sequence i of a request has its own stream, derived from both.
        top_logprobs: report so many of the most likely tokens in the place of each generated one.
        stop: generation ends where one of these strings first is complete; it is not shown.
    """

    max_new_tokens: int = Field(default=128, ge=1)
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    top_k: int = Field(default=0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    repetition_penalty: float = Field(
        default=1.0,
        ge=LEAST_REPETITION_PENALTY,
        le=LARGEST_REPETITION_PENALTY,
        allow_inf_nan=False,
    )
    seed: int = Field(default=0, ge=0)
    top_logprobs: int = Field(default=0, ge=0)
    stop: tuple[Annotated[str, StringConstraints(min_length=1)], ...] = ()

    @model_validator(mode="after")
    def _temperature_is_usable(self) -> GenerationConfig:
        if 0 < self.temperature < LOWEST_TEMPERATURE:
            raise ValueError(
                f"temperature ({self.temperature}) must be 0 (greedy) or at least "
                f"{LOWEST_TEMPERATURE}"
            )
        return self

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0
