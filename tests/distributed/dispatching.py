"""Runs dispatchers and routed regions in the workers."""

from __future__ import annotations

from dataclasses import astuple

import mindspore as ms
import numpy as np
from distributed.cases import (
    CASES,
    GRAPH,
    Batch,
    Case,
    E,
    batch,
    batches,
    expert_weights,
    factor,
    model,
)
from distributed.worker import Worker
from mindspore import Tensor, nn

from mistral_ms.moe import Dispatcher, kept_choices
from mistral_ms.ops.reference import rows_of_groups
from mistral_ms.parallel.collectives import Groups, RecordedGroups
from mistral_ms.parallel.dispatchers import make_dispatcher
from mistral_ms.parallel.experts import routed_experts
from mistral_ms.parallel.topology import Traffic, expert_slice, weight_slice
from mistral_ms.weights import by_name, specs


def total(sent: list[Traffic]) -> np.ndarray:
    """Messages and bytes, inside and between nodes."""
    return np.array([astuple(each) for each in sent]).reshape(-1, 4).sum(0)


class StandIn(nn.Cell):
    """Dispatch, square and scale by expert, combine: all exact to the bit where it is the same.

    Args:
        dispatcher: under test.
        factor_L: float32, of the experts held here, times this rank's share of the sum.
    """

    def __init__(self, dispatcher: Dispatcher, factor_L: np.ndarray) -> None:
        super().__init__()
        self.dispatcher = dispatcher
        self.factor_L1, self.factor_L11 = (
            Tensor(factor_L.reshape(shape)) for shape in ((-1, 1), (-1, 1, 1))
        )

    def construct(self, x_TH, weights_TK, experts_TK, valid_T):
        choice = weights_TK, experts_TK, weights_TK, weights_TK, ()
        plan = self.dispatcher.plan(choice, valid_T)
        rows, group_sizes_L = self.dispatcher.dispatch(x_TH, plan)
        factor = self.factor_L11
        if group_sizes_L is not None:
            inside_LR = ms.ops.cast(rows_of_groups(group_sizes_L, rows.shape[0]), ms.float32)
            factor = (inside_LR * self.factor_L1).sum(0).reshape(-1, 1)
        y = rows * rows * factor
        return self.dispatcher.combine(y, plan), rows, kept_choices(plan)


class Identity(nn.Cell):
    """Dispatch and combine, this rank's share of the identity in between."""

    def __init__(self, dispatcher: Dispatcher, share: float) -> None:
        super().__init__()
        self.dispatcher, self.share = dispatcher, share

    def construct(self, x_TH, weights_TK, experts_TK, valid_T):
        choice = weights_TK, experts_TK, weights_TK, weights_TK, ()
        plan = self.dispatcher.plan(choice, valid_T)
        rows, _ = self.dispatcher.dispatch(x_TH, plan)
        return self.dispatcher.combine(rows * self.share, plan)


class Region(nn.Cell):
    """The routed region of a rank, taking a given choice."""

    def __init__(self, region: nn.Cell) -> None:
        super().__init__()
        self.region = region

    def construct(self, x_TH, weights_TK, experts_TK, valid_T):
        choice = weights_TK, experts_TK, weights_TK, weights_TK, ()
        return self.region(x_TH, choice, valid_T)


class Weighted(nn.Cell):
    """<first result, dout>, so that the gradient of the result is ``dout``; and the results."""

    def __init__(self, net: nn.Cell) -> None:
        super().__init__()
        self.net = net

    def construct(self, dout_TH, x_TH, weights_TK, experts_TK, valid_T):
        results = self.net(x_TH, weights_TK, experts_TK, valid_T)
        return ((results[0] * dout_TH).sum(), *results)


def tensors(one: Batch) -> tuple[Tensor, ...]:
    return Tensor(one.x_TH), Tensor(one.weights_TK), Tensor(one.experts_TK), Tensor(one.valid_T)


def dispatch_all(worker: Worker) -> None:
    """Every case of this world size."""
    for case in CASES[worker.world]:
        groups = Groups(case.topology, worker.rank, "CPU")
        dispatcher = make_dispatcher(E, case.routing, case.parallel, groups)
        part = expert_slice(model(), case.topology, worker.rank)
        stand_in = StandIn(dispatcher, factor(np.array(part.experts)) / np.float32(case.mp))
        for name in batches(case):
            run_stand_in(worker, case, stand_in, batch(name, groups.coords.dp), f"pynative/{name}")
        if case in GRAPH:
            worker.mode("graph")
            one = batch("random", groups.coords.dp)
            run_stand_in(worker, case, stand_in, one, "graph/random")
            worker.mode("pynative")
        one = batch("random", groups.coords.dp)
        full = (Tensor(one.x_TH), Tensor(np.full_like(one.weights_TK, 0.5)), *tensors(one)[2:])
        recorded = RecordedGroups(case.topology, worker.rank, "CPU")
        dispatcher = make_dispatcher(E, case.routing, case.parallel, recorded)
        worker.keep(f"{case.name}/identity", Identity(dispatcher, 1 / case.mp)(*full))
        worker.keep(f"{case.name}/traffic", total(recorded.sent))
        if case.policy != "choice_major":
            region = routed_experts(model(), case.routing, case.parallel, groups)
            held = by_name(specs(model()))
            for name, whole in expert_weights().items():
                path = f"layers.0.moe.experts.{name}"
                cut = weight_slice(held[path], case.topology, worker.rank)
                getattr(region, name).set_data(Tensor(np.ascontiguousarray(whole[cut])))
            run_region(worker, case, Region(region), one)


def run_stand_in(worker: Worker, case: Case, net: StandIn, one: Batch, key: str) -> None:
    gradient = ms.value_and_grad(Weighted(net), (1, 2), has_aux=True)
    values, by_input = gradient(Tensor(one.dout_TH), *tensors(one))
    results = (*values[1:], *by_input)
    for what, value in zip(("combined", "rows", "kept", "dx", "dweights"), results, strict=True):
        worker.keep(f"{case.name}/{key}/{what}", value)


def run_region(worker: Worker, case: Case, net: Region, one: Batch) -> None:
    """Through the experts, with the gradients of their weights."""
    parameters = net.trainable_params()
    gradient = ms.value_and_grad(Weighted(net), (1, 2), parameters, has_aux=True)
    values, (by_input, by_weight) = gradient(Tensor(one.dout_TH), *tensors(one))
    for what, value in zip(("y", "dx", "dweights"), (values[1], *by_input), strict=True):
        worker.keep(f"{case.name}/experts/{what}", value)
    for parameter, value in zip(parameters, by_weight, strict=True):
        worker.keep(f"{case.name}/experts/{parameter.name.rpartition('.')[2]}", value)
