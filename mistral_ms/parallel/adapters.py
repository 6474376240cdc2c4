"""Adapters in the auto-parallel graph, which trains LoRA and rsLoRA of all matrices, by data,
expert and pipeline parallelism. The explicit path trains all adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from mistral_ms.config import ModelConfig, ParallelConfig
from mistral_ms.parallel.sharding import Axes, graph_form
from mistral_ms.weights import ParamSpec, specs

ADAPTED = "w1", "w3", "w2", "router"
"""What of a sparse layer can have an adapter, in the order in which its region takes them."""
Adapters = Mapping[str, tuple[ParamSpec, ParamSpec]]
"""A and B of those that have one."""


def adapters_outside_graph(
    model: ModelConfig, parallel: ParallelConfig
) -> Iterator[tuple[str, object, str]]:
    """What of a model's adapters the graph does not train.

    Args:
        model: the architecture.
        parallel: the layout.

    Yields:
        Key of the run file, what stands there, and why it cannot be; nothing of a model without
        adapters.
    """
    lora = model.lora
    if lora is None:
        return
    if lora.use_dora:
        yield "lora.use_dora", True, "the graph forms no lengths of rows"
    if parallel.mp > 1:
        why = "in the graph products with adapters are not divided among tensor-parallel ranks"
        yield "lora", f"{lora}, with parallel.mp {parallel.mp}", why


def sparse_adapters(config: ModelConfig, layer: int) -> Adapters:
    """A and B of the experts' matrices and of the router's of a layer."""
    if config.lora is None:
        return {}
    found: dict[str, list[ParamSpec]] = {}
    for spec in specs(config):
        if spec.adapts and spec.adapts.startswith(f"layers.{layer}.moe."):
            matrix = spec.adapts.rpartition(".")[2]
            found.setdefault("router" if matrix == "weight" else matrix, []).append(spec)
    return {name: (each[0], each[1]) for name, each in found.items()}


def layouts_of(adapters: Adapters) -> list[str | Axes]:
    """Of what a region takes: of A and B, and of what stands for those that are not there."""
    found: list[str | Axes] = []
    for name in ADAPTED:
        found += [graph_form(each).layout for each in adapters.get(name, ())] or ["samples"] * 2
    return found
