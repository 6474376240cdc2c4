"""The oracle: Hugging Face transformers on torch, in float32, hooks on every layer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mistral_ms.alignment.record import Side, Trace
from mistral_ms.errors import CheckpointError, MissingExtraError


def run_hugging_face(path: Path, prompts: Sequence[Sequence[int]], new_tokens: int) -> Side:
    """Runs every prompt alone, without padding, through the model at ``path``.

    Args:
        path: a directory that ``from_pretrained`` reads; nothing is fetched from a hub.
        prompts: token ids.
        new_tokens: how many tokens to continue greedily.

    Raises:
        MissingExtraError: torch or transformers is not installed.
        CheckpointError: transformers cannot load the directory.
    """
    try:
        import torch
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise MissingExtraError(error.name or "torch", "align", "alignment") from error
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager", local_files_only=True
        )
    except Exception as error:  # transformers raises many kinds
        raise CheckpointError(
            "transformers cannot load it", where=path, value=" ".join(str(error).split())[:300]
        ) from error
    model.eval()
    model.config.output_router_logits = False  # its aux loss fails with a cache
    side = Side()
    with torch.no_grad():
        for prompt in prompts:
            side.traces.append(_trace(model, prompt))
            side.greedy.append(_greedy(model, prompt, new_tokens))
    return side


def _trace(model: Any, prompt: Sequence[int]) -> Trace:
    """One forward pass with every block's parts recorded."""
    import torch

    hidden: dict[str, np.ndarray] = {}
    experts: dict[int, np.ndarray] = {}

    def keep(name: str) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            hidden[name] = value.reshape(len(prompt), -1).float().numpy().copy()

        return hook

    def keep_experts(layer: int, top_k: int) -> Any:
        def hook(module: Any, args: Any, output: Any) -> None:
            chosen = torch.topk(output.float().softmax(-1), top_k, dim=-1).indices
            experts[layer] = np.sort(chosen.numpy(), -1)

        return hook

    handles = [model.model.embed_tokens.register_forward_hook(keep("embedding"))]
    for number, layer in enumerate(model.model.layers):
        sparse = getattr(layer, "block_sparse_moe", None)
        block = layer.mlp if sparse is None else sparse
        handles += [
            layer.self_attn.register_forward_hook(keep(f"layer {number} attention")),
            block.register_forward_hook(keep(f"layer {number} feed-forward")),
            layer.register_forward_hook(keep(f"layer {number}")),
        ]
        if sparse is not None:
            top_k = model.config.num_experts_per_tok
            handles.append(sparse.gate.register_forward_hook(keep_experts(number, top_k)))
    try:
        logits = model(torch.tensor([list(prompt)]), use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return Trace(logits.float().numpy(), hidden, experts)


def _greedy(model: Any, prompt: Sequence[int], new_tokens: int) -> list[int]:
    import torch

    if new_tokens == 0:
        return []
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=0,
        eos_token_id=model.config.eos_token_id,
    )
    return out[0, len(prompt) :].tolist()
