"""The update of all weights that a process updates, as a part of a graph.

One cell serves all places: the training graph on the device, the graphs of an optimizer on the
host, and the end of the auto-parallel graph. Each call of a kernel updates one whole tensor in
every place, so that they give the same bits: cut into other pieces a kernel's last bit may differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mindspore as ms
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from mistral_ms.optimizers.plan import Plan

_one = Tensor(1.0, ms.float32)


@dataclass(frozen=True)
class StoredMatrices:
    """How a parameter [E * R, C] keeps matrices that are [E, O, I] in checkpoints.

    Attributes:
        rows: R.
        transposed: each matrix [R, C] is the transpose of a checkpoint's [O, I].
    """

    rows: int
    transposed: bool


class WeightUpdate(nn.Cell):
    """Updates weights and their state in place.

    Args:
        weights: float32, by the names of checkpoints; any of the plan's.
        plan: the optimizer.
        on_host: its kernels run on the host's processor and its state stays in the host's memory,
            whatever the device.
        stored: of the weights that do not have a checkpoint's shape, how they are kept.

    Attributes:
        plan: the optimizer.
        names: of the weights.
        weights: what is updated.
    """

    def __init__(
        self,
        weights: Mapping[str, Parameter],
        plan: Plan,
        *,
        on_host: bool = False,
        stored: Mapping[str, StoredMatrices] | None = None,
    ) -> None:
        super().__init__(auto_prefix=False)
        self.plan, self.names = plan, tuple(weights)
        self.weights = ParameterTuple(weights.values())
        self.assign = ops.Assign()
        if on_host:
            self.assign.set_device("CPU")
        self._state: dict[str, Parameter] = {}
        states: list[Parameter] = []
        begins = [0]
        for name, weight in weights.items():
            for kind in plan.state_names(name):
                # a copy of a weight is divided as the weight is
                kept = weight.clone(init="zeros")
                kept.name = f"{kind}.{name}"
                self._state[kept.name] = kept
                states.append(kept)
            begins.append(len(states))
        self.states, self.begins = ParameterTuple(states), tuple(begins)
        used = sorted({plan.group_of[name] for name in weights})
        self.rule_of = tuple(used.index(plan.group_of[name]) for name in weights)
        groups = [plan.groups[number] for number in used]
        self.rules = nn.CellList(
            [each.rule(plan.settings, each.weight_decay > 0, on_host) for each in groups]
        )
        starts = [sum(plan.counts[:number]) for number in used]
        counts = [plan.counts[number] for number in used]
        self.places = tuple(tuple(range(at, at + n)) for at, n in zip(starts, counts, strict=True))
        self.idle = tuple(each.rule.idle or () for each in groups)
        self.scales = tuple(rule.scales for rule in self.rules)
        self.in_place = tuple(each.rule.idle is not None for each in groups)
        # elementwise rules do not care how a matrix lies
        forms = [(stored or {}).get(name) for name in weights]
        whole = [not groups[number].rule.elementwise for number in self.rule_of]
        forms = [form if needed else None for form, needed in zip(forms, whole, strict=True)]
        self.rows = tuple(0 if form is None else form.rows for form in forms)
        self.transposed = tuple(form is not None and form.transposed for form in forms)

    def construct(
        self,
        gradients: tuple[Tensor, ...],
        coefficients: Tensor | tuple[Tensor, ...],
        finite: Tensor | None = None,
        scale: Tensor | None = None,
    ) -> tuple[tuple[Tensor, ...], ...]:
        """Updates all weights and their state.

        Args:
            gradients: float32, one per weight.
            coefficients: of :meth:`~mistral_ms.optimizers.plan.Plan.coefficients`, float32 [n] or
                as many scalars.
            finite: a float32 scalar, one or zero. With zero and with gradients that are zero
                nothing changes; None is one.
            scale: a float32 scalar that all gradients must be multiplied by first; None is one.

        Returns:
            Tensors that are ready when each update is.
        """
        values: tuple[tuple[Tensor, ...], ...] = ()
        for number in range(len(self.rules)):
            own: tuple[Tensor, ...] = ()
            for k in range(len(self.places[number])):
                value = coefficients[self.places[number][k]]
                if finite is not None and self.in_place[number]:
                    value = value * finite + self.idle[number][k] * (1.0 - finite)
                own = (*own, value)
            if self.scales[number]:
                own = (*own, _one if scale is None else scale)
            values = (*values, own)
        # a tuple, one entry a weight: a pipeline's stage drops the entries of the other stages'
        # weights from tuples, but from a chain it would drop everything behind the first of them
        done: tuple[tuple[Tensor, ...], ...] = ()
        for i in range(len(self.weights)):
            number, gradient = self.rule_of[i], gradients[i]
            if scale is not None and not self.scales[number]:
                gradient = gradient * scale
            weight, held = self.weights[i], self.states[self.begins[i] : self.begins[i + 1]]
            if self.in_place[number]:
                updated = self.rules[number](weight, gradient, held, values[number])
            else:
                state: tuple[Tensor, ...] = ()
                for k in range(len(held)):
                    state = (*state, self.as_stored(held[k], i))
                new = self.rules[number](
                    self.as_stored(weight, i),
                    self.as_stored(gradient, i),
                    state,
                    values[number],
                )
                updated = (self.keep(weight, new[0], i, finite),)
                for k in range(len(held)):
                    updated = (*updated, self.keep(held[k], new[k + 1], i, finite))
            done = (*done, updated)
        return done

    def as_stored(self, x: Tensor, i: int) -> Tensor:
        """A tensor of the shape of weight ``i``, of the shape that it has in checkpoints."""
        if self.rows[i] == 0:
            return x
        x = x.reshape(-1, self.rows[i], x.shape[-1])
        return x.transpose(0, 2, 1) if self.transposed[i] else x

    def keep(self, parameter: Parameter, value: Tensor, i: int, finite: Tensor | None) -> Tensor:
        """Puts a new value of the shape that weight ``i`` has in checkpoints into a parameter."""
        if self.rows[i] > 0:
            if self.transposed[i]:
                value = value.transpose(0, 2, 1)
            value = value.reshape(-1, value.shape[-1])
        if finite is not None:
            value = ops.select(finite > 0.0, value, parameter)
        return self.assign(parameter, value)

    def state(self) -> dict[str, Parameter]:
        """What is kept of the weights, by the names that checkpoints use."""
        return dict(self._state)
