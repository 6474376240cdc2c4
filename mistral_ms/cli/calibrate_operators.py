"""What one process of a calibration measures: operators as a step of the explicit way has them.

Everything runs as compiled cells, forward and gradient, through the operators that models take
here, and all processes measure the same at the same time. ``ms.jit`` or single calls would measure
something else: their caller waits in a loop that takes a core away from the kernels.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from mistral_ms.cli.calibrate import LENGTHS, MESSAGES
from mistral_ms.config import ModelConfig, MoEArchitecture, RoutingConfig, TrainingConfig
from mistral_ms.config.layout import Sizes
from mistral_ms.layers import RMSNorm
from mistral_ms.layers.loss import TokenNLL
from mistral_ms.moe import MoELayer, RoutedExperts
from mistral_ms.moe.dispatcher import local_dispatcher
from mistral_ms.ops import reference, select, select_cpu
from mistral_ms.ops.modes import graph_mode
from mistral_ms.optimizers import make_plan, with_settings
from mistral_ms.parallel.collectives import Collectives, Groups
from mistral_ms.parallel.memory import FLOAT
from mistral_ms.parallel.topology import GroupKind, Topology
from mistral_ms.planner.work import accumulated_bytes, update_bytes
from mistral_ms.training.graphs import AccumulatedOptimizerStep, OptimizerStep, gradient_sums
from mistral_ms.training.optimizer import DeviceOptimizer
from mistral_ms.weights import specs

LONG = 1024
"""Axes of the products that are measured, but the shortest one."""
EXPERTS, CHOICES = 8, 2
"""As of Mixtral."""
WIDTH, HEADS, HEAD = 512, 8, 64
"""Hidden size, query heads, and their size."""
SEQUENCES, LENGTH = 2, 256
"""Of the tokens that pass through what is no product."""
VOCABULARY = 4096
SECONDS, REPEATED = 0.5, 5
"""How long an operation is repeated; how often a graph of exchanges is."""
CHAIN = 8
"""Exchanges of a graph."""


class _Gradients(nn.Cell):
    """Gradients of a cell by its inputs and weights, given that of its results, which come last;
    what the forward pass computes for its results alone is left out.
    """

    def __init__(self, cell: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.cell = cell
        self.held = ParameterTuple(cell.trainable_params())
        self.gradient = ops.GradOperation(get_all=True, get_by_list=True, sens_param=True)

    def construct(self, *inputs: Any) -> Any:
        return self.gradient(self.cell, self.held)(*inputs)


class _Done(nn.Cell):
    """A scalar that is ready when a cell's results are. They stay in the graph's own memory, as
    those of a step's operators do; what is handed out is allocated anew each time.
    """

    def __init__(self, cell: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.cell = cell

    def construct(self, start: Tensor, *inputs: Any) -> Tensor:
        return ops.depend(start, self.cell(*inputs))


class _Products(nn.Cell):
    """Products and their gradients, one after the other: beside single ones the start of a graph
    would be measured.
    """

    def __init__(self, product: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.product = product
        self.gradient = ops.GradOperation(get_all=True, sens_param=True)

    def construct(self, *tensors: Tensor) -> Any:
        # side by side: tensors in a tuple would be constants, and equal products computed once
        found: tuple[Any, ...] = ()
        for i in range(0, len(tensors), 3):
            x, weight, dout = tensors[i], tensors[i + 1], tensors[i + 2]
            found = (*found, self.product(x, weight))
            found = (*found, *self.gradient(self.product)(x, weight, dout))
        return found


class _LossAndGradients(nn.Cell):
    """A scalar cell and its gradients by its first ``count`` inputs and its weights."""

    def __init__(self, cell: nn.Cell, count: int) -> None:
        super().__init__(auto_prefix=False)
        held = ParameterTuple(cell.trainable_params())
        places = tuple(range(count))
        self.both = ms.value_and_grad(cell, places, held if len(held) else None)

    def construct(self, *inputs: Any) -> Any:
        return self.both(*inputs)


class _Dense(nn.Cell):
    """A linear map as layers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.product = select_cpu.linear(select.dense_kernels())

    def construct(self, x_TI: Tensor, w_OI: Tensor) -> Tensor:
        return self.product(x_TI, w_OI)


class _Stacked(nn.Cell):
    """Experts of padded rows, see ``moe.experts``."""

    def construct(self, x_ECI: Tensor, w_EOI: Tensor) -> Tensor:
        return reference.batched_linear(x_ECI, w_EOI)


class _Attention(nn.Cell):
    """The sum of what attention gives."""

    def construct(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        return reference.attention(q, k, v, visible).sum()


class _Returned(RoutedExperts):
    """Rows that go to experts and come back as they were."""

    def compute(self, rows: Tensor, group_sizes_L: Tensor | None = None) -> Tensor:
        return rows


class _Beside(nn.Cell):
    """A sparse block without its products, attention and experts."""

    def __init__(self) -> None:
        super().__init__()
        model, routing = _model(), RoutingConfig(policy="capacity", aux_loss="per_layer")
        experts = _Returned(model, local_dispatcher(EXPERTS, routing))
        self.first, self.second = (RMSNorm(WIDTH, 1e-5, "float32") for _ in range(2))
        self.moe = MoELayer(model, routing, "float32", experts)

    def construct(self, x: Tensor, q: Tensor, k: Tensor, valid: Tensor, tables: Any) -> Tensor:
        cos, sin = tables
        rotated = reference.rotate(q, cos, sin).sum() + reference.rotate(k, cos, sin).sum()
        x = x + self.first(x)
        y, _ = self.moe(self.second(x), valid)
        return (x + y).sum() + rotated


class _Gated(nn.Cell):
    """SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.swiglu = select.swiglu(select.dense_kernels())

    def construct(self, gate: Tensor, up: Tensor) -> Tensor:
        return self.swiglu(gate, up)


class _Loss(nn.Cell):
    """Of logits."""

    def __init__(self) -> None:
        super().__init__()
        self.nll = TokenNLL()

    def construct(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.nll(logits, labels)[0].sum()


class _Added(nn.Cell):
    """Gradients of a micro-batch, added to the sums."""

    def __init__(self, sums: ParameterTuple) -> None:
        super().__init__(auto_prefix=False)
        self.sums = sums

    def construct(self, gradients: tuple[Tensor, ...], start: Tensor) -> Tensor:
        done = start
        for i in range(len(self.sums)):
            done = ops.depend(done, ops.assign_add(self.sums[i], gradients[i]))
        return done


class _Reduced(nn.Cell):
    """Messages of the explicit way, one after the other."""

    def __init__(self, group: Collectives, times: int = 1) -> None:
        super().__init__(auto_prefix=False)
        self.group, self.times = group, times

    def construct(self, x: Tensor) -> Tensor:
        for _ in range(self.times):
            x = self.group.all_reduce(x)
        return x


class Clock:
    """Times operations that all processes begin together.

    Args:
        everyone: all processes; None: this one is alone.
    """

    def __init__(self, everyone: Collectives | None) -> None:
        self.meet = None if everyone is None else _Reduced(everyone)

    def wait(self, value: float = 0.0) -> float:
        """Until all are here; the sum of all their values."""
        if self.meet is None:
            return value
        return float(self.meet(Tensor([value], ms.float32)).asnumpy()[0])

    def seconds(self, cell: nn.Cell, *inputs: Any, times: int | None = None) -> float:
        """Of one execution, the median of repetitions.

        What exchanges must be repeated equally often everywhere: ``times``.
        """
        return self.prepared(cell, *inputs)(times)

    def prepared(self, cell: nn.Cell, *inputs: Any) -> Callable[[int | None], float]:
        """The same, compiled, for whoever calls it with ``times``."""
        done, start = _Done(cell), Tensor(0.0, ms.float32)
        _once(done, start, *inputs)
        self.wait()
        return lambda times: _median(done, start, *inputs, times=times)


def _median(operation: nn.Cell, *inputs: Any, times: int | None) -> float:
    first = _once(operation, *inputs)
    if times is None:
        times = max(3, min(200, math.ceil(SECONDS / max(first, 1e-6))))
    return statistics.median(_once(operation, *inputs) for _ in range(times))


def _once(operation: nn.Cell, *inputs: Any) -> float:
    begun = time.perf_counter()
    operation(*inputs)
    ms.runtime.synchronize()
    return time.perf_counter() - begun


def measure(processes: int) -> dict[str, Any]:
    """One process's part: rates in float32.

    Args:
        processes: in all; MindSpore knows its own number.

    Returns:
        What :func:`mistral_ms.cli.calibrate.hardware_of` takes.
    """
    if ms.get_context("device_target") != "CPU":
        ms.set_device("CPU")
    ms.runtime.launch_blocking()
    rank, everyone = 0, None
    if processes > 1:
        from mindspore.communication import get_rank, init

        init()
        rank = get_rank()
        topology = Topology(Sizes(processes, 1, 1, 1), processes)
        everyone = Groups(topology, rank).of(GroupKind.WORLD)
    clock = Clock(everyone)
    with graph_mode():
        found: dict[str, Any] = {"products": [_products(clock, length) for length in LENGTHS]}
        found["attention"] = _attention(clock)
        found["beside"] = _beside(clock)
        found["stream"] = _update(clock)
        if everyone is not None:
            found["alone"] = _alone(clock, rank)
            found["messages"] = []
            for nbytes in MESSAGES:
                zeros = Tensor(np.zeros(nbytes // FLOAT, np.float32))  # sums stay finite
                taken = clock.seconds(_Reduced(everyone, CHAIN), zeros, times=REPEATED)
                found["messages"].append(taken / CHAIN)
    return found


def _numbers(*shape: int) -> Tensor:
    return Tensor(np.random.default_rng(0).standard_normal(shape, np.float32))


def _products(clock: Clock, length: int) -> float:
    """FLOP/s of products whose shortest axis has this length, dense ones and experts', with their
    gradients: the short axis is once that of the rows, once the inner one and once an outer one.
    """
    operations = seconds = 0.0
    dense, stacked = _Dense(), _Stacked()
    few, many = (max(1, min(8, most // length)) for most in (LONG // 8, LONG))
    shapes: list[tuple[nn.Cell, tuple[int, ...], int, int, int]] = [
        (dense, (length,), LONG, LONG, many),
        (dense, (LONG,), length, LONG, many),
        (dense, (LONG,), LONG, length, many),
        (stacked, (EXPERTS, length), LONG // 2, LONG, few),
    ]
    for cell, rows, inner, outer, count in shapes:
        each = rows[:-1]
        sizes = ((*rows, inner), (*each, outer, inner), (*rows, outer))
        tensors = [_numbers(*size) for _ in range(count) for size in sizes]
        seconds += clock.seconds(_Products(cell), *tensors) / count
        operations += 3 * 2.0 * math.prod(rows) * inner * outer
    return operations / seconds


def _attention(clock: Clock) -> list[float]:
    """FLOP/s forward and of the gradient, as plans count them: of half of the keys."""
    B, S, N, G, D = SEQUENCES, LENGTH, HEADS, HEADS // 4, HEAD
    q, k, v = _numbers(B, S, N, D), _numbers(B, G, S, D), _numbers(B, G, S, D)
    visible = Tensor(np.tril(np.ones((1, 1, S, S), bool)).repeat(B, 0))
    ahead = clock.seconds(_Attention(), q, k, v, visible)
    both = clock.seconds(_LossAndGradients(_Attention(), 3), q, k, v, visible)
    operations = 4.0 * B * S * S / 2 * N * D
    return [operations / ahead, 2.5 * operations / max(both - ahead, ahead / 2)]


def _model(vocabulary: int = 2 * EXPERTS, width: int = 1) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 4,
        moe=MoEArchitecture(num_local_experts=EXPERTS, num_experts_per_tok=CHOICES),
    )


def _beside(clock: Clock) -> float:
    """Bytes/s of what is neither product nor attention, bytes as plans count them: each operation
    reads its inputs and writes its result once, and its gradient moves twice as many.
    """
    T, H, V = SEQUENCES * LENGTH, WIDTH, VOCABULARY
    R, I, P = T * CHOICES, 7 * H // 2, HEADS * HEAD  # noqa: E741
    G = HEADS // 4
    tables = tuple(_numbers(SEQUENCES, LENGTH, 1, HEAD // 2) for _ in range(2))
    q, k = (_numbers(SEQUENCES, LENGTH, heads, HEAD) for heads in (HEADS, G))
    block = _LossAndGradients(_Beside(), 3)
    valid = Tensor(np.ones(T, np.float32))
    gated, gate = _Gated(), _numbers(R, I)
    loss, labels = _LossAndGradients(_Loss(), 1), Tensor(np.arange(T, dtype=np.int32) % V)
    seconds = (
        clock.seconds(block, _numbers(T, H), q, k, valid, tables)
        + clock.seconds(gated, gate, gate)
        + clock.seconds(_Gradients(gated), gate, gate, gate)
        + clock.seconds(loss, _numbers(T, V), labels)
    )
    moved = 10 * T * H + 2 * T * (P + G * HEAD)  # norms and residuals, rotations
    moved += T * H + 2 * (T * H + R * H)  # router's states, dispatch, combine
    moved += 3 * R * I + 3 * T * V
    return 3.0 * moved * FLOAT / seconds


def _update(clock: Clock) -> float:
    """Bytes/s of adding gradients up and of an update, its norm and cleared sums included."""
    config = with_settings(TrainingConfig(max_steps=1, seq_length=1, global_batch_size=1))
    model = _model(VOCABULARY, 2 * WIDTH)
    held = [spec for spec in specs(model) if spec.kind == "trained"]
    weights = {s.name: Parameter(ms.ops.zeros(s.shape, ms.float32), name=s.name) for s in held}
    plan = make_plan(config, specs(model))
    sums = gradient_sums(weights)
    step = OptimizerStep(DeviceOptimizer(weights, plan), config.max_grad_norm)
    update = AccumulatedOptimizerStep(sums, step)
    coefficients = Tensor(plan.coefficients(0, 1e-3))
    scales = Tensor(np.ones(3, np.float32))
    gradients = tuple(ms.ops.zeros(s.shape, ms.float32) for s in held)
    total = Tensor(1.0, ms.float32)
    seconds = clock.seconds(_Added(sums), gradients, total)
    seconds += clock.seconds(update, total, scales, coefficients)
    elements = sum(math.prod(spec.shape) for spec in held)
    return (accumulated_bytes(elements) + update_bytes(elements, "CPU", 2)) / seconds


def _alone(clock: Clock, rank: int) -> float:
    """How many times as fast a process computes while all others wait."""
    x, weight = _numbers(EXPERTS, LONG // 4, LONG // 2), _numbers(EXPERTS, LONG, LONG // 2)
    measure = clock.prepared(_Stacked(), x, weight)
    together = measure(None)
    clock.wait()
    times = together / measure(None) if rank == 0 else 0.0
    return clock.wait(times)
