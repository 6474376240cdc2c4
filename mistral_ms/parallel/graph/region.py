"""Shard-local regions: code of one device inside the auto-parallel graph.

The compiler divides single operators well and whole algorithms badly: routing, row id maps and
rotations know no strategies. A region is a function that is written as for one device and sees
only this rank's parts of its inputs; layouts by name say what those parts are, and between
regions the compiler moves what must be moved. MindSpore's ``Morph`` carries it into the graph
before it is divided and is replaced by the function itself before the gradient is taken.

**Gradients.** In this graph the replicas of a tensor on several ranks have gradients that are
*parts*: they add up to the true one, and whoever made the replicas adds them up (the compiler, for
weights and for its own redistributions). Inside a region each communication primitive's own
gradient does the right thing under that rule
(:data:`~mistral_ms.parallel.collectives.PARTIAL_GRADIENTS`); the mappings of the explicit path,
where every copy has the whole gradient, would not.

On one device nothing is divided and the region is its function.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mindspore as ms
from mindspore import Tensor, nn, ops

from mistral_ms.parallel.sharding import Axes, Sharding

Shape = Sequence[int]


def first_shape(x: Shape, *others: Shape) -> Any:
    """For a region whose output has the shape of its first input."""
    return x


class Region(nn.Cell):
    """The base: a subclass has ``compute``, with the arguments that ``construct`` gets, or a
    function is handed in.

    A subclass that holds a weight hands it to ``divided`` itself: in the first stage of a pipeline
    MindSpore loses the layout of a parameter that is handed to the ``construct`` of the base.

    Args:
        sharding: the table; None on one device.
        inputs: layout of each input, by name or as it is.
        outputs: layout of each output.
        shapes: of the whole inputs, the shapes of the whole outputs.
        dtypes: dtype of each output, or the number of the input that has it.
        compute: what a rank computes on its parts.

    Attributes:
        divided: from whole inputs to the whole result.
    """

    def __init__(
        self,
        sharding: Sharding | None,
        inputs: Sequence[str | Axes],
        outputs: Sequence[str],
        shapes: Callable[..., Any] = first_shape,
        dtypes: Sequence[ms.Type | int] = (0,),
        compute: Callable[..., Any] | None = None,
    ) -> None:
        super().__init__()
        self.divided = self.compute if compute is None else compute
        if sharding is not None:

            def infer_dtypes(*given: Any) -> Any:
                found = tuple(given[each] if isinstance(each, int) else each for each in dtypes)
                return found if len(found) > 1 else found[0]

            morph = ops.Morph(self.divided, shapes, infer_dtypes)
            morph.add_prim_attr("self_define_shard", True)
            self.divided = morph.shard(
                in_strategy=tuple(map(sharding, inputs)),
                out_strategy=tuple(map(sharding, outputs)),
            )

    def compute(self, *inputs: Tensor) -> Any:
        """What this rank computes on its parts."""
        raise NotImplementedError

    def construct(self, *inputs: Tensor) -> Any:
        """The whole result of the whole inputs."""
        return self.divided(*inputs)
