"""One update routine for device, host and auto-parallel graph."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor
from support.updates import Ours, start_values, training

from mistral_ms.ops.modes import graph_mode
from mistral_ms.optimizers import StoredMatrices, WeightUpdate

OPTIMIZERS = {
    "adamw": {},
    "sgd": {"name": "sgd", "nesterov": True},
    "muon": {"name": "muon"},
}


def everything(ours):
    held = {**ours.parameters, **ours.update.state()}
    return {name: parameter.asnumpy().copy() for name, parameter in held.items()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_without_finite_gradients_nothing_changes(optimizer):
    """The auto-parallel graph has no branch: it asks for an update that does nothing."""
    ours = Ours(training(optimizer), start_values())
    ours.step(start_values(1), 0, 0.1, graph=False)
    before = everything(ours)
    zeros = tuple(ms.ops.zeros_like(weight) for weight in ours.update.weights)
    coefficients = tuple(Tensor(c) for c in ours.plan.coefficients(1, 0.1))
    for finite, changes in ((0.0, False), (1.0, True)):
        with graph_mode():
            ours.update(ms.mutable(zeros), ms.mutable(coefficients), Tensor(finite, ms.float32))
        after = everything(ours)
        assert any((after[name] != before[name]).any() for name in before) == changes


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_each_weight_is_updated_by_itself(optimizer):
    """Whatever else is updated with it, and on the host: the same bits."""
    start, gradients = start_values(), start_values(1)
    whole = Ours(training(optimizer), start)
    want = whole.step(gradients, 0, 0.1, graph=False)
    for name in start:
        parameter = {name: Parameter(Tensor(start[name].copy()), name=name)}
        alone = WeightUpdate(parameter, whole.plan, on_host=True)
        alone((Tensor(gradients[name]),), Tensor(whole.plan.coefficients(0, 0.1)))
        np.testing.assert_array_equal(parameter[name].asnumpy(), want[name], err_msg=name)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_scales_gradients_before_anything_else(optimizer):
    """By a power of two, so that the bits are those of gradients that were multiplied before."""
    gradients = start_values(1)
    want = Ours(training(optimizer), start_values())
    want.step({name: 0.25 * g for name, g in gradients.items()}, 0, 0.1, graph=False)
    got = Ours(training(optimizer), start_values())
    own = tuple(Tensor(gradients[name]) for name in got.update.names)
    coefficients = Tensor(got.plan.coefficients(0, 0.1))
    got.update(own, coefficients, None, Tensor(0.25, ms.float32))
    for name, value in everything(got).items():
        np.testing.assert_array_equal(value, everything(want)[name], err_msg=name)


@pytest.mark.parametrize("transposed", [False, True])
def test_muon_sees_the_matrices_of_checkpoints(transposed):
    """Kept as [E * R, C], transposed or not: the update is that of [E, O, I]."""
    start, gradients = start_values(), start_values(1)
    config = training({"name": "muon", "adjust_lr": "original"})
    ours = Ours(config, start)
    want = ours.step(gradients, 0, 0.1, graph=False)["stacked"]

    def kept(values):
        values = values.transpose(0, 2, 1) if transposed else values
        return np.ascontiguousarray(values.reshape(-1, values.shape[-1]))

    weight = Parameter(Tensor(kept(start["stacked"])), name="stacked")
    rows = 4 if transposed else 6
    stored = {"stacked": StoredMatrices(rows, transposed)}
    update = WeightUpdate({"stacked": weight}, ours.plan, stored=stored)
    with graph_mode():
        gradient = ms.mutable((Tensor(kept(gradients["stacked"])),))
        update(gradient, Tensor(ours.plan.coefficients(0, 0.1)))
    # compiled and not: the last bits
    np.testing.assert_allclose(weight.asnumpy(), kept(want), rtol=0, atol=1e-6)


class Rows:
    """A group whose members take turns: what each gave in the last round is what all get."""

    def __init__(self, size):
        self.size, self.position, self.given = size, 0, {}

    def all_gather(self, x):
        self.given[self.position] = x
        return ms.ops.stack([self.given.get(member, x) for member in range(self.size)])


@pytest.mark.parametrize(
    ("name", "members"), [("stacked", 3), ("stacked", 6), ("matrix.weight", 7)]
)
def test_muon_brings_rows_of_matrices_together(name, members):
    """Each member's rows are updated as they would be in whole matrices, bit by bit; a member has
    rows of one matrix, or one matrix, or rows of the only one.
    """
    start, gradients = start_values(), start_values(1)
    ours = Ours(training({"name": "muon"}), start)
    want = ours.step(gradients, 0, 0.1, graph=False)[name]
    buffer = ours.update.state()[f"momentum_buffer.{name}"].asnumpy()
    whole, columns = start[name], start[name].shape[-1]
    group = Rows(members)
    stored = {name: StoredMatrices(whole.shape[-2], group=group)}
    coefficients = Tensor(ours.plan.coefficients(0, 0.1))
    for round_number in range(2):  # first they tell each other what they have
        for group.position in range(members):

            def own(values):
                return np.split(values.reshape(-1, columns), members)[group.position].copy()

            weight = Parameter(Tensor(own(whole)), name=name)
            update = WeightUpdate({name: weight}, ours.plan, stored=stored)
            update((Tensor(own(gradients[name])),), coefficients)
            if round_number:
                np.testing.assert_array_equal(weight.asnumpy(), own(want))
                [kept] = update.state().values()
                np.testing.assert_array_equal(kept.asnumpy(), own(buffer))
