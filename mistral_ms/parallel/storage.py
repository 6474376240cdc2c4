"""How what one process holds lies in a checkpoint, whose tensors are those of the whole model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
from mindspore import Parameter, Tensor

from mistral_ms.parallel.topology import (
    Topology,
    weight_slice,
    writes_owned,
    written_parts,
)
from mistral_ms.weights import Specs, init_values

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
