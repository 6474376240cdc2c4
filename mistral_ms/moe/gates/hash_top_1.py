"""Routing by a hash of the token: nothing is learned."""

from __future__ import annotations

from typing import ClassVar, cast

import mindspore as ms
from mindspore import Tensor, ops
from pydantic import Field

from mistral_ms.config import GateSettings, ModelConfig
from mistral_ms.errors import ConfigError
from mistral_ms.moe.gates.base import Gate, register_gate
from mistral_ms.moe.routing import GateContext, Routing
from mistral_ms.ops import reference
from mistral_ms.weights import ParamSpec

_cast = ops.Cast()


class HashTop1Settings(GateSettings):
    """Settings.

    Attributes:
        hash_seed: of the map from tokens to experts; the layer is part of it, too.
    """

    takes_ids: ClassVar[bool] = True
    name: str = "hash_top_1"
    hash_seed: int = Field(default=0, ge=0, lt=1 << 31)


@register_gate(HashTop1Settings)
class HashTop1(Gate):
    """One expert for each token id, the same wherever it stands, with weight 1 (hash layers,
    arXiv:2106.04426); each layer has a map of its own.

    The expert of id i is floor(E u), with u in (0, 1) from Threefry-2x32 of i under the key (seed,
    layer): even over ids, not over texts, where some ids are frequent. It has no parameters; the
    scores are 1 for the expert and 0 for others, so the router's losses have no gradient.
    """

    @classmethod
    def specs(cls, config: ModelConfig) -> tuple[ParamSpec, ...]:
        """None.

        Raises:
            ConfigError: several experts a token.
        """
        assert config.moe is not None
        if config.moe.num_experts_per_tok != 1:
            raise ConfigError(
                "impossible gate",
                where="model.moe.num_experts_per_tok",
                value=config.moe.num_experts_per_tok,
                rule="hash_top_1 sends a token to one expert",
                todo="set num_experts_per_tok=1",
            )
        return ()

    def construct(
        self, x_TH: Tensor, context: GateContext | None = None, ids_T: Tensor | None = None
    ) -> Routing:
        """See the contract; the ids, which must be there, alone decide."""
        settings = cast(HashTop1Settings, self.moe.gate)
        key = Tensor(settings.hash_seed, ms.int32), Tensor(self.layer, ms.int32)
        drawn_T = reference.uniforms(key, (ids_T, ops.zeros_like(ids_T)))
        # the product may be rounded up to E
        expert_T = ops.minimum(_cast(drawn_T * self.num_experts, ms.int32), self.num_experts - 1)
        scores_TE = ops.one_hot(expert_T, self.num_experts, Tensor(1.0), Tensor(0.0))
        weights_T1 = ops.ones_like(drawn_T).reshape(-1, 1)
        return weights_T1, expert_T.reshape(-1, 1), scores_TE, ops.zeros_like(scores_TE), ()
