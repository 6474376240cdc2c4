"""Gates that balance a whole dispatch group, or choose by groups of experts, and tokens that go on
to other experts, with the experts of a layer on two ranks. A layer alone, operator by operator:
nothing is compiled.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from distributed.worker import Worker
from mindspore import Tensor
from support.gates import COLUMNS, context, gated, results_and_gradients

from mistral_ms.config import ModelConfig, ParallelConfig, RoutingConfig
from mistral_ms.moe import MoELayer
from mistral_ms.parallel.collectives import Groups
from mistral_ms.parallel.experts import routed_experts
from mistral_ms.parallel.topology import Topology, weight_slice
from mistral_ms.weights import by_name, specs

E, H, I, T = 8, 8, 12, 16  # noqa: E741
LAYOUTS = {
    "ep2": ParallelConfig(dp=2, ep=2),
    "mp2": ParallelConfig(mp=2, group_wise_a2a=True),
}
DROPPING = RoutingConfig(policy="capacity", capacity_factor=0.75, allow_future=True)
GATES = {
    "sinkhorn": ("sinkhorn_top_k", 2, DROPPING),
    "sinkhorn of one": ("sinkhorn_top_k", 1, RoutingConfig(allow_future=True)),
    "base": ({"name": "base_top_1", "epsilon": 0.1}, 1, RoutingConfig(allow_future=True)),
    "groups of devices": (
        {"name": "group_limited_top_k", "n_group": 4, "topk_group": 2},
        2,
        DROPPING,
    ),
    "one of each group": ({"name": "grouped_top_k", "n_group": 2}, 2, DROPPING),
    "reroute": ("switch_top_1", 1, DROPPING.model_copy(update={"reroute_rounds": 2})),
}
"""The gate, experts of a token, and the policy."""


def config(name: str) -> ModelConfig:
    gate, K, _ = GATES[name]
    made = gated(gate, K, normalize=K > 1, H=H, I=I, E=E)
    return made.model_copy(update={"num_attention_heads": 2, "num_key_value_heads": 2})


def rows(dp: int) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of a dispatch group, with a direction in common, and gradients of results."""
    rng = np.random.default_rng([17, dp])
    common = np.random.default_rng(17).normal(size=H)
    x, dout = rng.normal(size=(T, H)) + common, rng.normal(size=(T, H))
    return x.astype(np.float32), dout.astype(np.float32)


def computed(
    name: str, layer: MoELayer, parts: Sequence[int], rank: int | None = None, layout: str = "ep2"
) -> dict[str, np.ndarray]:
    """In training: results, choices of each expert, those that were kept, and gradients, of some
    ranks' tokens as one dispatch group.
    """
    held = by_name(specs(config(name)))
    for path, parameter in layer.parameters_and_names():
        spec = held[f"layers.0.moe.{path}"]
        whole = np.random.default_rng(len(path)).normal(size=spec.shape) / np.sqrt(spec.shape[-1])
        whole = whole.astype(np.float32) * (2 if path.startswith("router") else 1)
        if rank is not None:
            whole = whole[weight_slice(spec, Topology.of(LAYOUTS[layout]), rank)]
        parameter.set_data(Tensor(np.ascontiguousarray(whole)))
    x, dout = (np.concatenate(each) for each in zip(*map(rows, parts), strict=True))
    per_rank = T // COLUMNS
    numbers = [dp * per_rank + row for dp in parts for row in range(per_rank)]
    y, sums, gradients = results_and_gradients(layer, x, dout, context(len(x), rows=numbers))
    return {"y": y, "routed": sums[1].numpy(), "kept": sums[2].numpy(), **gradients}


def run_grouped(worker: Worker) -> None:
    for layout, parallel in LAYOUTS.items():
        groups = Groups(Topology.of(parallel), worker.rank, "CPU")
        for name, (_, _, routing) in GATES.items():
            region = routed_experts(config(name), routing, parallel, groups)
            layer = MoELayer(config(name), routing, experts=region)
            found = computed(name, layer, [groups.coords.dp], worker.rank, layout)
            for what, value in found.items():
                worker.keep(f"grouped/{layout}/{name}/{what}", value)
