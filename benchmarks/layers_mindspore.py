"""A sparse layer in MindSpore: ours, MindFormers' MoEV2, the loop over experts, bare products."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from benchmarks.drawn import moe_rows, moe_weights
from benchmarks.peer import Work, repeated
from mistral_ms.config import DROPLESS, ModelConfig, MoEArchitecture, RoutingConfig
from mistral_ms.mixtures.naive import NaiveMoELayer
from mistral_ms.moe import MoELayer

CAPACITY = RoutingConfig(policy="capacity", capacity_factor=1.1)
Case = Mapping[str, Any]


class _Gradient(nn.Cell):
    """Output, and gradients of the input and of all weights for a gradient of the output."""

    def __init__(self, cell: nn.Cell) -> None:
        super().__init__(auto_prefix=False)
        self.cell = cell
        self.weights = ms.ParameterTuple(cell.trainable_params())
        self.grad = ops.GradOperation(get_all=True, get_by_list=True, sens_param=True)

    def construct(self, x_TH: Tensor, dy_TH: Tensor) -> tuple[Any, ...]:
        """(dx,), gradients of the weights."""
        return self.grad(self.cell, self.weights)(x_TH, dy_TH)


class _Ours(nn.Cell):
    """The layer with all tokens valid, and without its statistics."""

    def __init__(self, layer: MoELayer) -> None:
        super().__init__(auto_prefix=False)
        self.layer = layer

    def construct(self, x_TH: Tensor, valid_T: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        return self.layer(x_TH, valid_T)[0]


class _Valid(nn.Cell):
    """A cell whose second input is given."""

    def __init__(self, cell: nn.Cell, tokens: int) -> None:
        super().__init__(auto_prefix=False)
        self.cell, self.valid_T = cell, Tensor(np.ones(tokens, np.float32))

    def construct(self, x_TH: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        return self.cell(x_TH, self.valid_T)


def _frozen(case: Case) -> str:
    """What the layer depends on; the number of tokens does not change it."""
    return json.dumps({key: value for key, value in case.items() if key != "tokens"})


@functools.lru_cache(maxsize=1)  # the last one's memory is free again
def _our_layer(sizes: str, capacity: bool) -> _Ours:
    case = json.loads(sizes)
    moe = MoEArchitecture(num_local_experts=case["experts"], num_experts_per_tok=case["top_k"])
    config = ModelConfig(
        vocab_size=8,
        hidden_size=case["hidden"],
        intermediate_size=case["intermediate"],
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        moe=moe,
    )
    layer, drawn = MoELayer(config, CAPACITY if capacity else DROPLESS), moe_weights(case)
    layer.router.weight.set_data(Tensor(drawn["gate"]))
    for name in ("w1", "w2", "w3"):
        getattr(layer.experts, name).set_data(Tensor(drawn[name]))
    return _Ours(layer)


@functools.lru_cache(maxsize=1)  # the last one's memory is free again
def _mindformers_layer(sizes: str, factor: float) -> nn.Cell:
    """MoEV2 with a product that broadcasts first, as the CPU's kernel does not.

    A factor of -1 gives each expert as many slots as there are tokens: nothing is dropped.
    """
    from mindformers.models.llama.llama_layer import LlamaFeedForward
    from mindformers.modules.transformer.moe import MoEConfig, MoEV2
    from mindformers.modules.transformer.transformer import default_transformer_config

    case = json.loads(sizes)
    E, H, I = case["experts"], case["hidden"], case["intermediate"]  # noqa: E741
    config = MoEConfig(
        expert_num=E,
        capacity_factor=factor,
        num_experts_chosen=case["top_k"],
        routing_policy="TopkRouterV2",
        aux_loss_factor=0.05,
        enable_sdrop=True,
    )
    experts = LlamaFeedForward(
        dim=H, intermediate_size=I, hidden_dim=I, multiple_of=1, expert_num=E,
        compute_dtype=ms.float32, param_init_type=ms.float32, moe_config=config,
        parallel_config=default_transformer_config,
    )  # fmt: skip
    layer = MoEV2(ffn=experts, dim=H, moe_config=config, parallel_config=default_transformer_config)
    for _, cell in layer.cells_and_names():
        if getattr(cell, "expert_flag", False):
            transposed = cell.transpose_b
            del cell.matmul
            cell.matmul = _Product(transposed)
    drawn = moe_weights(case)
    for parameter in layer.get_parameters():
        name = next((w for w in ("w1", "w2", "w3") if f"{w}." in parameter.name), "gate")
        parameter.set_data(Tensor(drawn[name].reshape(parameter.shape)))
    return layer


class _Product(nn.Cell):
    """A batched product [1, E, C, H] by [E, ...]."""

    def __init__(self, transpose_b: bool) -> None:
        super().__init__()
        self.product = ops.BatchMatMul(transpose_b=transpose_b)

    def construct(self, x: Tensor, y: Tensor) -> Tensor:
        """As the product of the name."""
        return self.product(x.reshape(x.shape[-3:]), y).expand_dims(0)


class _SwiGLU(nn.Cell):
    """An expert of the loop."""

    def __init__(self, w1: np.ndarray, w2: np.ndarray, w3: np.ndarray) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = (_dense(w) for w in (w1, w2, w3))

    def construct(self, x: Tensor) -> Tensor:
        """[rows, H] -> [rows, H]."""
        return self.w2(ops.silu(self.w1(x)) * self.w3(x))


def _dense(w: np.ndarray) -> nn.Dense:
    made = nn.Dense(w.shape[1], w.shape[0], has_bias=False, weight_init=Tensor(w))
    return made


@functools.lru_cache(maxsize=1)  # the last one's memory is free again
def _naive_layer(sizes: str) -> nn.Cell:
    case = json.loads(sizes)
    drawn = moe_weights(case)
    experts = [
        _SwiGLU(*(np.ascontiguousarray(drawn[w][e]) for w in ("w1", "w2", "w3")))
        for e in range(case["experts"])
    ]
    return NaiveMoELayer(experts, _dense(drawn["gate"]), case["top_k"])


def _work(cell: nn.Cell, case: Case) -> Work:
    """Forward, and forward with backward; outputs are y, dx and the gradient of the gate."""
    E, H = case["experts"], case["hidden"]
    x_TH, dy_TH = map(Tensor, moe_rows(case))
    gradient = _Gradient(cell)
    y_TH = cell(x_TH).asnumpy().reshape(-1, H)
    (dx_TH,), of_weights = gradient(x_TH, dy_TH)
    (of_gate,) = (
        g.asnumpy()
        for w, g in zip(gradient.weights, of_weights, strict=True)
        if w.shape == (E, H) and "w1" not in w.name
    )
    outputs = {"y": y_TH, "dx": dx_TH.asnumpy().reshape(-1, H), "gate": of_gate}

    def forward() -> None:
        cell(x_TH)
        ms.runtime.synchronize()

    def both() -> None:
        gradient(x_TH, dy_TH)
        ms.runtime.synchronize()

    return _timed(forward, both, outputs)


def _timed(
    forward: Callable[[], None], both: Callable[[], None], outputs: Mapping[str, np.ndarray]
) -> Work:
    first, second = repeated(forward), repeated(both)
    return Work(lambda: {"forward": first(), "forward and backward": second()}, outputs)


def ours(case: Case) -> Work:
    """The layer that models have, compiled; dropless."""
    ms.set_context(mode=ms.GRAPH_MODE)
    return _work(_Valid(_our_layer(_frozen(case), False), case["tokens"]), case)


def ours_with_capacity(case: Case) -> Work:
    """The same with a capacity of 1.1."""
    ms.set_context(mode=ms.GRAPH_MODE)
    return _work(_Valid(_our_layer(_frozen(case), True), case["tokens"]), case)


def _mindformers(case: Case, factor: float) -> Work:
    ms.set_context(mode=ms.GRAPH_MODE)
    layer = _mindformers_layer(_frozen(case), factor)

    class Rows(nn.Cell):
        """[T, H] as the one sequence that MoEV2 wants."""

        def __init__(self) -> None:
            super().__init__(auto_prefix=False)
            self.layer = layer

        def construct(self, x_TH: Tensor) -> Tensor:
            """[T, H] -> [T, H]."""
            return self.layer(x_TH.expand_dims(0)).reshape(x_TH.shape)

    return _work(Rows(), case)


def mindformers(case: Case) -> Work:
    """MindFormers 1.9's MoEV2, compiled, dropping nothing."""
    return _mindformers(case, -1.0)


def mindformers_with_capacity(case: Case) -> Work:
    """The same with a capacity of 1.1, tokens in order."""
    return _mindformers(case, 1.1)


def naive(case: Case) -> Work:
    """The loop over experts, in PyNative: it looks at the choices."""
    ms.set_context(mode=ms.PYNATIVE_MODE)
    ms.runtime.launch_blocking()  # small operators: several times faster
    return _work(_naive_layer(_frozen(case)), case)
