"""Cells of the explicit path, built as on rank RANK_ID of Ascend; compiled by the dry run.

Not a test: the process that compiles imports it.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from mindspore.nn.utils import no_init_parameters
from support.configs import model as small_model

from mistral_ms.config import ParallelConfig, RoutingConfig
from mistral_ms.layers import CacheSpec, VocabParallelCrossEntropy
from mistral_ms.models import CausalLM, Objective
from mistral_ms.parallel.collectives import Groups
from mistral_ms.parallel.dispatchers import make_dispatcher
from mistral_ms.parallel.experts import routed_experts
from mistral_ms.parallel.inference import ParallelNextTokenLogits
from mistral_ms.parallel.layer_factory import ParallelLayerFactory
from mistral_ms.parallel.stage import model_chunks_of
from mistral_ms.parallel.topology import GroupKind, Topology

RANK = int(os.environ.get("RANK_ID", "0"))
E, K, H, T = 8, 2, 16, 24
FLAT = ParallelConfig(dp=16, mp=2, ep=8)
LAYOUTS = {
    "flat": FLAT,
    "hierarchical": FLAT.model_copy(update={"all_to_all": "hierarchical"}),
    "group_wise": FLAT.model_copy(update={"group_wise_a2a": True}),
}
ROUTINGS = {
    "capacity": RoutingConfig(policy="capacity", capacity_factor=1.5),
    "dropless": RoutingConfig(),
}
SIZES = dict(
    vocab_size=64, hidden_size=H, intermediate_size=24, num_attention_heads=4, num_key_value_heads=2
)  # fmt: skip
CONFIG = small_model(**SIZES, num_hidden_layers=2, moe={"sparse_layers": (1,)})
STAGED = small_model(**SIZES, num_hidden_layers=4, moe={"sparse_layers": (2,)})
"""A layer for each stage of PIPELINE; the third is sparse."""


class Step(NamedTuple):
    cell: nn.Cell
    inputs: tuple[Tensor, ...]


class Gradients(nn.Cell):
    """Forward and backward."""

    def __init__(self, net: nn.Cell, position: int | None = 0, weights=None) -> None:
        super().__init__()
        self.net = net
        self.both = ms.value_and_grad(net, position, weights)

    def construct(self, *inputs):
        return self.both(*inputs)


class RoundTrip(nn.Cell):
    """There and back, summed up."""

    def __init__(self, dispatcher: nn.Cell) -> None:
        super().__init__()
        self.dispatcher = dispatcher

    def construct(self, x_TH, weights_TK, experts_TK, valid_T):
        plan = self.dispatcher.plan((weights_TK, experts_TK, weights_TK, weights_TK, ()), valid_T)
        rows, _ = self.dispatcher.dispatch(x_TH, plan)
        return self.dispatcher.combine(rows * rows, plan).sum()


class ThroughExperts(nn.Cell):
    """The routed region, summed up."""

    def __init__(self, region: nn.Cell) -> None:
        super().__init__()
        self.region = region

    def construct(self, x_TH, weights_TK, experts_TK, valid_T):
        choice = weights_TK, experts_TK, weights_TK, weights_TK, ()
        return self.region(x_TH, choice, valid_T)[0].sum()


def tokens() -> tuple[Tensor, ...]:
    return (
        Tensor(np.ones((T, H), np.float32)),
        Tensor(np.ones((T, K), np.float32)),
        Tensor(np.zeros((T, K), np.int32)),
        Tensor(np.ones(T, np.float32)),
    )


def dispatcher(way: str, policy: str) -> Step:
    parallel = LAYOUTS[way]
    groups = Groups(Topology.of(parallel), RANK, "Ascend")
    net = RoundTrip(make_dispatcher(E, ROUTINGS[policy], parallel, groups))
    return Step(Gradients(net), tokens())


def flat_capacity() -> Step:
    return dispatcher("flat", "capacity")


def flat_dropless() -> Step:
    """With the experts and their gradients."""
    groups = Groups(Topology.of(FLAT), RANK, "Ascend")
    with no_init_parameters():
        region = routed_experts(CONFIG, ROUTINGS["dropless"], FLAT, groups)
    weights = region.trainable_params()
    return Step(Gradients(ThroughExperts(region), weights=weights), tokens())


def hierarchical_capacity() -> Step:
    return dispatcher("hierarchical", "capacity")


def hierarchical_dropless() -> Step:
    return dispatcher("hierarchical", "dropless")


def group_wise_capacity() -> Step:
    return dispatcher("group_wise", "capacity")


def group_wise_dropless() -> Step:
    return dispatcher("group_wise", "dropless")


class Total(nn.Cell):
    """The loss alone."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.objective = objective

    def construct(self, ids, labels, positions):
        return self.objective(ids, labels, positions)[0]


def language_model() -> Step:
    """A whole divided model with its objective, forward and backward."""
    parallel, routing = LAYOUTS["group_wise"], ROUTINGS["capacity"]
    groups = Groups(Topology.of(parallel), RANK, "Ascend")
    with no_init_parameters():
        model = CausalLM(
            CONFIG, routing, layer_factory=ParallelLayerFactory(CONFIG, routing, parallel, groups)
        )
    nll = VocabParallelCrossEntropy(groups.of(GroupKind.TENSOR), CONFIG.vocab_size)
    objective = Objective(model, router_aux_loss_coef=0.02, router_z_loss_coef=0.001, token_nll=nll)
    ids = Tensor(np.ones((2, T // 2), np.int32))
    weights = list(model.weights().values())
    return Step(Gradients(Total(objective), None, weights), (ids, ids, ids))


class Collective(nn.Cell):
    """One operation of a group, by name."""

    def __init__(self, group, operation: str) -> None:
        super().__init__()
        self.group, self.operation = group, operation

    def construct(self, x):
        if self.operation == "broadcast":
            return self.group.broadcast(x)
        if self.operation == "send_forward":
            return self.group.send_forward(x)
        return self.group.send_backward(x)


PIPELINE = ParallelConfig(pp=4, dp=8, ep=8)


def _between_stages(operation: str) -> Step:
    groups = Groups(Topology.of(PIPELINE), RANK, "Ascend")
    return Step(Collective(groups.neighbours(1), operation), (Tensor(np.ones((T, H), np.float32)),))


def send_forward() -> Step:
    return _between_stages("send_forward")


def send_backward() -> Step:
    return _between_stages("send_backward")


def next_token_logits() -> Step:
    """A stage in the middle, generating: a row of three tokens for each data-parallel rank."""
    groups, rows, width = Groups(Topology.of(PIPELINE), RANK, "Ascend"), PIPELINE.dp, 3
    cache, dropless = CacheSpec(1, width), ROUTINGS["dropless"]
    with no_init_parameters():
        layer_factory = ParallelLayerFactory(STAGED, dropless, PIPELINE, groups, cache=cache)
        (model_chunk,) = model_chunks_of(STAGED, PIPELINE.pp, groups.coords.pp)
        model = CausalLM(
            STAGED, dropless, cache=cache, layer_factory=layer_factory, model_chunk=model_chunk
        )
    ids = Tensor(np.ones((rows, width), np.int32))
    last = Tensor(np.zeros(rows, np.int32))
    return Step(ParallelNextTokenLogits(model, groups), (ids, ids, last))


def broadcast() -> Step:
    groups = Groups(Topology.of(PIPELINE), RANK, "Ascend")
    group = groups.of(GroupKind.DATA)
    return Step(Collective(group, "broadcast"), (Tensor(np.ones((T, H), np.float32)),))
