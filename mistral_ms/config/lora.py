"""Low-rank adapters (LoRA, arXiv:2106.09685) beside frozen weights; the keys are PEFT's.

A matrix W [O, I] computes with W + s B A, where A [r, I] and B [O, r] are trained and s is
lora_alpha / r, or lora_alpha / sqrt(r) (rank-stabilised, arXiv:2312.03732). With weights decomposed
(DoRA, arXiv:2402.09353) each row of that sum is divided by its length, which counts as a constant
in gradients, and multiplied by a trained magnitude.
"""

from __future__ import annotations

import re

from pydantic import Field, field_validator

from mistral_ms.config.base import Frozen

ALL_LINEAR = "all-linear"
"""Of ``target_modules``: every matrix of the decoder blocks that can be adapted."""

Modules = tuple[str, ...] | str


class LoraConfig(Frozen):
    """Which matrices have adapters, and of what size.

    Attributes:
        r: their rank.
        lora_alpha: what they are multiplied by, see :attr:`scaling`.
        target_modules: which matrices: names of modules as Hugging Face's classes call them, whole
            (``model.layers.0.self_attn.q_proj``) or from a dot on (``q_proj``,
            ``block_sparse_moe.gate``); or one regular expression that matches the whole name; or
            ``all-linear``.
        exclude_modules: likewise, what has none all the same.
        use_rslora: divide by the root of the rank.
        use_dora: weights decomposed into magnitude and direction.
        lora_dropout: share of the adapters' inputs that training sets to zero; only 0 can be
            trained here.
    """

    r: int = Field(default=8, ge=1, le=1 << 14)
    lora_alpha: float = Field(default=8, gt=0, allow_inf_nan=False)
    target_modules: Modules
    exclude_modules: Modules | None = None
    use_rslora: bool = False
    use_dora: bool = False
    lora_dropout: float = Field(default=0.0, ge=0, lt=1)

    @field_validator("target_modules", "exclude_modules")
    @classmethod
    def _names(cls, value: Modules | None) -> Modules | None:
        if isinstance(value, str):
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"is no regular expression: {error}") from None
        if value is not None and (not value or ("" in value and not isinstance(value, str))):
            raise ValueError("must name at least one module")
        return tuple(sorted(set(value))) if isinstance(value, tuple) else value

    @property
    def scaling(self) -> float:
        """s, the factor of B A."""
        return self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)

    def __str__(self) -> str:
        kind = f"{'rs' if self.use_rslora else ''}{'DoRA' if self.use_dora else 'LoRA'}"
        modules = self.target_modules
        names = modules if isinstance(modules, str) else ", ".join(modules)
        return f"{kind}, r {self.r}, alpha {self.lora_alpha:g}, on {names}"

    def targets(self, module: str) -> bool:
        """Whether a module has an adapter, by PEFT's rule.

        Args:
            module: its name in Hugging Face's class.
        """
        if self.exclude_modules is not None and matches(self.exclude_modules, module):
            return False
        return self.target_modules == ALL_LINEAR or matches(self.target_modules, module)


def matches(modules: Modules, name: str) -> bool:
    """Whether names of modules, or a regular expression, mean a module."""
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    return any(name == each or name.endswith(f".{each}") for each in modules)
