"""A checkpoint written by all ranks of a layout, one after the other in one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from mistral_ms.checkpoint import our_shapes
from mistral_ms.checkpoint.parts_writer import Part, Stamp, begin_parts, finish_parts, write_part
from mistral_ms.config import ModelConfig, MoEArchitecture
from mistral_ms.config.layout import Sizes
from mistral_ms.parallel.topology import (
    Topology,
    gradient_group,
    weight_slice,
    writes_owned,
    written_parts,
)
from mistral_ms.weights import ParamSpec, specs

MODEL = ModelConfig(
    vocab_size=24,
    hidden_size=16,
    intermediate_size=20,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    torch_dtype="float32",
    moe=MoEArchitecture(num_local_experts=4, sparse_layers=(0, 2, 3)),
)
LAYOUTS = {
    "one": Sizes(1, 1, 1, 1),
    "dp4 ep2": Sizes(4, 1, 1, 2),
    "dp4 ep4": Sizes(4, 1, 1, 4),
    "mp2": Sizes(1, 2, 1, 1),
    "pp2": Sizes(1, 1, 2, 1),
    "dp4 mp2 pp2 ep2": Sizes(4, 2, 2, 2),
}
KINDS = ("exp_avg", "exp_avg_sq")


def whole(seed: int) -> dict[str, np.ndarray]:
    """Weights and optimizer state, by the names of checkpoints."""
    rng = np.random.default_rng(seed)
    shapes = our_shapes(MODEL)
    weights = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    state = {f"{k}.{n}": rng.random(w.shape, np.float32) for k in KINDS for n, w in weights.items()}
    return weights | state


def held(topology: Topology, rank: int, model: ModelConfig = MODEL) -> dict[str, ParamSpec]:
    """The weights of a rank's stage: layers divided evenly, ends at the ends, a tied embedding at
    both.
    """
    stage, stages = topology.coords(rank).pp, topology.sizes.pp
    size = MODEL.num_hidden_layers // stages
    layers = {f"layers.{n}." for n in range(stage * size, (stage + 1) * size)}

    def is_here(name: str) -> bool:
        if name.startswith("layers."):
            return any(name.startswith(layer) for layer in layers)
        if name.startswith("embed") and stage == 0:
            return True
        return stage == stages - 1 and (model.tie_word_embeddings or not name.startswith("embed"))

    return {spec.name: spec for spec in specs(model) if is_here(spec.name)}


def owner(spec: ParamSpec, topology: Topology, rank: int) -> bool:
    """Whose optimizer state it is of ZeRO-1: some fixed rule of the test's own."""
    members = topology.group(gradient_group(spec), rank).ranks
    return members[sum(map(ord, spec.name)) % len(members)] == rank


def parts_of(
    values: dict[str, np.ndarray], topology: Topology, rank: int, zero1: bool = False
) -> dict[str, list[Part]]:
    """What a rank writes."""
    here = held(topology, rank)
    tensor_slices = {name: weight_slice(spec, topology, rank) for name, spec in here.items()}
    mine = written_parts(here.values(), topology, rank)
    if zero1:
        states = [
            name
            for name, spec in here.items()
            if owner(spec, topology, rank) and writes_owned(spec, topology, rank)
        ]
    else:
        states = list(mine)

    def part(name: str, weight: str) -> Part:
        tensor_slice = tensor_slices[weight]
        return Part(name, here[weight].shape, tensor_slice, "float32", values[name][tensor_slice])

    return {
        "model": [part(name, name) for name in mine],
        "optimizer": [part(f"{kind}.{name}", name) for kind in KINDS for name in states],
    }


def save(
    path: Path,
    values: dict[str, np.ndarray],
    sizes: Sizes,
    step: int = 1,
    *,
    zero1: bool = False,
    before_finish: Callable[[Path], None] = lambda directory: None,
    wait_seconds: float = 5.0,
) -> None:
    """All ranks write, then the first one finishes."""
    topology = Topology(sizes)
    stamp = Stamp(sizes.world, str(sizes), step)
    begun = begin_parts(path)
    for rank in range(sizes.world):
        write_part(begun.directory, rank, stamp, parts_of(values, topology, rank, zero1))
    before_finish(begun.directory)
    state = {"state.json": json.dumps({"format": 1, "step": step}).encode()}
    finish_parts(begun, stamp, MODEL, state, wait_seconds=wait_seconds)
