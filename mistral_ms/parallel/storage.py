"""How what one process holds lies in a checkpoint, whose tensors are those of the whole model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from mindspore import Parameter, Tensor

from mistral_ms.config import ModelConfig, ParallelConfig
from mistral_ms.parallel.pipeline import held_specs, stages_of
from mistral_ms.parallel.sharding import Axes, Sharding, graph_form
from mistral_ms.parallel.topology import (
    Topology,
    weight_slice,
    writes_owned,
    written_parts,
)
from mistral_ms.weights import Specs, by_name, init_values, specs

Shape = tuple[int, ...]
TensorSlice = tuple[slice, ...]


class Storage:
    """Of a process that is alone: all of everything, as it lies in the checkpoint.

    Args:
        specs: of the parameters that the process's stage holds.

    Attributes:
        holds_everything: no other process holds anything.
    """

    holds_everything = True

    def __init__(self, specs: Specs) -> None:
        self.specs = specs

    def whole(self, name: str) -> Shape:
        """The shape of a whole weight in a checkpoint, of which the process holds a part."""
        return self.specs[name].shape

    def local_slice(self, name: str) -> TensorSlice:
        """Which part of a whole weight the process holds, one slice per axis."""
        return tuple(slice(0, size) for size in self.whole(name))

    def parameter_shape(self, name: str, held: Shape) -> Shape:
        """The shape of the parameter that keeps a part of ``held``."""
        return held

    def to_parameter(self, name: str, values: np.ndarray) -> np.ndarray:
        """A part as it lies in a checkpoint, as it lies in its parameter."""
        return values

    def from_parameter(self, name: str, values: np.ndarray) -> np.ndarray:
        """The way back."""
        return values

    def written(self, weights: Iterable[str]) -> set[str]:
        """The weights whose parts this process writes; of those that hold the same, one does.

        Args:
            weights: names of what its stage holds.
        """
        return set(weights)

    def writes_state(self, weight: str, written: set[str]) -> bool:
        """Whether this process writes its optimizer state of a weight.

        Args:
            weight: its name.
            written: what :meth:`written` has said.
        """
        return weight in written

    def initialize(self, weights: Mapping[str, Parameter], seed: int) -> None:
        """Draws what one process would draw, and keeps this process's parts."""
        for name, parameter in weights.items():
            part = init_values(self.specs[name], seed)[self.local_slice(name)]
            values = np.ascontiguousarray(self.to_parameter(name, part))
            data = Tensor(values).astype(parameter.dtype)
            # what MindSpore has cut when it divided a graph stays known as cut
            parameter.set_data(data, slice_shape=parameter.sliced)


class ParallelStorage(Storage):
    """Of one rank of the explicit path.

    Args:
        specs: of the parameters that the rank's stage holds.
        topology: the layout.
        rank: the process.
        zero1: each rank alone of those that hold a weight has its optimizer state.
    """

    holds_everything = False

    def __init__(self, specs: Specs, topology: Topology, rank: int, zero1: bool) -> None:
        super().__init__(specs)
        self.topology, self.rank, self.zero1 = topology, rank, zero1

    def local_slice(self, name: str) -> TensorSlice:
        """See the base."""
        return weight_slice(self.specs[name], self.topology, self.rank)

    def written(self, weights: Iterable[str]) -> set[str]:
        """See the base; the loads of all ranks are about even."""
        held = [self.specs[name] for name in weights]
        return set(written_parts(held, self.topology, self.rank))

    def writes_state(self, weight: str, written: set[str]) -> bool:
        """See the base."""
        if self.zero1:
            return writes_owned(self.specs[weight], self.topology, self.rank)
        return weight in written


class GraphStorage(Storage):
    """Of one rank of the auto-parallel graph.

    Two things differ from the explicit path: weights have the forms of
    :mod:`mistral_ms.parallel.sharding.forms`, and optimizer parallelism leaves each rank a shard of
    the rows of its part, in the order of the ranks that hold the same part: the order in which an
    AllGather puts their shards together.

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
