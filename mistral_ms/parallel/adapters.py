"""Which adapters the auto-parallel graph trains: all but the router's, by data, expert and pipeline
parallelism. The explicit path trains all adapters.
"""

from __future__ import annotations

from collections.abc import Iterator

from mistral_ms.config import ModelConfig, ParallelConfig
from mistral_ms.weights import stored_specs


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
    for spec in stored_specs(model):
        if ".router." in spec.name:
            why = "in the graph the gate's product stands in a region that takes no adapter of it"
            yield "lora.target_modules", spec.adapts, why
