"""The oracle: Hugging Face transformers on torch, hooks on every layer."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from mistral_ms.alignment.record import Rivals, Side, Trace
from mistral_ms.checkpoint.adapters import PEFT, PEFT_FUSED, open_adapter, write_peft
from mistral_ms.checkpoint.config_file import read_config
from mistral_ms.errors import CheckpointError, MissingExtraError, MistralMsError
from mistral_ms.reading import read_json

RIVALS = 5
"""Tokens that are recorded of each greedy choice."""


def run_hugging_face(
    path: Path,
    prompts: Sequence[Sequence[int]],
    new_tokens: int,
    say: Callable[[str], None] = lambda text: None,
    adapter: Path | None = None,
    dtype: str = "float32",
) -> Side:
    """Runs every prompt alone, without padding, through the model at ``path``.

    The generation settings of the directory are set aside: a repetition penalty in
    ``generation_config.json`` would make another text of equal logits.

    Args:
        path: a directory that ``from_pretrained`` reads; nothing is fetched from a hub.
        prompts: token ids.
        new_tokens: how many tokens to continue greedily.
        say: told what of the configuration the installed transformers is given in other words.
        adapter: directory of an adapter, which the peft library puts beside the weights.
        dtype: of weights and activations. With bfloat16 the prompts also run with the same weights
            in float32, which shows how much this side rounds.

    Raises:
        MissingExtraError: torch, transformers or, with an adapter, peft is not installed.
        CheckpointError: transformers cannot load the directory.
    """
    try:
        import torch
        import transformers
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise MissingExtraError(error.name or "torch", "align", "alignment") from error
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            config=_config(path, transformers, say),
            dtype=getattr(torch, dtype),
            attn_implementation="eager",
            local_files_only=True,
        )
    except MistralMsError:
        raise
    except Exception as error:  # transformers raises many kinds
        raise CheckpointError(
            "transformers cannot load it", where=path, value=" ".join(str(error).split())[:300]
        ) from error
    if adapter is not None:
        _add_adapter(model, path, adapter, _major(transformers))
    model.eval()
    if hasattr(model, "set_experts_implementation"):  # version 5: fused ones want rows of 16 bytes
        model.set_experts_implementation("eager")
    model.config.output_router_logits = False  # its aux loss fails with a cache
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=model.config.bos_token_id, eos_token_id=model.config.eos_token_id
    )
    side = Side()
    with torch.no_grad():
        for prompt in prompts:
            _forget_lengths(model)
            side.traces.append(_trace(model, prompt))
            _forget_lengths(model)
            tokens, rivals = _greedy(model, prompt, new_tokens)
            side.greedy.append(tokens)
            side.rivals.append(rivals)
        if dtype != "float32":
            model.float()
            for prompt in prompts:
                _forget_lengths(model)
                side.exact.append(_trace(model, prompt))
    return side


def _add_adapter(model: Any, path: Path, adapter: Path, major: int) -> None:
    """Puts an adapter beside the weights, in place, under a major version of transformers."""
    try:
        import peft
    except ImportError as error:
        raise MissingExtraError("peft", "peft", "align --adapter") from error
    config, _ = read_config(path, "hf")
    with TemporaryDirectory() as directory, open_adapter(adapter, config) as source:
        fused = major > 4
        if source.kind != (PEFT_FUSED if fused else PEFT):
            adapter = Path(directory) / "adapter"
            write_peft(source, adapter, None, fused=fused)
        peft.PeftModel.from_pretrained(model, adapter)


def _forget_lengths(model: Any) -> None:
    """Under dynamic rope_scaling the longest sequence so far decides the base: start afresh."""
    rotary = model.model.rotary_emb
    if hasattr(rotary, "max_seq_len_cached"):
        rotary.register_buffer("inv_freq", rotary.original_inv_freq, persistent=False)
        rotary.max_seq_len_cached = rotary.original_max_seq_len


def _config(path: Path, transformers: Any, say: Callable[[str], None]) -> Any:
    """The directory's configuration, in the form that the installed transformers understands."""
    source = read_json(Path(path) / "config.json", CheckpointError)
    keys, changes = own_form(source, _major(transformers))
    if changes:
        say(f"told transformers {transformers.__version__} in its own words: {', '.join(changes)}")
    with TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(keys), encoding="utf-8")
        return transformers.AutoConfig.from_pretrained(directory)


def _major(transformers: Any) -> int:
    return int(transformers.__version__.split(".")[0])


def own_form(source: Mapping[str, Any], major: int) -> tuple[dict[str, Any], list[str]]:
    """A configuration in the form of a major version of transformers.

    Version 4 ignores the ``rope_parameters`` of version 5 without a word, and reckons with a
    ``head_dim`` that is not there in some of its classes. What is said stays what it was: this is
    the oracle's own file, not our reading of it.

    Args:
        source: the parsed ``config.json``.
        major: the version.

    Returns:
        The keys, and what was changed, in words.
    """
    keys, changes = dict(source), []
    rope = keys.get("rope_parameters")
    if major < 5 and isinstance(rope, Mapping):
        del keys["rope_parameters"]
        rest = {k: v for k, v in rope.items() if v is not None and k != "rope_theta"}
        if "rope_theta" in rope:
            keys["rope_theta"] = rope["rope_theta"]
        if rest.get("rope_type", rest.get("type", "default")) != "default":
            keys["rope_scaling"] = rest
        changes.append("rope_parameters as rope_theta and rope_scaling")
    needs = keys.get("rope_scaling") or keys.get("layer_types") or keys["model_type"] == "ministral"
    if keys.get("head_dim") is None and needs:
        keys["head_dim"] = keys["hidden_size"] // keys["num_attention_heads"]
        changes.append("head_dim written out")
    return keys, changes


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
            if isinstance(output, tuple):  # with the choice itself, beside weights or logits
                chosen = next(each for each in output if not each.is_floating_point())
            else:
                chosen = torch.topk(output.float().softmax(-1), top_k, dim=-1).indices
            experts[layer] = np.sort(chosen.numpy(), -1)

        return hook

    handles = [model.model.embed_tokens.register_forward_hook(keep("embedding"))]
    for number, layer in enumerate(model.model.layers):
        sparse = getattr(layer, "block_sparse_moe", None)
        block = layer.mlp if sparse is None else sparse
        if sparse is None and hasattr(block, "experts"):
            sparse = block
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


def _greedy(model: Any, prompt: Sequence[int], new_tokens: int) -> tuple[list[int], list[Rivals]]:
    import torch

    if new_tokens == 0:
        return [], []
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    rivals = []
    for logits in out.logits:
        best = torch.topk(logits[0].float(), min(RIVALS, logits.shape[-1]))
        rivals.append(tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)))
    return out.sequences[0, len(prompt) :].tolist(), rivals
