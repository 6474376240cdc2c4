"""Which layers of a model are sparse, by the keys of published configurations."""

from __future__ import annotations

from pydantic import Field, model_validator

from mistral_ms.config.base import Frozen


class Placement(Frozen):
    """Layers that are dense, by rule; all others are sparse. Names are Hugging Face's.

    Attributes:
        first_k_dense_replace: the first layers, so many (DeepSeek).
        moe_layer_freq: of the layers by their indices 0, 1, ... those that it does not divide
            (DeepSeek).
        decoder_sparse_step: of the layers by their numbers 1, 2, ... those that it does not divide
            (Qwen): 2 leaves the layers 1, 3, ... sparse.
        mlp_only_layers: the layers of these indices (Qwen).
    """

    first_k_dense_replace: int = Field(default=0, ge=0)
    moe_layer_freq: int = Field(default=1, ge=1)
    decoder_sparse_step: int = Field(default=1, ge=1)
    mlp_only_layers: tuple[int, ...] = ()

    @model_validator(mode="after")
    def _one_period(self) -> Placement:
        if self.moe_layer_freq > 1 and self.decoder_sparse_step > 1:
            raise ValueError(
                f"moe_layer_freq ({self.moe_layer_freq}) and decoder_sparse_step "
                f"({self.decoder_sparse_step}) both say how often a layer is sparse, and count "
                "differently: give one"
            )
        return self

    def is_sparse(self, layer: int) -> bool:
        """Whether the layer of this index, counted from 0, holds experts."""
        return (
            layer >= self.first_k_dense_replace
            and layer % self.moe_layer_freq == 0
            and (layer + 1) % self.decoder_sparse_step == 0
            and layer not in self.mlp_only_layers
        )
