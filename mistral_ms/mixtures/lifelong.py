"""Lifelong-MoE (Chen et al. 2023, arXiv:2305.12281): new experts for new data, the old ones kept.

A stage adds experts and their rows of the gate's matrix
(:func:`mistral_ms.mixtures.expand.add_experts`). The old experts and rows are frozen; new ones, and
the layers that all data share, are trained, with a loss that holds the outputs to those of the
model before (:class:`~mistral_ms.models.DistillationObjective`).

Freezing alone does not keep the old function: the softmax is over all experts, so that tokens of
the old data may choose new ones. Two things do:

* ``visible_experts`` routes among the first ones only: computed as by the model before, bit by bit;
* new rows begin *closed*, by a bias that no token overcomes, and open over some updates: at the
  first step the model is the one before.
"""

from __future__ import annotations

from typing import ClassVar, cast

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from pydantic import Field

from mistral_ms.config import GateSettings, ModelConfig, RoutingConfig
from mistral_ms.errors import ConfigError
from mistral_ms.moe import Gate, GateContext, Routing, register_gate, settings_of
from mistral_ms.moe.gates.base import State
from mistral_ms.ops import select
from mistral_ms.weights import ParamSpec

_concat = ops.Concat(-1)

BIAS = "opening_bias"
"""The buffer [E], added to the logits: 0, or below it for experts that are not open yet."""
CLOSED = -60.0
"""Where new experts begin. Next to any other expert's probability theirs is 0 in float32 as long as
logits differ by less than 40."""
NEVER = -1e9
"""Logit of an expert that is not visible: its exponential is 0."""


class StagedTopKSettings(GateSettings):
    """Settings: ``moe.gate: {name: staged_top_k, frozen_experts: 4}``.

    Attributes:
        frozen_experts: the first so many experts, and their rows of the matrix, are not trained.
        visible_experts: tokens choose among the first so many; None: all.
        opening_updates: updates of the weights until an expert that begins closed is open.
    """

    of_training: ClassVar[tuple[str, ...]] = ("frozen_experts", "opening_updates")
    name: str = "staged_top_k"
    frozen_experts: int = Field(default=0, ge=0)
    visible_experts: int | None = Field(default=None, ge=1)
    opening_updates: int = Field(default=50, ge=1)

    @property
    def frozen(self) -> int:
        """See the base."""
        return self.frozen_experts


@register_gate(StagedTopKSettings)
class StagedTopK(Gate):
    """Mixtral's gate over experts that came in stages.

    Frozen rows are without weight decay, as all of the matrix is; the experts themselves freeze in
    :class:`~mistral_ms.moe.Experts`.
    """

    def __init__(
        self, config: ModelConfig, routing: RoutingConfig, layer: int = 0, dtype: str = "float32"
    ) -> None:
        super().__init__(config, routing, layer, dtype)
        settings = cast(StagedTopKSettings, self.moe.gate)
        self.frozen = settings.frozen_experts
        self.visible = settings.visible_experts or self.num_experts
        self.gating_top_k = select.gating_top_k(
            routing.kernels, self.top_k, self.moe.norm_topk_prob
        )

    @classmethod
    def specs(cls, config: ModelConfig) -> tuple[ParamSpec, ...]:
        """The matrix, and the bias as a buffer.

        Raises:
            ConfigError: more frozen or visible experts than there are, or fewer than a token
                visits.
        """
        settings = settings_of(config, StagedTopKSettings)
        assert config.moe is not None
        E, K, H = config.moe.num_local_experts, config.moe.num_experts_per_tok, config.hidden_size
        visible = settings.visible_experts or E
        if settings.frozen_experts > E or not K <= visible <= E:
            raise ConfigError(
                "impossible stages",
                where="model.moe.gate",
                value=f"frozen_experts {settings.frozen_experts}, visible_experts {visible}",
                rule=f"at most the {E} experts; visible are at least the {K} that a token visits",
            )
        std = config.initializer_range
        return (
            ParamSpec(
                "weight",
                ("E", "H"),
                (E, H),
                decay=False,
                std=std,
                frozen_rows=settings.frozen_experts,
            ),
            ParamSpec(BIAS, ("E",), (E,), decay=False, init="zeros", kind="buffer"),
        )

    def route(
        self,
        x_TH: Tensor,
        weights: tuple[Tensor, ...],
        state: tuple[Tensor, ...],
        context: GateContext | None,
    ) -> Routing:
        """See the contract. Old and new rows are multiplied apart, so that what old ones give does
        not depend on how many new ones there are; of invisible experts the scores are 0.
        """
        (weight_EH,), (bias_E,) = weights, state
        old = min(self.frozen, self.visible)
        logits_TE = None
        if old > 0:
            logits_TE = self.logits(x_TH, ops.stop_gradient(weight_EH[:old]))
        if self.visible > old:
            new_TE = self.logits(x_TH, weight_EH[old : self.visible])
            logits_TE = new_TE if logits_TE is None else _concat((logits_TE, new_TE))
        logits_TE = logits_TE + bias_E[: self.visible]
        weights_TK, experts_TK, scores_TE = self.gating_top_k(logits_TE)
        hidden = self.num_experts - self.visible
        if hidden > 0:
            rest = (x_TH.shape[0], hidden)
            scores_TE = _concat((scores_TE, ops.zeros(rest, ms.float32)))
            logits_TE = _concat((logits_TE, ops.fill(ms.float32, rest, NEVER)))
        return weights_TK, experts_TK, scores_TE, logits_TE, ()

    def next_state(self, state: State, routed_E: np.ndarray) -> State:
        """See the contract: closed experts open, whatever is routed."""
        settings = cast(StagedTopKSettings, self.moe.gate)
        step = np.float32(-CLOSED / settings.opening_updates)
        return {BIAS: np.minimum(state[BIAS] + step, 0)}


def visible(config: ModelConfig, experts: int | None) -> ModelConfig:
    """The same model, whose tokens choose among the first ``experts`` only; None: all."""
    settings = settings_of(config, StagedTopKSettings)
    assert config.moe is not None
    gate = settings.model_copy(update={"visible_experts": experts})
    return config.model_copy(update={"moe": config.moe.model_copy(update={"gate": gate})})
