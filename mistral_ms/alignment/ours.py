"""Our side of the comparison: the same prompts, the same places recorded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Tensor, nn

from mistral_ms.alignment.record import Side, Trace
from mistral_ms.checkpoint import open_merged
from mistral_ms.checkpoint.load import kept_quantization, load_weights
from mistral_ms.config import DROPLESS, DType, GenerationConfig, ModelConfig, ParallelConfig
from mistral_ms.inference import load_engine
from mistral_ms.inference.dtypes import check_weights_dtype
from mistral_ms.layers import RotaryTable
from mistral_ms.models import CausalLM
from mistral_ms.ops.modes import pynative_mode
from mistral_ms.parallel.context import ParallelContext


def run_ours(
    path: Path,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    kind: str | None = None,
    parallel_context: ParallelContext | None = None,
    *,
    verify: bool = True,
    follow_links: bool = False,
    adapter: Path | None = None,
    dtype: DType = "float32",
) -> Side:
    """Runs every prompt alone through our model, dropless, in PyNative mode.

    The greedy continuation runs through the engine instead: all prompts in one ragged batch, with
    the cache, compiled, as users generate; by the auto-parallel graph where the layout says so.

    Args:
        path: a checkpoint of any known format.
        prompts: token ids.
        new_tokens: how many tokens to continue greedily.
        kind: which format to take when the directory holds several.
        parallel_context: this process's part of several, which must all call this; every
            data-parallel rank then runs the same prompts.
        verify: compare a checkpoint of ours with its digests while it is read.
        follow_links: links may lead out of the directory; see :func:`open_merged`.
        adapter: directory of an adapter of the checkpoint.
        dtype: of the model.

    Raises:
        GenerationError: the device does not compute in that dtype.
    """
    parallel_context = (
        ParallelContext(ParallelConfig()) if parallel_context is None else parallel_context
    )
    check_weights_dtype(dtype, parallel_context.world)
    side = Side()
    with open_merged(
        path,
        kind,
        adapter=adapter,
        verify=verify,
        follow_links=follow_links,
        rank=parallel_context.rank,
        world=parallel_context.world,
    ) as source:
        kept = kept_quantization(source, dtype, parallel_context.world)
        model = parallel_context.build_model(
            source.config, DROPLESS, dtype, positions=max(map(len, prompts)), quantization=kept
        )
        storage = parallel_context.storage(model.specs) if kept is None else None
        load_weights(source, model.weights(), storage=storage)
    model.set_train(False)
    logits = parallel_context.logits(model, dtype)
    scaling = model.config.rope_scaling
    for prompt in prompts:
        if scaling is not None and scaling.rope_type == "dynamic":
            model.rotary = RotaryTable(model.config, len(prompt))  # depends on the length
        side.traces.append(_trace(model, logits, prompt, parallel_context))
    del model, logits
    if not new_tokens:
        side.greedy.extend([] for _ in prompts)
    else:
        engine = load_engine(
            path,
            batch=len(prompts),
            max_length=max(map(len, prompts)) + new_tokens,
            kind=kind,
            with_tokenizer=False,
            eos_ids=source.config.eos_token_ids,  # the oracle ends by the configuration alone
            verify=False,  # just done
            follow_links=follow_links,
            parallel_context=parallel_context,
            adapter=adapter,
            dtype=dtype,
        )
        out = engine.generate(prompts, GenerationConfig(max_new_tokens=new_tokens))
        side.greedy.extend(list(c.token_ids) for c in out.completions)
    return side


def _trace(
    model: CausalLM, logits: nn.Cell, prompt: Sequence[int], parallel_context: ParallelContext
) -> Trace:
    """One forward pass with every block's parts recorded by hooks, which PyNative mode calls."""
    held: dict[str, np.ndarray] = {}

    def keep(name: str) -> Any:
        def hook(cell: Any, inputs: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            held[name] = value.asnumpy().astype(np.float32)

        return hook

    def keep_experts(name: str) -> Any:
        def hook(cell: Any, inputs: Any, output: Any) -> None:
            held[name] = np.sort(output[1].asnumpy(), -1).astype(np.float32)

        return hook

    handles = []
    if model.model_chunk.embeds:
        handles.append(model.embed_tokens.register_forward_hook(keep("embedding")))
    for number, layer in zip(model.model_chunk.layers, model.layers, strict=True):
        block = layer.moe if layer.sparse else layer.feed_forward
        handles += [
            layer.attention.register_forward_hook(keep(f"layer {number} attention")),
            block.register_forward_hook(keep(f"layer {number} feed-forward")),
            layer.register_forward_hook(keep(f"layer {number}")),
        ]
        if layer.sparse:
            handles.append(layer.moe.router.register_forward_hook(keep_experts(_experts(number))))
    S = len(prompt)
    columns = np.arange(S, dtype=np.int32)
    ids = np.asarray(prompt, np.int32)[None]
    try:
        with pynative_mode():
            found = logits(Tensor(ids), Tensor(columns[None]), Tensor(columns)).asnumpy()
    finally:
        for handle in handles:
            handle.remove()
    config = model.config
    places = _places(config)
    hidden = parallel_context.gather_from_stages(
        held, dict.fromkeys(places, (S, config.hidden_size))
    )
    chosen = dict.fromkeys(map(_experts, config.sparse_layers), (S, _choices(config)))
    experts = parallel_context.gather_from_stages(held, chosen)
    return Trace(
        found,
        hidden,
        {layer: experts[_experts(layer)].astype(np.int32) for layer in config.sparse_layers},
    )


def _places(config: ModelConfig) -> list[str]:
    """All places of the network, in the order of computation."""
    layers = range(config.num_hidden_layers)
    parts = ("{} attention", "{} feed-forward", "{}")
    return ["embedding", *(part.format(f"layer {n}") for n in layers for part in parts)]


def _experts(layer: int) -> str:
    return f"layer {layer} experts"


def _choices(config: ModelConfig) -> int:
    return 0 if config.moe is None else config.moe.num_experts_per_tok
