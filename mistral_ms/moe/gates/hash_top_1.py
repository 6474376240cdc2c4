"""Routing by the token's id: nothing is learned."""

from __future__ import annotations

from typing import ClassVar, Literal, cast

import mindspore as ms
from mindspore import Tensor, ops
from pydantic import Field, model_validator

from mistral_ms.config import GateSettings, ModelConfig
from mistral_ms.errors import ConfigError
from mistral_ms.moe.gates.base import Gate, register_gate, settings_of
from mistral_ms.moe.routing import GateContext, Routing
from mistral_ms.ops import reference
from mistral_ms.weights import ParamSpec

TABLE = "expert_of_token"
"""The buffer of a stored table."""
_cast = ops.Cast()
_gather = ops.Gather()


class HashTop1Settings(GateSettings):
    """Settings.

    Attributes:
        hash_seed: of the map from tokens to experts; the layer is part of it, too. Of ``hash``
            alone: tables are drawn by the seed of the run.
        table: ``hash``: a function of the id, of which nothing is stored. ``balanced``: a table in
            the checkpoint that gives each expert as many ids. ``frequency``: one that gives each
            expert as many tokens, by ``token_counts``.
        token_counts: the file by which new tables are made, as the ``data`` command writes it; not
            looked at again. In a run file beside it.
    """

    takes_ids: ClassVar[bool] = True
    of_training: ClassVar[tuple[str, ...]] = ("token_counts",)
    name: str = "hash_top_1"
    hash_seed: int = Field(default=0, ge=0, lt=1 << 31)
    table: Literal["hash", "balanced", "frequency"] = "hash"
    token_counts: str | None = None

    @model_validator(mode="after")
    def _one_map(self) -> HashTop1Settings:
        if (self.table == "frequency") != (self.token_counts is not None):
            raise ValueError(
                f"table {self.table} with token_counts {self.token_counts}: the table frequency "
                "is made by token_counts, and no other table is: give both or neither"
            )
        if self.table != "hash" and self.hash_seed:
            raise ValueError(f"hash_seed ({self.hash_seed}) needs table hash, not {self.table}")
        return self


@register_gate(HashTop1Settings)
class HashTop1(Gate):
    """One expert for each token id, the same wherever it stands, with weight 1 (hash layers,
    arXiv:2106.04426); each layer has a map of its own.

    By ``hash`` the expert of id i is floor(E u), with u in (0, 1) from Threefry-2x32 of i under the
    key (seed, layer): even over ids, not over texts, where some ids are frequent. Tables are made
    by :func:`mistral_ms.weights.balanced`. Nothing is learned; the scores are 1 for the expert and
    0 for others, so the router's losses have no gradient.
    """

    @classmethod
    def specs(cls, config: ModelConfig) -> tuple[ParamSpec, ...]:
        """The table ``expert_of_token`` [V], whole numbers in float32; of ``hash`` none.

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
        settings = settings_of(config, HashTop1Settings)
        if settings.table == "hash":
            return ()
        return (
            ParamSpec(
                TABLE,
                ("V",),
                (config.vocab_size,),
                decay=False,
                init="balanced",
                levels=config.moe.num_local_experts,
                token_counts=settings.token_counts,
                kind="buffer",
            ),
        )

    def route_with_ids(
        self,
        x_TH: Tensor,
        ids_T: Tensor | None,
        weights: tuple[Tensor, ...],
        state: tuple[Tensor, ...],
        context: GateContext | None,
    ) -> Routing:
        """See the contract; the ids alone decide."""
        settings = cast(HashTop1Settings, self.moe.gate)
        if settings.table == "hash":
            key = Tensor(settings.hash_seed, ms.int32), Tensor(self.layer, ms.int32)
            drawn_T = reference.uniforms(key, (ids_T, ops.zeros_like(ids_T)))
            # the product may be rounded up to E
            expert_T = ops.minimum(
                _cast(drawn_T * self.num_experts, ms.int32), self.num_experts - 1
            )
        else:
            expert_T = _cast(_gather(state[0], ids_T, 0), ms.int32)
        scores_TE = ops.one_hot(expert_T, self.num_experts, Tensor(1.0), Tensor(0.0))
        weights_T1 = ops.ones((expert_T.shape[0], 1), ms.float32)
        return weights_T1, expert_T.reshape(-1, 1), scores_TE, ops.zeros_like(scores_TE), ()
