"""A plain Cell whose feed-forwards become mixtures, with their experts on several processes."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from distributed.worker import Worker
from mindspore import Tensor, nn

from mistral_ms.config import ParallelConfig, RoutingConfig
from mistral_ms.mixtures.moeify import moeify, update_gates
from mistral_ms.mixtures.routed import Spread
from mistral_ms.parallel.context import ParallelContext
from mistral_ms.parallel.dispatchers import make_dispatcher

E, H, T = 4, 8, 12
POLICIES = {
    "dropless": RoutingConfig(),
    # slots for all: a capacity is one of each process's rows
    "capacity": RoutingConfig(policy="capacity", capacity_factor=float(E)),
}


class FeedForward(nn.Cell):
    """H -> 12 -> H, with numbers that are the same everywhere."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = np.random.default_rng(seed)

        def drawn(*shape: int) -> Tensor:
            return Tensor(rng.normal(0, 0.5, shape).astype(np.float32))

        self.up, self.down = (
            nn.Dense(inner, outer, drawn(outer, inner), drawn(outer))
            for inner, outer in ((H, 12), (12, H))
        )

    def construct(self, x):
        return self.down(ms.ops.relu(self.up(x)))


class Net(nn.Cell):
    """Two feed-forwards with residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.CellList([FeedForward(0), FeedForward(1)])

    def construct(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


class Weighted(nn.Cell):
    """<result, dout>, so that the gradient of the result is ``dout``."""

    def __init__(self, net: nn.Cell) -> None:
        super().__init__()
        self.net = net

    def construct(self, x, dout):
        y = self.net(x)
        return (y * dout).sum(), y


def rows() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    return tuple(rng.normal(0, 1, (T, H)).astype(np.float32) for _ in range(2))


def computed(
    policy: str, spread: Spread | None, part: slice = slice(None)
) -> dict[str, np.ndarray]:
    """Result, gradients by name, and what the gates counted."""
    net = Net().set_train()
    gate = {"name": "sigmoid_top_k", "bias_update_rate": 0.1}
    layers = moeify(
        net, E, gate, layers="blocks.*", init="fresh", routing=POLICIES[policy],
        packed=policy == "dropless", spread=spread,
    )  # fmt: skip
    x, dout = (Tensor(each[part]) for each in rows())
    trained = net.trainable_params()
    (_, y), gradients = ms.value_and_grad(Weighted(net), None, trained, has_aux=True)(x, dout)
    found = {"y": y.asnumpy()}
    found |= {p.name: g.asnumpy() for p, g in zip(trained, gradients, strict=True)}
    found |= {f"counts.{name}": counts for name, counts in update_gates(layers).items()}
    biases = (p for p in net.get_parameters() if p.name.endswith("correction_bias"))
    return found | {p.name: p.asnumpy() for p in biases}


def run_moeified(worker: Worker) -> None:
    """Each process has its half of the rows, and its half of the experts."""
    parallel = ParallelConfig(dp=worker.world, ep=worker.world, devices_per_node=worker.world)
    context = ParallelContext(parallel, worker.rank, worker.world)
    spread = Spread(
        dispatcher=lambda experts, routing: make_dispatcher(
            experts, routing, parallel, context.groups
        ),
        held=lambda experts: range(
            worker.rank * experts // worker.world, (worker.rank + 1) * experts // worker.world
        ),
        total=context.sum_over_ranks,
    )
    size = T // worker.world
    for policy in POLICIES:
        part = slice(worker.rank * size, (worker.rank + 1) * size)
        for name, value in computed(policy, spread, part).items():
            worker.keep(f"moeified/{policy}/{name}", value)
