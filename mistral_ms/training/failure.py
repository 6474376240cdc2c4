"""What is written down when a loss is not finite, so that it can be understood and replayed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from mistral_ms.datasets.batches import Batch
from mistral_ms.models import CausalLM
from mistral_ms.training.step import NotFiniteError


def write_failure(path: Path, model: CausalLM, error: NotFiniteError, groups: int | None) -> None:
    """Writes what is known about a failed step as JSON.

    Args:
        path: the file.
        model: with the weights of that step: they were not changed by it.
        error: the failure.
        groups: micro-batches; the forward pass is repeated part by part. None leaves it out: of
            a divided model the other processes would have to take part.
    """
    result = error.result
    report = {
        "step": error.step,
        "error": str(error),
        "samples": error.batch.samples_B.tolist(),
        "loss": result.loss,
        "lm_loss": result.lm_loss,
        "aux_loss": result.aux_loss,
        "z_loss": result.z_loss,
        "grad_norm": result.grad_norm,
        "lr": result.learning_rate,
        "loss_scale": result.loss_scale,
        "layers": [] if groups is None else layer_statistics(model, error.batch, groups),
        "weights": weight_statistics(model, result.gradient_norms),
        "expert_choices": result.routed_LE.tolist(),
    }
    path.write_text(json.dumps(_finite(report), indent=2) + "\n", encoding="utf-8")


def weight_statistics(model: CausalLM, gradient_norms: dict[str, float]) -> list[dict[str, Any]]:
    """For each weight its largest magnitude, elements that are not finite, and gradient norm."""
    found = []
    for name, weight in model.weights().items():
        values = weight.astype(ms.float32).asnumpy()
        norm = gradient_norms.get(name)
        found.append({"name": name, **_describe(values), "gradient_norm": norm})
    return found


def layer_statistics(model: CausalLM, batch: Batch, groups: int) -> list[dict[str, Any]]:
    """The outputs of embedding and blocks in a forward pass over the batch, in PyNative mode."""
    found: dict[str, dict[str, Any]] = {}

    def keep(name: str) -> Any:
        def hook(cell: Any, inputs: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            new = _describe(value.astype(ms.float32).asnumpy())
            old = found.get(name, new | {"not_finite": 0})
            found[name] = {
                "name": name,
                "largest": max(old["largest"], new["largest"]),
                "not_finite": old["not_finite"] + new["not_finite"],
            }

        return hook

    handles = [model.embed_tokens.register_forward_hook(keep("embedding"))]
    for number, layer in enumerate(model.layers):
        handles.append(layer.register_forward_hook(keep(f"layer {number}")))
    mode = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        for part in batch.split(groups):
            arrays = (part.ids_BS, part.positions_BS, part.segments_BS)
            model.hidden_states(*(Tensor(np.ascontiguousarray(array)) for array in arrays))
    finally:
        ms.set_context(mode=mode)
        for handle in handles:
            handle.remove()
    return list(found.values())


def _describe(values: np.ndarray) -> dict[str, Any]:
    finite = np.isfinite(values)
    return {
        "largest": float(np.abs(values[finite]).max(initial=0.0)),
        "not_finite": int(values.size - np.count_nonzero(finite)),
    }


def _finite(value: Any) -> Any:
    """JSON has no NaN: such a number becomes its name."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
