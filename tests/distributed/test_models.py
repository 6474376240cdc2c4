"""A divided language model computes what the whole one does."""

import functools

import mindspore as ms
import numpy as np
import pytest
from distributed.models import CONFIG, LAYOUTS, SPECS, WIDTH, SumLoss, weights, windows
from mindspore import Tensor, nn
from support.models import fill

from mistral_ms.layers import token_nll
from mistral_ms.models import CausalLM
from mistral_ms.parallel.topology import GroupKind, Topology, gradient_group, weight_slice

RUNS = [(world, name) for world, names in LAYOUTS.items() for name in names]
each_run = pytest.mark.parametrize(("world", "name"), RUNS)


class TokenNLL(nn.Cell):
    def construct(self, logits, labels):
        return token_nll(logits, labels)


@functools.cache
def alone() -> dict[str, np.ndarray]:
    """The global batch in one process."""
    model = fill(CausalLM(CONFIG, positions=WIDTH), weights())
    held = model.weights()
    net = SumLoss(model, TokenNLL())
    loss, gradients = ms.value_and_grad(net, None, list(held.values()))(*map(Tensor, windows()))
    return {"loss": loss.numpy()} | {
        path: g.numpy() for path, g in zip(held, gradients, strict=True)
    }


def topology(world, name):
    return Topology.of(LAYOUTS[world][name], world)


@each_run
def test_the_loss_adds_up_over_the_data_parallel_ranks(report, world, name):
    for group in topology(world, name).groups(GroupKind.DATA):
        parts = [report(world).get(rank, f"model/{name}/loss") for rank in group.ranks]
        # float32 noise of sums in another order
        np.testing.assert_allclose(sum(parts), alone()["loss"], rtol=1e-6)


@each_run
@pytest.mark.parametrize("path", weights())
def test_gradients_add_up_over_their_group(report, world, name, path):
    layout, want = topology(world, name), alone()[path]
    groups = [group.ranks for group in layout.groups(gradient_group(SPECS[path]))]
    if SPECS[path].partial_gradient:  # tensor-parallel ranks have parts of it as well
        groups = [sum(map(tuple, groups), ())]
    for ranks in groups:
        parts = [report(world).get(rank, f"model/{name}/{path}") for rank in ranks]
        cut = weight_slice(SPECS[path], layout, ranks[0])
        # float32 noise of sums in another order, through two layers
        np.testing.assert_allclose(sum(parts), want[cut], rtol=0, atol=5e-6 * np.abs(want).max())
    assert np.abs(want).max() > 1e-3
