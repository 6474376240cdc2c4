"""How many positions prompts and new tokens need, and a model has."""

from __future__ import annotations

from collections.abc import Sequence

from mistral_ms.config import GenerationConfig, ModelConfig
from mistral_ms.errors import GenerationError

MOST_SLOTS = 32
"""Prompts that are computed side by side where nobody says how many; more take turns."""


def required_length(
    config: ModelConfig, prompts: Sequence[Sequence[int]], request: GenerationConfig
) -> int:
    """Positions that a request needs: the longest prompt and its new tokens, at most the model's.

    Raises:
        GenerationError: a prompt that is longer than the model's positions.
    """
    for number, prompt in enumerate(prompts):
        check_length(config, len(prompt), f"prompt {number}")
    longest = max(map(len, prompts)) + request.max_new_tokens
    return min(longest, config.longest_sequence)


def check_length(config: ModelConfig, length: int, where: str) -> None:
    """Raises if a model has not so many positions.

    Raises:
        GenerationError: names the place and the rule.
    """
    if length < 1:
        raise GenerationError("no room", where=where, value=length, rule="at least 1 position")
    if length > config.longest_sequence:
        raise GenerationError(
            "longer than the model's positions",
            where=where,
            value=f"{length} tokens",
            rule=config.length_rule,
        )
