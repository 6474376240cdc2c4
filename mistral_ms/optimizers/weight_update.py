"""The update of all weights that a process updates, as a part of a graph.

One cell serves all places: the training graph on the device, the graphs of an optimizer on the
host, and the end of the auto-parallel graph. Each call of a kernel updates one whole tensor in
every place, so that they give the same bits: cut into other pieces a kernel's last bit may differ.
"""

from __future__ import annotations

from collections.abc import Mapping

import mindspore as ms
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from mistral_ms.optimizers.plan import Plan
from mistral_ms.optimizers.rule import StoredMatrices

_one = Tensor(1.0, ms.float32)


class WeightUpdate(nn.Cell):
    """Updates weights and their state in place.

    Args:
        weights: float32, by the names of checkpoints; any of the plan's.
        plan: the optimizer.
        on_host: its kernels run on the host's processor and its state stays in the host's memory,
            whatever the device.
        stored: of the weights that are not whole, or do not have a checkpoint's shape, how they
            are kept.

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
        stored: Mapping[str, StoredMatrices | None] | None = None,
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
        of_weights = [self._group_and_form(name, stored or {}) for name in weights]
        used = sorted(set(of_weights), key=of_weights.index)
        self.rule_of = tuple(used.index(each) for each in of_weights)
        groups = [plan.groups[number] for number, _ in used]
        self.rules = nn.CellList(
            [each.rule(plan.settings, each.weight_decay > 0, on_host) for each in groups]
        )
        for rule, (_, form) in zip(self.rules, used, strict=True):
            rule.keep_as(form)
        starts = [sum(plan.counts[:number]) for number, _ in used]
        counts = [plan.counts[number] for number, _ in used]
        self.places = tuple(tuple(range(at, at + n)) for at, n in zip(starts, counts, strict=True))
        self.idle = tuple(each.rule.idle or () for each in groups)
        self.scales = tuple(rule.scales for rule in self.rules)
        self.in_place = tuple(each.rule.idle is not None for each in groups)

    def _group_and_form(
        self, name: str, stored: Mapping[str, StoredMatrices | None]
    ) -> tuple[int, StoredMatrices | None]:
        """What decides which rule updates a weight; one that is elementwise does not care how a
        matrix lies.
        """
        number = self.plan.group_of[name]
        elementwise = self.plan.groups[number].rule.elementwise
        return number, None if elementwise else stored.get(name)

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
            updated = self.rules[number](weight, gradient, held, values[number])
            if not self.in_place[number]:
                new = updated
                updated = (self.keep(weight, new[0], finite),)
                for k in range(len(held)):
                    updated = (*updated, self.keep(held[k], new[k + 1], finite))
            done = (*done, updated)
        return done

    def keep(self, parameter: Parameter, value: Tensor, finite: Tensor | None) -> Tensor:
        """Puts a new value into a parameter."""
        if finite is not None:
            value = ops.select(finite > 0.0, value, parameter)
        return self.assign(parameter, value)

    def state(self) -> dict[str, Parameter]:
        """What is kept of the weights, by the names that checkpoints use."""
        return dict(self._state)
