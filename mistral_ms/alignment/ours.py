"""Our side of the comparison: the same prompts, the same places recorded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from mistral_ms.alignment.record import Side, Trace
from mistral_ms.checkpoint import open_checkpoint
from mistral_ms.checkpoint.load import load_weights
from mistral_ms.config import GenerationConfig
from mistral_ms.inference import Engine
from mistral_ms.models import CausalLM


def run_ours(
    path: Path, prompts: Sequence[Sequence[int]], new_tokens: int, kind: str | None = None
) -> Side:
    """Runs every prompt alone through our model, dropless, in float32, in PyNative mode.

    The greedy continuation runs through the engine instead: all prompts in one ragged batch, with
    the cache, compiled, as users generate.

    Args:
        path: a checkpoint of any known format.
        prompts: token ids.
        new_tokens: how many tokens to continue greedily.
        kind: which format to take when the directory holds several.
    """
    side = Side()
    with open_checkpoint(path, kind) as source:
        model = CausalLM(source.config, positions=max(map(len, prompts)))
        load_weights(source, model.weights())
    model.set_train(False)
    for prompt in prompts:
        side.traces.append(_trace(model, prompt))
    del model
    if not new_tokens:
        side.greedy.extend([] for _ in prompts)
    else:
        engine = Engine.load(
            path,
            batch=len(prompts),
            max_length=max(map(len, prompts)) + new_tokens,
            kind=kind,
            with_tokenizer=False,
        )
        out = engine.generate(prompts, GenerationConfig(max_new_tokens=new_tokens))
        side.greedy.extend(list(c.token_ids) for c in out.completions)
    return side


def _trace(model: CausalLM, prompt: Sequence[int]) -> Trace:
    """One forward pass with every block's parts recorded by hooks, which PyNative mode calls."""
    hidden: dict[str, np.ndarray] = {}
    experts: dict[int, np.ndarray] = {}

    def keep(name: str) -> Any:
        def hook(cell: Any, inputs: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            hidden[name] = value.asnumpy().astype(np.float32)

        return hook

    def keep_experts(layer: int) -> Any:
        def hook(cell: Any, inputs: Any, output: Any) -> None:
            experts[layer] = np.sort(output[1].asnumpy(), -1)

        return hook

    handles = [model.embed_tokens.register_forward_hook(keep("embedding"))]
    for number, layer in enumerate(model.layers):
        block = layer.moe if layer.sparse else layer.feed_forward
        handles += [
            layer.attention.register_forward_hook(keep(f"layer {number} attention")),
            block.register_forward_hook(keep(f"layer {number} feed-forward")),
            layer.register_forward_hook(keep(f"layer {number}")),
        ]
        if layer.sparse:
            handles.append(layer.moe.router.register_forward_hook(keep_experts(number)))
    ids = np.asarray(prompt, np.int32)[None]
    positions = np.arange(len(prompt), dtype=np.int32)[None]
    mode = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        logits = model(Tensor(ids), Tensor(positions)).asnumpy()[0]
    finally:
        ms.set_context(mode=mode)
        for handle in handles:
            handle.remove()
    return Trace(logits, hidden, experts)
