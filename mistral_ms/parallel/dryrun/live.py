"""How many bytes a compiled training step must keep from its forward pass for its gradients.

Counted in the text that :mod:`~mistral_ms.parallel.dryrun.ir` reads: the results of operators of
the forward pass that an operator of the backward pass reads, each once however it is viewed. What
is computed from weights alone (a rounded or gathered copy) is told from what is computed from the
batch. No order of operators changes that sum. The fullest moment of a step is another matter: it
depends on the order, the reuse and the workspaces that the back end chooses, of which the text
says nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from mistral_ms.parallel.dryrun.flow import Flow, whole


@dataclass(frozen=True)
class Kept:
    """Bytes that a step keeps between its forward and its backward pass.

    Attributes:
        activations: computed from the batch.
        weights: copies of weights.
        by_cell: of the activations, by the path of the cell that made them.
    """

    activations: int
    weights: int
    by_cell: Counter[tuple[str, str]]


def kept(text: str) -> Kept:
    """Counts what the backward pass reads of the forward pass.

    Args:
        text: of the ``.ir`` file of a training step without pipeline stages, whose text is one
            graph. What is computed again is not counted, but what it is computed from.
    """
    reader = Flow(text)
    backward, from_batch = reader.backward(), reader.from_batch()
    found = {
        each
        for buffer, read in reader.reads
        if buffer in backward
        for each in read
        if reader.maker(each) is not None and whole(each) not in backward
    }
    activations: Counter[tuple[str, str]] = Counter()
    weights = 0
    for buffer in found:
        node = reader.maker(buffer)
        assert node is not None
        if whole(buffer) in from_batch:
            activations[node.scope.rpartition("/")[0], node.operator] += reader.sizes[buffer]
        else:
            weights += reader.sizes[buffer]
    return Kept(sum(activations.values()), weights, activations)
