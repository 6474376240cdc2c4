"""The routed region of one rank: its experts, its shards of them, and the way to the others.

``RoutedExperts`` computes whatever experts it holds on whatever rows its dispatcher brings. So a
rank's region is the ordinary one, with a smaller model's sizes and another dispatcher; it takes
the place of the one in a model that was built as for one device::

    block.moe.experts = routed_experts(model_config, routing, parallel, groups)

Its weights are :func:`~mistral_ms.parallel.topology.weight_slice` of the whole ones. Their
gradients are added up over the ``EXPERT_DATA`` group alone, see
:func:`~mistral_ms.parallel.topology.gradient_group`: the rows of the expert group's other ranks,
and the gradients of their results, have come here by the exchange.
"""

from __future__ import annotations

from mistral_ms.config import ModelConfig, ParallelConfig, RoutingConfig
from mistral_ms.errors import TopologyError
from mistral_ms.moe import RoutedExperts
from mistral_ms.parallel.collectives import Groups
from mistral_ms.parallel.dispatchers import make_dispatcher
from mistral_ms.parallel.topology import expert_slice


def routed_experts(
    model: ModelConfig,
    routing: RoutingConfig,
    parallel: ParallelConfig,
    groups: Groups,
    dtype: str = "float32",
) -> RoutedExperts:
    """The routed region of a sparse layer on one rank.

    Args:
        model: the whole model.
        routing: the policy.
        parallel: the layout and how tokens travel.
        groups: this rank's groups.
        dtype: dtype of the weights, which are fresh zeros: w1 and w3 [L, I / mp, H],
            w2 [L, H, I / mp].

    Raises:
        ConfigError: the layout does not divide the model.
        TopologyError: the model has no experts.
    """
    parallel.check(model)
    held = expert_slice(model, groups.topology, groups.coords.rank)
    if model.moe is None:  # expert_slice has raised
        raise TopologyError("no experts")
    dispatcher = make_dispatcher(
        model.moe.num_local_experts, routing, parallel, groups, dtype=dtype
    )
    moe = model.moe.model_copy(update={"moe_intermediate_size": len(held.columns)})
    local_config = model.model_copy(update={"moe": moe})
    return RoutedExperts(
        local_config, dispatcher, len(held.experts), dtype, first_expert=held.experts.start
    )
