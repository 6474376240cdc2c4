"""A sparse layer whose experts are any Cells: what :func:`~mistral_ms.mixtures.moeify` puts in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mistral_ms.config import DROPLESS, RoutingConfig
from mistral_ms.errors import ConfigError
from mistral_ms.moe import (
    Dispatcher,
    Gate,
    PackedDispatcher,
    PaddedDispatcher,
    Routing,
    kept_choices,
    loss_terms,
    router_sums,
    stack_sums,
)

_cast = ops.Cast()
_range = ops.Range()
_concat = ops.Concat(0)
_ones_like = ops.OnesLike()

AnyGate: TypeAlias = Callable[[Tensor], tuple[Tensor, ...]]
"""A gate by the simplest contract: rows [T, H] -> float32 weights [T, K], int32 experts [T, K]."""


@dataclass(frozen=True)
class Spread:
    """Experts of a layer on several processes, of which each routes rows of its own.

    :func:`~mistral_ms.parallel.dispatchers.make_dispatcher` makes dispatchers that travel;
    :meth:`~mistral_ms.parallel.context.ParallelContext.sum_over_ranks` is such a ``total``.

    Attributes:
        dispatcher: of E experts and a policy; brings rows to the experts of all processes.
        held: of E experts those that this process holds.
        total: the sum of a float32 array over all processes; all must ask.
    """

    dispatcher: Callable[[int, RoutingConfig], Dispatcher]
    held: Callable[[int], range]
    total: Callable[[np.ndarray], np.ndarray]


class RoutedFeedForward(nn.Cell):
    """A gate and E experts, each a Cell [rows, H] -> [rows, O].

    Rows are dispatched, not masked: an expert computes the rows that chose it. Two ways:

    * *packed*: exactly those rows. Their number differs from call to call, so this is for PyNative;
      an expert without rows is not called.
    * *padded*: C rows for each expert, empty ones zero. Shapes are static, so this compiles; under
      ``dropless`` C = T, as many as there are tokens. Experts must treat rows one by one (a batch
      norm would see the empty ones).

    In training the layer counts what it routes and, with ``losses``, adds the gradients of the
    router's losses in the backward pass, times their coefficients: the loss that is printed does
    not contain them, and a loss scale does not reach them.

    Args:
        experts: E Cells, of whatever classes and sizes.
        gate: a :class:`~mistral_ms.moe.Gate`, or anything else that is called with rows, see
            :data:`AnyGate`; it may also give all of a :data:`~mistral_ms.moe.Routing`.
        routing: the policy: ``dropless`` or ``capacity``.
        packed: which way; packed needs ``dropless``.
        losses: coefficients of the router's losses by name, as in ``training.router_losses``, and
            ``aux`` and ``z``.
        seed: of the noise of gates that have any.
        eval_routing: the policy outside of training; None: the same.
        spread: where experts are on several processes: ``experts`` are all of them, of which the
            layer keeps those that are held here; None: all are here. Gradients of experts are
            then those of all processes' rows, those of the gate of this one's.

    Raises:
        ConfigError: no expert; a policy that is not possible; losses of a gate that gives no
            scores.
    """

    def __init__(
        self,
        experts: Sequence[nn.Cell],
        gate: AnyGate | nn.Cell,
        routing: RoutingConfig = DROPLESS,
        packed: bool = True,
        losses: Mapping[str, float] | None = None,
        seed: int = 0,
        eval_routing: RoutingConfig | None = None,
        spread: Spread | None = None,
    ) -> None:
        super().__init__()
        E = len(experts)
        outside = routing if eval_routing is None else eval_routing
        if E == 0:
            raise ConfigError("no experts", where="experts", rule="a layer has at least one")
        policies = (routing.policy, outside.policy)
        if "experts_choose" in policies:
            raise ConfigError(
                "impossible routing",
                where="routing.policy",
                value="experts_choose",
                rule="tokens choose their experts here: dropless or capacity",
            )
        if policies == ("capacity", "capacity") and outside.drop_priority != routing.drop_priority:
            raise ConfigError(
                "two orders",
                where="eval_routing.drop_priority",
                value=outside.drop_priority,
                rule=f"a gate has one order of its choices; in training {routing.drop_priority}",
            )
        if packed and "capacity" in policies:
            raise ConfigError(
                "impossible routing",
                where="packed",
                value="with the policy capacity",
                rule="a capacity gives every expert as many rows",
                todo="set packed=False",
            )
        self.routing = routing
        self.num_experts, self.spread, self.packed = E, spread, packed
        held = range(E) if spread is None else spread.held(E)
        self.experts = nn.CellList([experts[e] for e in held])
        self.gate: Any = gate
        self.has_context = isinstance(gate, Gate)
        dispatcher: Callable[[int, RoutingConfig], Dispatcher]
        dispatcher = PackedDispatcher if packed else PaddedDispatcher
        dispatcher = dispatcher if spread is None else spread.dispatcher
        self.dispatcher = dispatcher(E, routing)
        if spread is not None and self.dispatcher.packed != packed:
            raise ConfigError(
                "impossible spread",
                where="packed",
                value=packed,
                rule=f"rows travel {'packed' if self.dispatcher.packed else 'padded'} under the "
                f"policy {routing.policy}; packed ones are for PyNative",
                todo="use the policy capacity where the model is compiled",
            )
        self.eval_dispatcher = self.dispatcher if outside == routing else dispatcher(E, outside)
        self.terms, self.coefficients = _losses(gate, losses or {})
        self.inject = _AddGradient()
        self.seed = Tensor(seed, ms.int32)
        self.step = Parameter(Tensor(0, ms.int32), name="step", requires_grad=False)
        zeros = Tensor(np.zeros(E, np.float32))
        self.routed_E = Parameter(zeros, name="routed_E", requires_grad=False)

    def construct(self, x: Tensor) -> Tensor:
        """[..., H] -> [..., O]."""
        x_TH = x.reshape(-1, x.shape[-1])
        T, columns = x_TH.shape[0], x.shape[-2]
        valid_T = ops.ones((T,), ms.float32)
        routing, priority_TK = self.route(x_TH)
        dispatcher = self.dispatcher if self.training else self.eval_dispatcher
        plan = dispatcher.plan(routing, valid_T, priority_TK, columns)
        rows, group_sizes_E = dispatcher.dispatch(x_TH, plan)
        y = self.packed_rows(rows, group_sizes_E) if self.packed else self.padded_rows(rows)
        y_TO = dispatcher.combine(y, plan)
        if self.training and len(routing) == 5:
            sums = router_sums(routing, kept_choices(plan), valid_T, self.routing, columns)
            y_TO = ops.depend(y_TO, ops.assign_add(self.routed_E, sums[1]))
            for i in range(len(self.terms)):
                loss = self.terms[i](stack_sums((sums,)), False)
                y_TO = self.inject(y_TO, loss * self.coefficients[i])
        return y_TO.reshape(*x.shape[:-1], y_TO.shape[-1])

    def route(self, x_TH: Tensor) -> tuple[Routing, Tensor | None]:
        """What the gate says, weights and experts alone where it says no more; and which choices
        get a slot first, see :meth:`~mistral_ms.moe.Gate.priority`.
        """
        if not self.has_context:
            found = self.gate(x_TH)
            if len(found) == 2:
                return self.without_scores(found[0], found[1]), None
            return found, None
        if not self.training:
            routing = self.gate(x_TH, None)
            return routing, self.gate.priority(routing, None)
        index_T = _cast(_range(0, x_TH.shape[0], 1), ms.int32)
        step = self.step + 0  # read before the count below
        context = self.seed, step, index_T
        routing = self.gate(x_TH, context)
        priority_TK = self.gate.priority(routing, context)
        counted = ops.assign_add(self.step, Tensor(1, ms.int32))
        return (ops.depend(routing[0], counted), *routing[1:]), priority_TK

    def without_scores(self, weights_TK: Tensor, experts_TK: Tensor) -> Routing:
        """A routing whose scores and logits nobody reads."""
        none_TE = ops.zeros((experts_TK.shape[0], self.num_experts), ms.float32)
        return weights_TK, experts_TK, none_TE, none_TE, ()

    def packed_rows(self, rows_RH: Tensor, group_sizes_E: Tensor) -> Tensor:
        """Each expert's own rows, one expert after the other."""
        start, found = 0, []
        for expert, size in zip(self.experts, group_sizes_E.asnumpy().tolist(), strict=True):
            if size:
                found.append(expert(rows_RH[start : start + size]))
                start += size
        if start < rows_RH.shape[0]:  # choices that a gate left out: nobody reads these rows
            width = found[0].shape[-1] if found else rows_RH.shape[-1]
            found.append(ops.zeros((rows_RH.shape[0] - start, width), rows_RH.dtype))
        return _concat(found) if len(found) > 1 else found[0]

    def padded_rows(self, rows_ECH: Tensor) -> Tensor:
        """[E, C, H] -> [E, C, O]."""
        found: tuple[Tensor, ...] = ()
        for e in range(len(self.experts)):
            found = (*found, self.experts[e](rows_ECH[e]))
        return ops.stack(found)

    def update_gate(self) -> np.ndarray:
        """To be called after an update of the weights: moves the gate's state on, if it has any.

        Returns:
            Choices of each expert since the last call, float32 [E], in training; of all processes.
        """
        routed_E = self.routed_E.asnumpy().copy()
        if self.spread is not None:
            routed_E = self.spread.total(routed_E)
        if isinstance(self.gate, Gate):
            self.gate.update(routed_E)
        ops.assign(self.routed_E, Tensor(np.zeros_like(routed_E)))
        return routed_E


class _AddGradient(nn.Cell):
    """y, unchanged; going back, the second argument gets the gradient 1."""

    def construct(self, y_TO: Tensor, loss: Tensor) -> Tensor:
        """[T, O]."""
        return y_TO

    def bprop(self, y_TO: Tensor, loss: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
        """The loss adds itself to whatever is differentiated."""
        return dout, _ones_like(loss)


def _losses(gate: Any, losses: Mapping[str, float]) -> tuple[tuple[Any, ...], tuple[float, ...]]:
    if losses and not isinstance(gate, Gate):
        raise ConfigError(
            "impossible losses",
            where="losses",
            value=", ".join(losses),
            rule="they are made of a gate's scores, which a plain callable does not give",
            todo="use a registered gate",
        )
    own = gate.losses if isinstance(gate, Gate) else {}
    return loss_terms(tuple(losses), own), tuple(losses.values())
