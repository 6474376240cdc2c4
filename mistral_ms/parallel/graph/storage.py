"""How a rank's parts of the graph's weights lie in a checkpoint.

Two things differ from the explicit path: weights have the forms of
:mod:`mistral_ms.parallel.sharding.forms`, and optimizer parallelism leaves each rank a shard of the
rows of its part, in the order of the ranks that hold the same part: the order in which an
AllGather puts their shards together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from mindspore import Parameter

from mistral_ms.config import ModelConfig, ParallelConfig
from mistral_ms.parallel.pipeline import held_specs, stages_of
from mistral_ms.parallel.sharding import Axes, Sharding, graph_form
from mistral_ms.parallel.storage import Shape, Storage, TensorSlice
from mistral_ms.weights import by_name, specs


class GraphStorage(Storage):
    """Of one rank of the auto-parallel graph.

    Args:
        model: the architecture.
        parallel: the layout.
        rank: the process.
        layouts: of weights that do not have their layout of training, by their names.

    Attributes:
        stage: what the rank's stage holds.
    """

    def __init__(
        self,
        model: ModelConfig,
        parallel: ParallelConfig,
        rank: int = 0,
        layouts: Mapping[str, str | Axes] | None = None,
    ) -> None:
        self.sharding = Sharding(parallel)
        self.zero1 = parallel.optimizer_parallel
        stage, self.number = divmod(rank, self.sharding.ranks)
        self.stage = stages_of(model, parallel.pp)[stage]
        held = by_name(held_specs(self.stage, specs(model)))
        if not self.stage.embedding:  # a tied embedding is sent here in each step
            held = {name: spec for name, spec in held.items() if spec.module != "tied"}
        super().__init__(held)
        self.holds_everything = parallel.world == 1
        self.forms = {name: graph_form(spec) for name, spec in self.specs.items()}
        self.layouts: dict[str, str | Axes] = {n: f.layout for n, f in self.forms.items()}
        self.layouts |= layouts or {}

    def held(self, weights: Mapping[str, Parameter]) -> dict[str, Parameter]:
        """Of the whole model's weights those of this rank's stage."""
        return {name: each for name, each in weights.items() if name in self.specs}

    def local_slice(self, name: str) -> TensorSlice:
        """See the base."""
        layout, form = self.layouts[name], self.forms[name]
        sizes = self.sharding.shard_shape(layout, form.shape)
        shard_indices = self.sharding.shard_index(layout, self.number)
        starts = [
            shard_index * size for shard_index, size in zip(shard_indices, sizes, strict=True)
        ]
        replicas = self._optimizer_shards(name)
        rows, first = sizes[0] // replicas, starts[0]
        if replicas > 1:
            first += self.sharding.replica_index(layout, self.number) * rows
        cut = [slice(first, first + rows)]
        cut += [slice(a, a + n) for a, n in zip(starts[1:], sizes[1:], strict=True)]
        return form.local_slice(tuple(cut))

    def parameter_shape(self, name: str, held: Shape) -> Shape:
        """See the base."""
        return self.forms[name].held_shape(held)

    def to_parameter(self, name: str, values: np.ndarray) -> np.ndarray:
        """See the base."""
        return self.forms[name].to_graph(values)

    def from_parameter(self, name: str, values: np.ndarray) -> np.ndarray:
        """See the base."""
        return self.forms[name].from_graph(values)

    def written(self, weights: Iterable[str]) -> set[str]:
        """See the base: shards are nobody else's; of replicas the first rank writes."""
        return {
            name
            for name in weights
            if self._optimizer_shards(name) > 1
            or self.sharding.replica_index(self.layouts[name], self.number) == 0
        }

    def _optimizer_shards(self, name: str) -> int:
        shape, divided = self.forms[name].shape, self.zero1 and self.specs[name].kind != "buffer"
        return self.sharding.optimizer_shards(self.layouts[name], shape, divided)
