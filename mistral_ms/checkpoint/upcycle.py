"""A dense model as a sparse one that computes the same (sparse upcycling, arXiv:2212.05055).

Every expert is a copy of the dense feed-forward that stood in its place. A token's result is then
the dense one whatever the gate chooses, provided that the weights of its experts add up to 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import numpy as np

from mistral_ms.checkpoint.dtypes import FROM_OPTION, WEIGHT_DTYPES, cast
from mistral_ms.checkpoint.keys import KeyTable
from mistral_ms.checkpoint.layout import Block, FormatLayout, format_layout
from mistral_ms.checkpoint.plan import Assembly, Piece, target_dtype
from mistral_ms.checkpoint.source import Source
from mistral_ms.checkpoint.stream import Workspace, stream
from mistral_ms.checkpoint.writer import Entry
from mistral_ms.config import ModelConfig, MoEArchitecture
from mistral_ms.config.base import validate
from mistral_ms.errors import ConfigError
from mistral_ms.weights import EMBEDDING, ParamSpec, by_name, init_values, specs

_DENSE, _ROUTED, _SHARED = ".feed_forward.", ".moe.experts.", ".moe.shared_experts."


def upcycled_config(dense: ModelConfig, moe: MoEArchitecture) -> ModelConfig:
    """The sparse model that computes what a dense one does.

    Args:
        dense: the model.
        moe: its sparse layers.

    Raises:
        ConfigError: the model is sparse already, or its experts would not compute the same.
    """
    if dense.moe is not None:
        raise ConfigError(
            "sparse already",
            where="model.moe",
            value=f"{dense.moe.num_local_experts} experts",
            rule="experts are copies of dense feed-forwards",
        )
    values = dense.model_dump() | {"moe": moe}
    config = validate(ModelConfig, values, "upcycling")
    factor = getattr(moe.gate, "routed_scaling_factor", 1.0)
    second = getattr(moe.gate, "eval_second_policy", "all")
    rules = (
        (
            second != "all",
            "gate.eval_second_policy",
            second,
            "a token without its second expert has weights that add up to less than 1",
        ),
        (
            not moe.norm_topk_prob,
            "norm_topk_prob",
            moe.norm_topk_prob,
            "the weights of a token's experts must add up to 1",
        ),
        (
            factor != 1.0,
            "gate.routed_scaling_factor",
            factor,
            "the weights of a token's experts must add up to 1",
        ),
        (
            config.expert_size != dense.intermediate_size,
            "moe_intermediate_size",
            config.expert_size,
            f"an expert is a copy of a feed-forward of width {dense.intermediate_size}",
        ),
        (
            config.shared_expert_size not in (0, dense.intermediate_size),
            "shared_expert_intermediate_size",
            config.shared_expert_size,
            f"a shared expert is a copy of a feed-forward of width {dense.intermediate_size}",
        ),
        (
            config.shared_expert_size > 0 and moe.shared_expert_gate != "softmax_pair",
            "shared_expert_gate",
            moe.shared_expert_gate,
            "the shares of chosen and shared experts must add up to 1, as those of softmax_pair do",
        ),
        (
            moe.extra_feed_forward != "none",
            "extra_feed_forward",
            moe.extra_feed_forward,
            "the dense model has no such feed-forward",
        ),
    )
    for broken, key, value, rule in rules:
        if broken:
            raise ConfigError(
                "another model than the dense one", where=f"moe.{key}", value=value, rule=rule
            )
    return config


def upcycled_entries(
    source: Source, config: ModelConfig, table: KeyTable, dtype: str, seed: int
) -> list[Entry]:
    """The tensors of the sparse model, streamed from the dense one's.

    Gates are drawn as a new model's are; what is copied is read once for each expert.

    Args:
        source: of the dense model.
        config: see :func:`upcycled_config`.
        table: the target's names.
        dtype: see :func:`~mistral_ms.checkpoint.convert`; under ``keep`` a gate has the dtype of
            the embedding, its buffers are float32.
        seed: of the gates.

    Raises:
        CheckpointError: see :func:`~mistral_ms.checkpoint.plan.target_dtype`.
    """
    held = {block.name: block for block in source.layout.places}
    target, found = format_layout(config, table), by_name(specs(config))
    pieces: dict[str, list[Piece]] = {name: [] for name in target.shapes}
    drawn: dict[str, ParamSpec] = {}
    for block, place in target.places.items():
        origin = _origin(block.name)
        if origin in held:
            pieces[place.name].append(_piece(source.layout, target, held[origin], block))
        else:
            drawn[place.name] = found[block.name]
    embedding = next(p.name for b, p in source.layout.places.items() if b.name == EMBEDDING)
    entries = []
    for name, shape in target.shapes.items():
        if name in drawn:
            kept = FROM_OPTION.get(dtype, source.tensors[embedding].dtype)
            stored = "F32" if drawn[name].kind == "buffer" else kept
            entries.append(Entry(name, shape, stored, partial(_values, drawn[name], stored, seed)))
            continue
        in_order = sorted(pieces[name], key=lambda piece: piece.target_start)
        assembly = Assembly(name, shape, tuple(in_order))
        stored = target_dtype(assembly, source.tensors, dtype)
        entries.append(Entry(name, shape, stored, partial(stream, source.store, assembly, stored)))
    return entries


def _origin(name: str) -> str:
    """The dense model's weight that one of the sparse model is a copy of, if it has it."""
    if _ROUTED in name:
        return f"{name.replace(_ROUTED, _DENSE)}.weight"
    return name.replace(_SHARED, _DENSE)


def _piece(source: FormatLayout, target: FormatLayout, here: Block, there: Block) -> Piece:
    begin, end = source.places[here], target.places[there]
    return Piece(begin.name, begin.start, begin.layout, end.start, end.layout, here)


def _values(spec: ParamSpec, dtype: str, seed: int, workspace: Workspace) -> Iterator[np.ndarray]:
    values = init_values(spec, seed).reshape(-1)
    if dtype == "F32":
        yield values
        return
    out = np.empty(values.size, WEIGHT_DTYPES[dtype])
    cast(values, "F32", dtype, out)
    yield out
