"""Which of MindFormers' layouts a checkpoint has; other variants are refused by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from mistral_ms.checkpoint import keys
from mistral_ms.checkpoint.detect import MindFormersLayout
from mistral_ms.checkpoint.safetensors_file import TensorInfo
from mistral_ms.config import ModelConfig
from mistral_ms.errors import CheckpointError
from mistral_ms.weights import EMBEDDING

TABLES: Mapping[MindFormersLayout, keys.KeyTable] = {
    "fused": keys.MINDFORMERS,
    "gmm": keys.MINDFORMERS_GMM,
    "graph": keys.MINDFORMERS_GRAPH,
}

_LAYER = r"model\.layers\.\d+\."
# names of other variants of LlamaForCausalLM: what it is, and what to do
_OTHERS = {
    rf"{_LAYER}feed_forward\.ffn\.w[12]": (
        "experts of training with use_gmm (MoEV3)",
        "w1 and w3 share each row of one tensor [E, H, 2I]",
        "split it as their Swiglu does (the first half is w1), transpose w1, w2 and w3 of each "
        "expert, and save them under ffn.w1.weight, ffn.w2.weight and ffn.w3.weight",
    ),
    rf"{_LAYER}attention\.w_qkv\.(weight|bias)|{_LAYER}feed_forward\.w_gate_hidden\.weight": (
        "concatenated projections (qkv_concat)",
        "their order depends on the tensor parallelism that they were made for",
        "convert the checkpoint that they were made from",
    ),
    rf"{_LAYER}feed_forward\.(routed_experts|shared_experts)\..+": (
        "shared experts",
        "Mixtral has none",
        None,
    ),
    rf"{_LAYER}attention\.w[qkvo]\.bias": ("biases", "Mistral and Mixtral have none", None),
}


def find_table(
    tensors: Mapping[str, TensorInfo],
    config: ModelConfig,
    layout: MindFormersLayout | None,
    path: Path,
) -> keys.KeyTable:
    """The key table of a checkpoint that MindFormers has written.

    Args:
        tensors: what its files hold.
        config: the model.
        layout: what the user says of the experts; None: their shapes tell.
        path: the checkpoint, for messages.

    Raises:
        CheckpointError: a variant that is not read, or experts of which the shapes do not tell.
    """
    if EMBEDDING in tensors:  # one of our models under MindFormers' Trainer
        experts = "layers.{layer}.moe.experts.w1"
        first = tensors.get(experts.format(layer=(*config.sparse_layers, 0)[0]))
        divided = first is not None and len(first.shape) == 2
        return keys.MINDFORMERS_GRAPH if divided else keys.OURS
    for name, info in tensors.items():
        for pattern, (what, rule, todo) in _OTHERS.items():
            if re.fullmatch(pattern, name):
                where = f"{info.file}: {name}"
                raise CheckpointError(f"{what} are not read", where=where, rule=rule, todo=todo)
    if config.moe is None:
        _check_dense(tensors, path)
        return TABLES["fused"]
    if layout is not None:
        return TABLES[layout]
    rows, columns = config.expert_size, config.hidden_size
    if rows == columns:
        raise CheckpointError(
            "the layout of the experts is not clear",
            where=path,
            value=f"hidden_size and intermediate_size are both {rows}",
            rule="a matrix and its transposed one have the same shape",
            todo="say --from mindformers-fused (training, MoEV2) or --from mindformers-gmm "
            "(inference with a cache, MoEInfer); in a run file with init_from.format",
        )
    stored = keys.MINDFORMERS["layers.{layer}.moe.experts.w1"].name
    first = tensors.get(stored.format(layer=config.sparse_layers[0]))
    on_its_side = first is not None and first.shape[1:] == (columns, rows)
    return TABLES["gmm" if on_its_side else "fused"]


def _check_dense(tensors: Mapping[str, TensorInfo], path: Path) -> None:
    """MindFormers' ``save_pretrained`` loses what the experts are.

    Raises:
        CheckpointError: the configuration is of a dense model, and there are experts.
    """
    experts = [name for name in tensors if re.fullmatch(rf"{_LAYER}feed_forward\.ffn\..+", name)]
    if experts:
        raise CheckpointError(
            "contradiction",
            where=path,
            value=f"{experts[0]}, and a configuration without experts",
            rule="the yaml file that save_pretrained writes does not say what the experts are",
            todo="add moe_config to it, with expert_num, num_experts_chosen and routing_policy "
            "TopkRouterV2, as the run's file had it",
        )
