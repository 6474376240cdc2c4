"""Rotary positions stretched to longer contexts: the settings, not the arithmetic.

Names are those of ``rope_scaling`` in Hugging Face's config.json, which transformers 5 keeps in
``rope_parameters``. :mod:`mistral_ms.layers.rope_scaling` computes the frequencies.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from mistral_ms.config.base import Frozen

LARGEST = 1e4
"""No factor comes near; beyond it, or its inverse, the arithmetic would overflow."""

# kind -> the settings that it must have, and those that it may have
SETTINGS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "linear": (frozenset({"factor"}), frozenset({"original_max_position_embeddings"})),
    "dynamic": (frozenset({"factor"}), frozenset({"original_max_position_embeddings"})),
    "yarn": (
        frozenset({"factor"}),
        frozenset(
            {
                "original_max_position_embeddings",
                "attention_factor",
                "beta_fast",
                "beta_slow",
                "mscale",
                "mscale_all_dim",
                "truncate",
            }
        ),
    ),
    "llama3": (
        frozenset(
            {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
        ),
        frozenset(),
    ),
}


class RopeScaling(Frozen):
    """How the rotary frequencies of a model are changed for contexts longer than its first ones.

    A setting that is None has the default of transformers.

    Attributes:
        rope_type: ``linear`` divides every frequency (arXiv:2306.15595); ``dynamic`` raises the
            base with the length of the sequence (NTK-aware); ``yarn`` interpolates by frequency
            and scales the attention (arXiv:2309.00071); ``llama3`` interpolates by wavelength.
        factor: how many times longer contexts become.
        original_max_position_embeddings: the length before; the model's max_position_embeddings
            when None.
        attention_factor: what yarn multiplies cosines and sines by.
        beta_fast: rotations over the original length above which yarn leaves a frequency alone
            (32).
        beta_slow: rotations below which yarn divides it by the factor (1).
        mscale: with ``mscale_all_dim``, of yarn's own attention factor.
        mscale_all_dim: see ``mscale``.
        truncate: yarn rounds the borders of its ramp to whole dimensions (true).
        low_freq_factor: llama3 divides wavelengths longer than original / low by the factor.
        high_freq_factor: llama3 leaves wavelengths shorter than original / high alone.
    """

    rope_type: Literal["linear", "dynamic", "yarn", "llama3"]
    factor: float = Field(ge=1, le=LARGEST)
    original_max_position_embeddings: int | None = Field(default=None, ge=1, le=1 << 31)
    attention_factor: float | None = Field(default=None, ge=1 / LARGEST, le=LARGEST)
    beta_fast: float | None = Field(default=None, ge=1 / LARGEST, le=LARGEST)
    beta_slow: float | None = Field(default=None, ge=1 / LARGEST, le=LARGEST)
    mscale: float | None = Field(default=None, ge=0, le=LARGEST)
    mscale_all_dim: float | None = Field(default=None, ge=0, le=LARGEST)
    truncate: bool | None = None
    low_freq_factor: float | None = Field(default=None, ge=1 / LARGEST, le=LARGEST)
    high_freq_factor: float | None = Field(default=None, ge=1 / LARGEST, le=LARGEST)

    @model_validator(mode="after")
    def _settings_of_its_kind(self) -> RopeScaling:
        given = set(self.settings()) - {"rope_type"}
        required, optional = SETTINGS[self.rope_type]
        if missing := sorted(required - given):
            raise ValueError(f"rope_type {self.rope_type} needs {missing[0]}")
        if foreign := sorted(given - required - optional):
            raise ValueError(
                f"{foreign[0]} is no setting of rope_type {self.rope_type}, which has "
                f"{', '.join(sorted(required | optional))}"
            )
        if self.rope_type == "yarn" and (self.beta_fast or 32) < (self.beta_slow or 1):
            raise ValueError("beta_fast (32 if absent) must not be below beta_slow (1 if absent)")
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and not high > low:
            raise ValueError(f"high_freq_factor ({high:g}) must exceed low_freq_factor ({low:g})")
        return self

    def settings(self) -> dict[str, Any]:
        """What is stated, as ``rope_scaling`` in config.json says it."""
        return self.model_dump(mode="json", exclude_none=True)
