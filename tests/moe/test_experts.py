"""Stacked experts: each slice is one feed-forward."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn
from support.moe import moe_config
from support.routing import silu

from mistral_ms.config import DROPLESS
from mistral_ms.mixtures.lifelong import StagedTopKSettings
from mistral_ms.moe import Experts, RoutedExperts, local_dispatcher
from mistral_ms.ops.modes import graph_mode, pynative_mode


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_every_expert_computes_its_own_feed_forward(packed):
    experts = Experts(moe_config(H=6, I=10, E=3), packed=packed)
    rng = np.random.default_rng(0)
    weights = {}
    for name, parameter in experts.parameters_and_names():
        weights[name] = rng.normal(0, 0.5, parameter.shape)
        parameter.set_data(Tensor(weights[name].astype(np.float32)))
    assert {n: w.shape for n, w in weights.items()} == {
        "w1": (3, 10, 6),
        "w2": (3, 6, 10),
        "w3": (3, 10, 6),
    }
    x = rng.normal(size=(3, 5, 6)).astype(np.float32)
    if packed:
        sizes = Tensor(np.full(3, 5, np.int32))
        got = experts.compute(Tensor(x.reshape(15, 6)), sizes).numpy().reshape(3, 5, 6)
    else:
        got = experts.compute(Tensor(x)).numpy()
    for e in range(3):
        for c in range(5):
            hidden = silu(weights["w1"][e] @ x[e, c]) * (weights["w3"][e] @ x[e, c])
            # float32 sums of ten products of size 1
            np.testing.assert_allclose(got[e, c], weights["w2"][e] @ hidden, atol=1e-5)


@pytest.mark.parametrize("local", [1, 2])
def test_a_process_can_hold_only_some(local):
    config = moe_config(E=4)
    routed = RoutedExperts(config, local_dispatcher(4, DROPLESS), local_experts=local)
    assert {p.shape[0] for p in routed.get_parameters()} == {local}


class Squared(nn.Cell):
    """The sum of the squares of what experts give."""

    def __init__(self, experts: Experts, group_sizes_L: Tensor | None) -> None:
        super().__init__()
        self.experts, self.group_sizes_L = experts, group_sizes_L

    def construct(self, rows):
        return (self.experts.compute(rows, self.group_sizes_L) ** 2).sum()


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_frozen_experts_compute_what_others_do(packed):
    """Compiled as not compiled: w1 and w3 have one shape, and are two weights. The gradient of the
    rows is the same, that of frozen experts is zero.
    """
    rng, found = np.random.default_rng(0), []
    rows = rng.normal(size=(15, 6) if packed else (3, 5, 6)).astype(np.float32)
    sizes = Tensor(np.full(3, 5, np.int32)) if packed else None
    shapes = {"w1": (3, 10, 6), "w2": (3, 6, 10), "w3": (3, 10, 6)}
    weights = {name: rng.normal(0, 0.5, shape) for name, shape in shapes.items()}
    for frozen, mode in ((0, pynative_mode), (2, pynative_mode), (2, graph_mode)):
        config = moe_config(H=6, I=10, E=3)
        gate = StagedTopKSettings(frozen_experts=frozen)
        moe = config.moe.model_copy(update={"gate": gate})
        experts = Experts(config.model_copy(update={"moe": moe}), packed=packed)
        for name, parameter in experts.parameters_and_names():
            parameter.set_data(Tensor(weights[name].astype(np.float32)))
        gradient = ms.value_and_grad(Squared(experts, sizes), 0, experts.trainable_params())
        with mode():
            loss, (by_rows, by_weight) = gradient(Tensor(rows))
        assert all(not g.asnumpy()[:frozen].any() for g in by_weight)
        found.append([loss.asnumpy(), by_rows.asnumpy(), *(g.asnumpy()[2:] for g in by_weight)])
    for other in found[1:]:
        for got, want in zip(other, found[0], strict=True):
            # float32 sums in another order
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
