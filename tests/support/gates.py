"""Gates in training, and sparse layers whose gate is not the usual one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from mistral_ms.config import ModelConfig, MoEArchitecture
from mistral_ms.moe import GateContext, gate_context
from support.moe import moe_config

COLUMNS = 8


def context(
    tokens: int, seed: int = 5, step: int = 3, rows: Iterable[int] | None = None
) -> GateContext:
    """Of tokens in rows of eight, the first rows of the batch if none are named."""
    rows = range(tokens // COLUMNS) if rows is None else rows
    return gate_context(Tensor(np.array([[seed, step, row] for row in rows], np.int32)), COLUMNS)


def gated(
    gate: Any,
    K: int,
    normalize: bool,
    H: int = 6,
    I: int = 10,  # noqa: E741
    E: int = 7,
) -> ModelConfig:
    """A model with this gate."""
    moe = MoEArchitecture(
        num_local_experts=E, num_experts_per_tok=K, norm_topk_prob=normalize, gate=gate
    )
    return moe_config(H=H, I=I, E=E).model_copy(update={"moe": moe})


def results_and_gradients(
    layer: nn.Cell, x: np.ndarray, dout: np.ndarray, given: GateContext | None = None
) -> tuple[np.ndarray, Any, dict[str, np.ndarray]]:
    """Of a sparse layer: its output, its sums, and d <output, dout> by name, the input's as x."""
    valid = Tensor(np.ones(len(x), np.float32))
    parameters = layer.trainable_params()

    def product(x_TH: Tensor) -> Any:
        y_TH, sums = layer(x_TH, valid, given)
        return (y_TH * Tensor(dout)).sum(), y_TH, sums

    gradient = ms.value_and_grad(product, 0, parameters, has_aux=True)
    (_, y_TH, sums), (dx, by_weight) = gradient(Tensor(x))
    names = {id(p): n for n, p in layer.parameters_and_names()}
    found = {names[id(p)]: g.numpy() for p, g in zip(parameters, by_weight, strict=True)}
    return y_TH.numpy(), sums, {"x": dx.numpy(), **found}


def torch_gradients(leaf: Any, gate: Any, experts: Any) -> dict[str, np.ndarray]:
    """After a backward pass, by our names; zero for an expert that computed nothing.

    Args:
        leaf: the input.
        gate: the gate's matrix.
        experts: Mixtral's experts.
    """
    found = {"x": leaf.grad.numpy(), "router.weight": gate.grad.numpy()}
    for name in ("w1", "w2", "w3"):
        matrices = [getattr(expert, name).weight for expert in experts]
        found[f"experts.{name}"] = np.stack(
            [np.zeros(m.shape, np.float32) if m.grad is None else m.grad.numpy() for m in matrices]
        )
    return found
