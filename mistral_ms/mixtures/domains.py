"""Random routed experts (PanGu-Sigma, Ren et al. 2023, arXiv:2303.10845): no gate is learned.

A token's domain names a group of experts; within the group its id names one expert, by a map that
was drawn at random once for each layer and lies in the checkpoint. K = 1, the weight is 1, and
there is no loss of balance. So the tokens of a domain use its group alone, and the group with the
layers that all share is a model of its own: :func:`extract_domain`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import mindspore as ms
from mindspore import Tensor, ops
from pydantic import Field

from mistral_ms.checkpoint import Source
from mistral_ms.config import (
    DROPLESS,
    GateSettings,
    ModelConfig,
    MoEArchitecture,
    RoutingConfig,
)
from mistral_ms.errors import ConfigError
from mistral_ms.layers import output_logits
from mistral_ms.mixtures.rewriting import Part, Rows, rewrite
from mistral_ms.models import CausalLM
from mistral_ms.moe import Gate, GateContext, Routing, register_gate, settings_of
from mistral_ms.weights import ParamSpec, specs

TABLE = "expert_of_token"
"""The buffer [D, V]: which expert of a domain's group computes a token; whole numbers, float32."""
_cast = ops.Cast()
_gather = ops.Gather()


class RandomRoutedSettings(GateSettings):
    """Settings: ``moe.gate: {name: random_routed, domains: 4}``.

    Attributes:
        domains: D, groups of neighbouring experts; divides their number.
        token_counts: a file as the ``data`` command writes it, by which new tables give each expert
            of a group as many tokens; None: as many ids. Not looked at again. In a run file beside
            it.
    """

    takes_ids: ClassVar[bool] = True
    of_training: ClassVar[tuple[str, ...]] = ("token_counts",)
    name: str = "random_routed"
    domains: int = Field(default=1, ge=1)
    token_counts: str | None = None

    @property
    def row_domains(self) -> int:
        """See the base."""
        return self.domains


@register_gate(RandomRoutedSettings)
class RandomRouted(Gate):
    """An expert by the token's domain and id. Of several domains it has to know
    the rows': in training from the data, in a program by :class:`DomainLM`.
    """

    @classmethod
    def specs(cls, config: ModelConfig) -> tuple[ParamSpec, ...]:
        """The table alone.

        Raises:
            ConfigError: several experts a token, or domains that do not divide the experts.
        """
        settings = settings_of(config, RandomRoutedSettings)
        assert config.moe is not None
        E, K, D = config.moe.num_local_experts, config.moe.num_experts_per_tok, settings.domains
        if K != 1 or E % D:
            raise ConfigError(
                "impossible gate",
                where="model.moe",
                value=f"{K} of {E} experts, {D} domains",
                rule="random_routed has one expert a token, and as many experts for each domain",
            )
        shape = (D, config.vocab_size)
        return (
            ParamSpec(
                TABLE,
                ("D", "V"),
                shape,
                decay=False,
                init="balanced",
                levels=E // D,
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
        """See the contract; a token's place in the table, domain * V + id, alone decides."""
        (table_DV,) = state
        group = self.num_experts // cast(RandomRoutedSettings, self.moe.gate).domains
        domain_T = ids_T // table_DV.shape[1]
        local_T = _cast(_gather(table_DV.reshape(-1), ids_T, 0), ms.int32)
        experts_T1 = (domain_T * group + local_T).reshape(-1, 1)
        scores_TE = ops.one_hot(experts_T1[:, 0], self.num_experts, Tensor(1.0), Tensor(0.0))
        none_TE = ops.zeros_like(scores_TE)
        return ops.ones(experts_T1.shape, ms.float32), experts_T1, scores_TE, none_TE, ()


class DomainLM(CausalLM):
    """A causal language model that is told the domain of each row.

    Args:
        config: with the gate ``random_routed``.
        routing: the policy.
        options: as for :class:`~mistral_ms.models.CausalLM`, without a cache: generation takes the
            model of an extracted domain.
    """

    def __init__(
        self, config: ModelConfig, routing: RoutingConfig = DROPLESS, **options: Any
    ) -> None:
        settings_of(config, RandomRoutedSettings)
        super().__init__(config, routing, **options)

    def construct(  # type: ignore[override]
        self, ids_BS: Tensor, positions_BS: Tensor, domain_B: Tensor
    ) -> Tensor:
        """Logits [B, S, V].

        Args:
            ids_BS: int32 tokens.
            positions_BS: int32, -1 for padding.
            domain_B: int32, of each row.
        """
        (B, S), x_TH = ids_BS.shape, self.embed(ids_BS)
        contexts = self.attention_contexts(positions_BS)
        valid_T = _cast(positions_BS.reshape(-1) >= 0, ms.float32)
        place_T = (domain_B.reshape(-1, 1) * self.config.vocab_size + ids_BS).reshape(-1)
        for layer in self.layers:
            x_TH, _ = layer(x_TH, contexts[layer.window], valid_T, None, place_T)
        return output_logits(self.norm(x_TH), self.head_weight()).reshape(B, S, -1)


@dataclass(frozen=True)
class ExtractResult:
    """What was extracted.

    Attributes:
        domain: which one.
        experts: of each sparse layer now; 0: the model is dense.
        bytes: of its tensors.
        source_bytes: of those of the whole model.
    """

    domain: int
    experts: int
    bytes: int
    source_bytes: int

    @property
    def ratio(self) -> float:
        """Size of the extracted model over that of the whole one."""
        return self.bytes / self.source_bytes


def extract_domain(source: Source, dst: Path, domain: int, **options: Any) -> ExtractResult:
    """Writes the model of one domain: its group of experts, its row of the tables, and all else.

    Where a group is one expert the result is a dense model, Mistral's architecture, which every
    command takes; otherwise a model with ``random_routed`` and one domain. On that domain its
    outputs are those of the whole model.

    Args:
        source: an open checkpoint with the gate ``random_routed``.
        dst: the new checkpoint.
        domain: 0 to D - 1.
        options: ``overwrite`` and ``progress``, as of
            :func:`~mistral_ms.mixtures.rewriting.rewrite`.

    Raises:
        ConfigError: another gate, or no such domain.
        CheckpointError: whatever reading and writing raise.
    """
    old = source.config
    if old.moe is None or not isinstance(old.moe.gate, RandomRoutedSettings):
        raise ConfigError(
            "no domains",
            where="model.moe.gate",
            value="dense" if old.moe is None else old.moe.gate.name,
            rule="only experts of random_routed belong to domains",
        )
    D = old.moe.gate.domains
    if not 0 <= domain < D:
        rule = f"there are 0 to {D - 1}"
        raise ConfigError("no such domain", where="domain", value=domain, rule=rule)
    if old.moe.layer_experts is not None:
        raise ConfigError(
            "different numbers of experts",
            where="model.moe.num_local_experts",
            value=list(old.expert_counts),
            rule="a domain has as many experts in each layer",
        )
    group = old.moe.num_local_experts // D
    first = domain * group
    if group == 1:
        _check_alone(old.moe)
        config = old.model_copy(update={"moe": None})
        experts = 0
    else:
        config, experts = _one_domain(old, group), group
    tensors: dict[str, list[Part]] = {}
    for spec in specs(config):
        if ".moe.experts." in spec.name:
            tensors[spec.name] = [Rows(spec.name, first, first + group)]
        elif spec.name.endswith(TABLE):
            tensors[spec.name] = [Rows(spec.name, domain, domain + 1)]
    if config.moe is None:
        for layer in old.sparse_layers:
            for w in ("w1", "w2", "w3"):
                stacked = Rows(f"layers.{layer}.moe.experts.{w}", first, first + 1)
                tensors[f"layers.{layer}.feed_forward.{w}.weight"] = [stacked]
    written = rewrite(source, dst, config, tensors, **options)
    return ExtractResult(domain, experts, written, sum(t.nbytes for t in source.tensors.values()))


def _check_alone(moe: MoEArchitecture) -> None:
    """One expert becomes the only feed-forward of a block."""
    for key, none, others in (
        ("n_shared_experts", 0, "shared experts"),
        ("extra_feed_forward", "none", "second feed-forward"),
    ):
        if (value := getattr(moe, key)) != none:
            raise ConfigError(
                "no dense model",
                where=f"model.moe.{key}",
                value=value,
                rule=f"a domain of one expert becomes a dense model, which has no {others}",
            )


def _one_domain(config: ModelConfig, experts: int) -> ModelConfig:
    assert config.moe is not None
    gate = RandomRoutedSettings(domains=1)
    moe = config.moe.model_copy(update={"num_local_experts": experts, "gate": gate})
    return config.model_copy(update={"moe": moe})
