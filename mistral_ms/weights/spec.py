"""What is true of one parameter of a model, as plain data.

Checkpoint shapes and names, the slice of a rank, the ranks whose gradients are added up, pipeline
stages, graph layouts, initial values and weight decay are functions of it. No name is parsed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from mistral_ms.errors import WeightError

By = Literal["mp", "ep"]
Init = Literal["normal", "truncated_normal", "uniform", "ones", "zeros", "balanced"]
Kind = Literal["trained", "frozen", "buffer"]
Module = int | Literal["embedding", "head", "tied"]


@dataclass(frozen=True)
class Cut:
    """How one kind of parallelism divides a parameter.

    Attributes:
        by: ``mp``, tensor parallelism; or ``ep``, expert parallelism.
        axis: the axis that is divided.
        units: of how many pieces of equal length the axis consists; each stays on one rank. Heads
            are divided in the groups that share a key/value head.
    """

    by: By
    axis: int
    units: int


@dataclass(frozen=True)
class ParamSpec:
    """One parameter of the whole model, whatever part of it a process holds.

    Attributes:
        name: of the parameter in our checkpoints, the layer's number filled in.
        axes: what each axis is: ``V`` vocabulary, ``H`` hidden, ``I`` intermediate, ``E`` experts,
            ``ND`` and ``GD`` query and key/value heads times their dimension, ``D`` head dimension.
        shape: the length of each axis.
        divide: how tensor and expert parallelism divide it, at most one entry each. What expert
            parallelism divides is stacked: its first axis is the experts.
        decay: whether weight decay applies.
        init: initial values: normal or uniform with mean 0 and ``std``, the normal ones cut off at
            twice ``std``, ones or zeros; ``balanced``: in each row the whole numbers below
            ``levels``, see :func:`mistral_ms.weights.balanced`.
        std: standard deviation of what is drawn; of ``truncated_normal`` before it is cut off.
        levels: of ``balanced``.
        token_counts: of ``balanced``: a file that says how often each of the ids occurs that the
            last axis counts; None: nobody knows.
        kind: ``trained``; ``frozen``, a weight without a gradient; ``buffer``, state without a
            gradient that the layer itself changes. All are in checkpoints.
        partial_gradient: tensor-parallel ranks hold all of the parameter and each has a part of its
            gradient, because each uses it on its own heads or columns. The parts are added up.
        frozen_rows: the first so many rows get no gradient and must not decay; they stay as they
            are to the bit.
        rotary_heads: the rows of the first axis are so many heads that RoPE rotates; 0: they are
            not rotated.
        module: the decoder block that the parameter belongs to, or the embedding, or the head, or
            both (``tied``). It decides the pipeline stage; a tied one is on the first and the last.
        adapts: of an adapter's parameter, the name of the matrix that it changes.
    """

    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    divide: tuple[Cut, ...] = ()
    decay: bool = True
    init: Init = "normal"
    std: float = 0.02
    levels: int = 1
    token_counts: str | None = None
    kind: Kind = "trained"
    partial_gradient: bool = False
    frozen_rows: int = 0
    rotary_heads: int = 0
    module: Module = "head"
    adapts: str | None = None

    def __post_init__(self) -> None:
        rule = self._broken_rule()
        if rule is not None:
            value = f"{' '.join(self.axes)} = {list(self.shape)}"
            raise WeightError("impossible parameter", where=self.name, value=value, rule=rule)

    def _broken_rule(self) -> str | None:
        if len(self.axes) != len(self.shape) or any(size < 1 for size in self.shape):
            return "every axis has a name and a length of at least 1"
        if len({cut.by for cut in self.divide}) < len(self.divide):
            return "each kind of parallelism divides one axis"
        if len({cut.axis for cut in self.divide}) < len(self.divide):
            return "each axis is divided once"
        for cut in self.divide:
            if not 0 <= cut.axis < len(self.shape) or self.shape[cut.axis] % cut.units:
                return f"{cut.by} divides an axis of whole units (axis {cut.axis}, {cut.units})"
        if self.stacked and self.divide_by("ep") != Cut("ep", 0, self.shape[0]):
            return "expert parallelism divides the first axis, expert by expert"
        if self.partial_gradient and self.divide_by("mp") is not None:
            return "a gradient is partial where tensor parallelism divides nothing"
        if self.frozen_rows and self.decay:
            return "rows that stay as they are do not decay"
        return None

    def divide_by(self, by: By) -> Cut | None:
        """How one kind of parallelism divides it; None when it does not."""
        return next((cut for cut in self.divide if cut.by == by), None)

    def lies_in(self, layers: range, embedding: bool, head: bool) -> bool:
        """Whether it belongs to a part of a model.

        Args:
            layers: the part's decoder blocks.
            embedding: whether the part has the embedding.
            head: whether it has the final norm and the head.
        """
        if isinstance(self.module, int):
            return self.module in layers
        return (embedding and self.module != "head") or (head and self.module != "embedding")

    @property
    def stacked(self) -> bool:
        """Whether expert parallelism divides it."""
        return self.divide_by("ep") is not None

    @property
    def pattern(self) -> str:
        """The name with ``{layer}`` in the place of the layer's number, as in key tables."""
        if isinstance(self.module, str):
            return self.name
        return self.name.replace(f"layers.{self.module}.", "layers.{layer}.", 1)


def matrix(
    name: str,
    axes: tuple[str, str],
    shape: tuple[int, int],
    std: float,
    *divide: Cut,
    rotary_heads: int = 0,
) -> ParamSpec:
    """A trained matrix [output, input] with weight decay, drawn from normal(0, std)."""
    return ParamSpec(name, axes, shape, divide, std=std, rotary_heads=rotary_heads)


def scale(name: str, axis: str, size: int, *, partial_gradient: bool = False) -> ParamSpec:
    """A trained vector without weight decay that starts at one: the weight of a norm."""
    return ParamSpec(
        name, (axis,), (size,), decay=False, init="ones", partial_gradient=partial_gradient
    )


def inside(path: str, specs: Iterable[ParamSpec]) -> tuple[ParamSpec, ...]:
    """The parameters of a layer as those of the module that holds it under ``path``."""
    return tuple(replace(spec, name=f"{path}.{spec.name}") for spec in specs)
