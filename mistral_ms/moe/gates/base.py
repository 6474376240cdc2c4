"""The contract of gates, and their register.

A gate is one file of this package, imported by its ``__init__``: settings, parameters, the choice
of experts and, if it has any, its state and its losses::

    class MySettings(GateSettings):
        name: str = "my_gate"
        temperature: float = Field(default=1.0, gt=0)

    @register_gate(MySettings)
    class MyGate(Gate):
        def route(self, x_TH, weights, state, context): ...

and a model has it by ``moe.gate: {name: my_gate, temperature: 2.0}``. A gate may as well be
registered by any other module that is imported before the configuration is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mistral_ms.config import GateSettings, ModelConfig, RoutingConfig, register_gate_settings
from mistral_ms.config.moe import MOST_EXPERTS, MoEArchitecture
from mistral_ms.errors import ConfigError, WeightError
from mistral_ms.layers.parameter import weight
from mistral_ms.moe.losses import LossTerm, check_own_names, loss_terms
from mistral_ms.moe.routing import GateContext, Routing
from mistral_ms.moe.shared import cmr_loss
from mistral_ms.ops import reference
from mistral_ms.ops.reference_cells import ReferenceLinear
from mistral_ms.weights import (
    ParamSpec,
    Registry,
    gate_matrix,
    register_gate_specs,
    router_specs,
)

_cast = ops.Cast()
_range = ops.Range()
_max_keep = ops.ReduceMax(keep_dims=True)

PRIORITY_DRAWS, MASK_DRAWS, CMR_DRAWS = 0, 4, 5
"""The draws of :meth:`Gate.uniform` that :meth:`Gate.priority`, :meth:`Gate.output_mask` and
:meth:`Gate.share_after_dropout` take by their numbers; those between are of ``noise.py``."""

State = dict[str, np.ndarray]
"""Buffers of a gate by their names within it."""


class Gate(nn.Cell):
    """Which experts a token visits, and with what weight.

    Its parameters are those of :meth:`specs`, by their names; a buffer is float32.

    Args:
        config: sizes, and the gate's settings.
        routing: dtype of the gate's matrix product, and which kernels run.
        layer: number of the decoder block, so that layers draw different random numbers.
        dtype: dtype of the weights.

    Raises:
        ConfigError: experts shall choose by a gate that cannot have that.

    Attributes:
        scores_are_weights: whether an expert's weight, not divided, is its score, so that a token
            may go on to another one (``routing.reroute_rounds``).
        experts_may_choose: whether its scores say all that it has to say, so that experts may
            choose tokens by them and weight them with them (``routing.policy: experts_choose``).
        statistics: names of the terms that :meth:`route` gives beside scores and logits. Their sums
            over tokens reach ``losses``.
        losses: the gate's own losses by name, beside those of every gate; a run gives them
            coefficients in ``training.router_losses``.
    """

    scores_are_weights: ClassVar[bool] = False
    experts_may_choose: ClassVar[bool] = False
    statistics: ClassVar[tuple[str, ...]] = ()
    losses: ClassVar[Mapping[str, LossTerm]] = {}

    def __init__(
        self, config: ModelConfig, routing: RoutingConfig, layer: int = 0, dtype: str = "float32"
    ) -> None:
        super().__init__()
        assert config.moe is not None
        if routing.policy == "experts_choose" and not self.experts_may_choose:
            raise ConfigError(
                "impossible routing",
                where="routing.policy",
                value=f"experts_choose with the gate {config.moe.gate.name}",
                rule="experts choose by a gate's scores alone; this gate has more to say (noise, "
                "a bias, a factor), which would be left out",
                todo="use model.moe.gate=softmax_top_k",
            )
        K, normalize = config.moe.num_experts_per_tok, config.moe.norm_topk_prob
        if routing.reroute_rounds and (not self.scores_are_weights or K > 1 or normalize):
            raise ConfigError(
                "impossible routing",
                where="routing.reroute_rounds",
                value=f"{routing.reroute_rounds} with the gate {config.moe.gate.name}, "
                f"num_experts_per_tok {K}, norm_topk_prob {normalize}",
                rule="a token goes on to another expert by its scores, and is weighted by them",
                todo="use model.moe.gate=switch_top_1",
            )
        self.moe: MoEArchitecture = config.moe
        self.top_k, self.num_experts = config.moe.num_experts_per_tok, config.moe.num_local_experts
        self.layer = layer
        self.takes_ids = config.moe.gate.takes_ids
        self.drop_priority = routing.drop_priority
        self.every_expert = routing.policy == "experts_choose" or routing.reroute_rounds > 0
        self.compute_dtype = getattr(ms, routing.router_dtype)
        self.linear = ReferenceLinear()
        names: dict[bool, list[str]] = {True: [], False: []}
        for spec in router_specs(config):
            buffer = spec.kind == "buffer"
            names[buffer].append(spec.name)
            setattr(self, spec.name, weight(*spec.shape, dtype="float32" if buffer else dtype))
        self.weight_names, self.buffer_names = tuple(names[False]), tuple(names[True])

    @classmethod
    def specs(cls, config: ModelConfig) -> tuple[ParamSpec, ...]:
        """The gate's parameters, under their names within it: one matrix ``weight`` [E, H].

        State that training updates has the kind ``buffer``. Nothing is divided.

        Args:
            config: whose ``moe.gate`` has the gate's settings; what the gate cannot do with them
                is a ConfigError from here.
        """
        return gate_matrix(config)

    def route(
        self,
        x_TH: Tensor,
        weights: tuple[Tensor, ...],
        state: tuple[Tensor, ...],
        context: GateContext | None,
    ) -> Routing:
        """The choice of every token; a function of its arguments and the settings alone.

        Args:
            x_TH: token rows.
            weights: the gate's weights, in the order of :meth:`specs`.
            state: its buffers, likewise.
            context: step and random source; None outside of training.
        """
        raise NotImplementedError

    def route_with_ids(
        self,
        x_TH: Tensor,
        ids_T: Tensor | None,
        weights: tuple[Tensor, ...],
        state: tuple[Tensor, ...],
        context: GateContext | None,
    ) -> Routing:
        """The same with int32 ids, see :func:`~mistral_ms.moe.gate_ids`: what a gate whose settings
        say ``takes_ids`` has in the place of :meth:`route`.
        """
        return self.route(x_TH, weights, state, context)

    def next_state(self, state: State, routed_E: np.ndarray) -> State:
        """The buffers after an update of the weights; unchanged where a gate does not say more.
        Called once for each optimizer step whose gradients are finite, on every process alike.

        Args:
            state: the buffers before it.
            routed_E: float32, choices of each expert of this layer before the capacity, of all
                micro-batches and all processes.
        """
        return state

    def construct(
        self, x_TH: Tensor, context: GateContext | None = None, ids_T: Tensor | None = None
    ) -> Routing:
        """The choice of every token under the gate's own parameters.

        Args:
            x_TH: token rows.
            context: as in :meth:`route`.
            ids_T: int32, the tokens; for gates that take them.
        """
        weights, state = self.weights_and_state()
        return self.route_with_ids(x_TH, ids_T, weights, state, context)

    def weights_and_state(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """The gate's own parameters, as :meth:`route` takes them."""
        weights: tuple[Tensor, ...] = ()
        for name in self.weight_names:
            weights = (*weights, getattr(self, name))
        state: tuple[Tensor, ...] = ()
        for name in self.buffer_names:
            state = (*state, getattr(self, name))
        return weights, state

    def logits(self, x_TH: Tensor, weight_EH: Tensor) -> Tensor:
        """Products in the router's dtype, as float32 [T, E]."""
        product = self.linear(_cast(x_TH, self.compute_dtype), _cast(weight_EH, self.compute_dtype))
        return _cast(product, ms.float32)

    def normal(self, context: GateContext) -> Tensor:
        """Standard normal float32 [T, E], a function of seed, step, layer, index of the token in
        the global batch, and expert; see :mod:`mistral_ms.ops.reference.random`.
        """
        seed, step, token_index_T = context
        first = self.layer * MOST_EXPERTS
        experts_E = _cast(_range(first, first + self.num_experts, 1), ms.int32)
        return reference.normal(
            (seed, step), (token_index_T.reshape(-1, 1), experts_E.reshape(1, -1))
        )

    def uniform(self, context: GateContext, columns: int, draws: int) -> Tensor:
        """Uniform float32 [T, columns] in (0, 1), a function of seed, step, layer, index of the
        token in the global batch, column, and ``draws``: a small number, another one for each
        independent draw of a gate; 0 to 5 are taken.
        """
        seed, step, token_index_T = context
        # no token has a negative index: these counters are not among those of the normal numbers
        purpose = Tensor(-1 - draws, ms.int32), Tensor(self.layer, ms.int32)
        key_0, key_1 = reference.threefry2x32((seed, step), purpose)
        columns_C = _cast(_range(0, columns, 1), ms.int32)
        counter = token_index_T.reshape(-1, 1), columns_C.reshape(1, -1)
        return reference.uniforms((key_0, key_1), counter)

    def priority(self, chosen: Routing, context: GateContext | None) -> Tensor | None:
        """Which choices get a slot first: float32 [T, K], 0 or more; None where
        ``routing.drop_priority`` names an order among tokens and choices, or nothing can be drawn.

        Under ``score`` and ``random`` the largest score of a token, or a uniform number, with one
        more for each later choice that it has: all first choices come before any second one, and
        in float32 what differs by less than 2^-23 K may be one. Under ``probs`` the score of each.

        Args:
            chosen: of every token.
            context: None outside of training.
        """
        _, experts_TK, scores_TE, _, _ = chosen
        if self.drop_priority == "probs":  # what a gate leaves out gets no slot, whatever it has
            there_TK = experts_TK % self.num_experts
            return ops.stop_gradient(ops.gather_elements(scores_TE, 1, there_TK))
        K = experts_TK.shape[-1]
        if self.drop_priority == "score":
            first_T1 = ops.stop_gradient(_max_keep(scores_TE, -1))
        elif self.drop_priority == "random" and context is not None:
            first_T1 = self.uniform(context, 1, PRIORITY_DRAWS)
        else:
            return None
        return first_T1 + _cast(_range(K - 1, -1, -1), ms.float32).reshape(1, K)

    def output_mask(self, chosen: Routing, context: GateContext | None) -> Tensor | None:
        """What the results of the chosen experts are multiplied by: float32 [T, K], where plans
        have every expert [T, E]; None where ``moe.moe_token_dropout`` is 0.

        In training 0 with that probability, else 1; outside of it 1 minus the probability (expert
        output masking, NLLB-MoE, arXiv:2207.04672; fairseq).

        Args:
            chosen: of every token.
            context: None outside of training.
        """
        probability = self.moe.moe_token_dropout
        if probability == 0.0:
            return None
        weights_TK = chosen[2] if self.every_expert else chosen[0]
        if context is None:
            return ops.full_like(weights_TK, 1.0 - probability)
        drawn_TK = self.uniform(context, weights_TK.shape[-1], MASK_DRAWS)
        return _cast(drawn_TK >= probability, ms.float32)

    def share_after_dropout(self, share_T1: Tensor, context: GateContext | None) -> Tensor:
        """The share of the chosen experts in conditional routing, after dropout in training.

        Args:
            share_T1: of every token.
            context: None outside of training.
        """
        probability = self.moe.cmr_gate_drop
        if probability == 0.0 or context is None:
            return share_T1
        kept_T1 = _cast(self.uniform(context, 1, CMR_DRAWS) >= probability, ms.float32)
        return share_T1 * kept_T1 / (1.0 - probability)

    def update(self, routed_E: np.ndarray) -> None:
        """Puts :meth:`next_state` in the place of the state."""
        if not self.buffer_names:
            return
        held = self.buffers()
        state = {name: buffer.asnumpy().copy() for name, buffer in held.items()}
        after = self.next_state(state, routed_E)
        shapes = {name: np.shape(values) for name, values in after.items()}
        wanted = {name: tuple(buffer.shape) for name, buffer in held.items()}
        if shapes != wanted:
            raise WeightError(
                "another state",
                where=f"{type(self).__name__}.next_state",
                value=shapes,
                rule=f"gives every buffer of specs(), with its shape: {wanted}",
            )
        for name, values in after.items():
            ops.assign(held[name], Tensor(np.asarray(values, np.float32)))

    def buffers(self) -> dict[str, Parameter]:
        """The state, by name."""
        return {name: getattr(self, name) for name in self.buffer_names}


_GATES: Registry[type[Gate]] = Registry("gate", "model.moe.gate")
AnyGate = TypeVar("AnyGate", bound=type[Gate])


def register_gate(settings: type[GateSettings]) -> Callable[[AnyGate], AnyGate]:
    """Makes a gate known; decorates its class.

    Args:
        settings: the class of its settings, whose ``name`` is the gate's.

    Raises:
        ValueError: another gate has the name.
        WeightError: likewise.
        ConfigError: one of its losses has the name of a loss that every gate has.
    """

    def register(gate: AnyGate) -> AnyGate:
        name = str(settings.model_fields["name"].default)
        check_own_names(f"{gate.__name__}.losses", gate.losses)
        register_gate_settings(name, settings)
        inherited = gate.specs.__func__ is Gate.specs.__func__  # type: ignore[attr-defined]
        register_gate_specs(name, gate_matrix if inherited else gate.specs)
        _GATES.add(name, gate)
        return gate

    return register


def gate_class(config: ModelConfig) -> type[Gate]:
    """The gate that a model names.

    Raises:
        WeightError: the model is dense, or nobody has registered its gate.
    """
    return _GATES.find(None if config.moe is None else config.moe.gate.name)


def router_loss_terms(config: ModelConfig, further: Sequence[str]) -> tuple[LossTerm, ...]:
    """The losses of a model's router: ``aux``, ``z`` and further ones; none of a dense model.

    Args:
        config: the model.
        further: names as in ``training.router_losses``.

    Raises:
        ConfigError: a further loss of a dense model, or one that is not there with its gate.
    """
    if config.moe is not None:
        own = dict(gate_class(config).losses)
        if config.moe.shared_expert_gate == "cmr":
            own["cmr"] = cmr_loss
        return loss_terms(("aux", "z", *further), own)
    if further:
        raise ConfigError(
            "impossible objective",
            where="training.router_losses",
            value=", ".join(further),
            rule="a dense model has no router",
        )
    return ()


def make_gate(
    config: ModelConfig, routing: RoutingConfig, layer: int = 0, dtype: str = "float32"
) -> Gate:
    """The gate that a model names, its parameters zero; see :class:`Gate` for the arguments."""
    return gate_class(config)(config, routing, layer, dtype)


def settings_of(config: ModelConfig, kind: type[Any]) -> Any:
    """The settings of a model's gate, which must be of this class.

    Raises:
        WeightError: the model is dense or has another gate.
    """
    found = None if config.moe is None else config.moe.gate
    if not isinstance(found, kind):
        raise WeightError(
            "settings of another gate",
            where="model.moe.gate",
            value=type(found).__name__,
            rule=f"must be {kind.__name__}",
        )
    return found
