"""Lifelong-MoE (Chen et al. 2023, arXiv:2305.12281): new experts for new data, the old ones kept.

A stage adds experts and their rows of the gate's matrix
(:func:`mistral_ms.mixtures.expand.add_experts`). The old experts and rows are frozen; new ones, and
the layers that all data share, are trained, with a loss that holds the outputs to those of the
model before.

Freezing alone does not keep the old function: the softmax is over all experts, so that tokens of
the old data may choose new ones. Two things do:

* ``visible_experts`` routes among the first ones only: computed as by the model before, bit by bit;
* new rows begin *closed*, by a bias that no token overcomes, and open over some updates: at the
  first step the model is the one before.
"""

from __future__ import annotations

from typing import Any, cast

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops import constexpr
from pydantic import Field

from mistral_ms.config import IGNORE_INDEX, GateSettings, ModelConfig, RoutingConfig
from mistral_ms.errors import ConfigError
from mistral_ms.layers import output_logits
from mistral_ms.models import CausalLM, LayerFactory, Objective
from mistral_ms.moe import (
    Gate,
    GateContext,
    MoELayer,
    RoutedExperts,
    Routing,
    local_dispatcher,
    register_gate,
    settings_of,
)
from mistral_ms.moe.gates.base import State
from mistral_ms.ops import select
from mistral_ms.weights import ParamSpec

_concat = ops.Concat(-1)
_log_softmax = ops.LogSoftmax(-1)
_sum = ops.ReduceSum()
_zeros_like = ops.ZerosLike()

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

    name: str = "staged_top_k"
    frozen_experts: int = Field(default=0, ge=0)
    visible_experts: int | None = Field(default=None, ge=1)
    opening_updates: int = Field(default=50, ge=1)


@register_gate(StagedTopKSettings)
class StagedTopK(Gate):
    """Mixtral's gate over experts that came in stages.

    Frozen rows are without weight decay, as all of the matrix is. Training with frozen experts
    takes :class:`StagedFactory`, which freezes the experts themselves.

    Attributes:
        experts_are_frozen: whoever made the layer sees to them.
    """

    experts_are_frozen: bool = False

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
            ParamSpec("weight", ("E", "H"), (E, H), decay=False, std=std),
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

        Raises:
            ConfigError: training with frozen experts that nobody freezes.
        """
        if context is not None and self.frozen > 0 and not self.experts_are_frozen:
            _refuse(self.frozen)
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


class _KeepGradient(nn.Cell):
    """A stacked weight, unchanged; the gradient of its first experts is zero.

    Args:
        frozen: how many.
    """

    def __init__(self, frozen: int) -> None:
        super().__init__()
        self.frozen = frozen
        self.concat = ops.Concat(0)

    def construct(self, weight_E: Tensor) -> Tensor:
        """[E, ...]."""
        return weight_E

    def bprop(self, weight_E: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        """Of the others alone."""
        return (self.concat((_zeros_like(dout[: self.frozen]), dout[self.frozen :])),)


class StagedExperts(RoutedExperts):
    """Routed experts of which the first ones get no gradient.

    An optimizer leaves them exactly as they are if it has no weight decay for them.

    Args:
        config: sizes, and a gate of this file.
        routing: the policy.
        dtype: dtype of the weights.
    """

    def __init__(self, config: ModelConfig, routing: RoutingConfig, dtype: str) -> None:
        assert config.moe is not None
        dispatcher = local_dispatcher(config.moe.num_local_experts, routing)
        super().__init__(config, dispatcher, dtype=dtype)
        self.held = _KeepGradient(settings_of(config, StagedTopKSettings).frozen_experts)

    def compute(self, rows: Tensor, group_sizes_L: Tensor | None = None) -> Tensor:
        """See :meth:`mistral_ms.moe.Experts.compute`."""
        w1, w2, w3 = self.held(self.w1), self.held(self.w2), self.held(self.w3)
        return self.computed(rows, w1, w3, w2, group_sizes_L)


class StagedFactory(LayerFactory):
    """Makes a model whose old experts stay as they are in training::

    CausalLM(config, routing, layer_factory=StagedFactory(config, routing))
    """

    def moe(self, layer: int) -> nn.Cell:
        """See :class:`~mistral_ms.models.LayerFactory`."""
        experts = StagedExperts(self.config, self.routing, self.dtype)
        made = MoELayer(self.config, self.routing, self.dtype, experts, layer=layer)
        made.router.experts_are_frozen = True
        return made


class LifelongObjective(Objective):
    """The objective, and ``coefficient`` times the distance from the model before: the mean over
    the counted tokens of KL(before || now) of the next-token distributions (learning without
    forgetting, arXiv:1606.09282; the paper's regulariser is of that kind).

    Args:
        model: what is trained.
        before: the model of the stage before; it is not trained.
        coefficient: of the distance.
        options: as for :class:`~mistral_ms.models.Objective`.
    """

    def __init__(
        self, model: CausalLM, before: CausalLM, coefficient: float, **options: Any
    ) -> None:
        super().__init__(model, **options)
        self.before, self.coefficient = before, coefficient
        for parameter in before.get_parameters():
            parameter.requires_grad = False

    def interleaved_part(  # noqa: D102 - see Objective
        self,
        x: Tensor,
        labels_BS: Tensor,
        positions_BS: Tensor,
        segments_BS: Tensor | None,
        inv_counts: Tensor,
        random_B3: Tensor | None,
        number: int,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        total, hidden_TH, parts = super().interleaved_part(
            x, labels_BS, positions_BS, segments_BS, inv_counts, random_B3, number
        )
        ids_BS, positions_BS = self.rows(x, number), self.rows(positions_BS, number)
        segments_BS = None if segments_BS is None else self.rows(segments_BS, number)
        taught_TH, _ = self.before.hidden_states(ids_BS, positions_BS, segments_BS)
        labels_T = self.rows(labels_BS, number).reshape(-1)
        kl_T = divergence(
            output_logits(taught_TH, self.before.head_weight()),
            output_logits(hidden_TH, self.model.head_weight()),
        )
        counted_T = ops.cast(labels_T != IGNORE_INDEX, ms.float32)
        distance = _sum(kl_T * counted_T) * inv_counts[0]
        return total + self.coefficient * distance, hidden_TH, parts


def divergence(before_TV: Tensor, now_TV: Tensor) -> Tensor:
    """KL(softmax(before) || softmax(now)) of each token, float32 [T]; no gradient to ``before``."""
    before = ops.stop_gradient(_log_softmax(before_TV))
    return _sum(ops.exp(before) * (before - _log_softmax(now_TV)), -1)


def visible(config: ModelConfig, experts: int | None) -> ModelConfig:
    """The same model, whose tokens choose among the first ``experts`` only; None: all."""
    settings = settings_of(config, StagedTopKSettings)
    assert config.moe is not None
    gate = settings.model_copy(update={"visible_experts": experts})
    return config.model_copy(update={"moe": config.moe.model_copy(update={"gate": gate})})


@constexpr
def _refuse(frozen: int) -> None:
    """Compiled code may not raise errors of ours; what is computed while compiling may."""
    raise ConfigError(
        "experts would not be frozen",
        where="model.moe.gate.frozen_experts",
        value=frozen,
        rule="the gate freezes its own rows only",
        todo="make the model with mistral_ms.mixtures.lifelong.StagedFactory",
    )
