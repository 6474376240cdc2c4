"""One pipeline stage's place in the model, and its ways to the stages beside it."""

from __future__ import annotations

from mindspore import Tensor, nn

from mistral_ms.config import ModelConfig
from mistral_ms.models import ModelChunk
from mistral_ms.parallel.collectives import Collectives, Groups
from mistral_ms.parallel.pipeline import Phase, Transfer, stages_of
from mistral_ms.parallel.topology import GroupKind


def model_chunks_of(model: ModelConfig, pp: int, stage: int, chunks: int = 1) -> list[ModelChunk]:
    """What a stage holds of a model.

    Args:
        model: the whole model.
        pp: how many stages there are.
        stage: which of them.
        chunks: of each stage, interleaved.

    Raises:
        TopologyError: more stages than layers.
        ConfigError: the model cannot be cut.
    """
    held = stages_of(model, pp * chunks)[stage::pp]
    return [ModelChunk(part.layers, part.embedding, part.head) for part in held]


class _SendForward(nn.Cell):
    """Activations, forward."""

    def __init__(self, pair: Collectives) -> None:
        super().__init__()
        self.pair = pair

    def construct(self, x: Tensor) -> Tensor:
        return self.pair.send_forward(x)


class _SendBackward(nn.Cell):
    """Gradients, backward."""

    def __init__(self, pair: Collectives) -> None:
        super().__init__()
        self.pair = pair

    def construct(self, x: Tensor) -> Tensor:
        return self.pair.send_backward(x)


class P2PCommunicator:
    """A rank's ways to its own place in the stages before and after its own.

    Args:
        groups: the rank's groups. All ranks must make their links at the same time.
        chunks: of each stage; where there are several, the last stage hands on to the first.

    Attributes:
        stage: the rank's stage.
    """

    def __init__(self, groups: Groups, chunks: int = 1) -> None:
        self.stage, last = groups.coords.pp, groups.topology.sizes.pp - 1
        self._ways: dict[tuple[int, Phase], nn.Cell] = {}
        for pair in range(max(0, self.stage - 1), min(self.stage, last - 1) + 1):
            neighbours = groups.neighbours(pair)
            self._ways[pair, Phase.FORWARD] = _SendForward(neighbours)
            self._ways[pair, Phase.BACKWARD] = _SendBackward(neighbours)
        if chunks > 1 and self.stage in (0, last):
            # in a group ranks are in their order: from the last stage to the first is backwards
            ends = groups.of(GroupKind.EMBEDDING)
            self._ways[last, Phase.FORWARD] = _SendBackward(ends)
            self._ways[last, Phase.BACKWARD] = _SendForward(ends)

    def exchange(self, transfer: Transfer, x: Tensor) -> Tensor:
        """The sender's ``x``, for both; the receiver gives any tensor of its shape and dtype."""
        way = self._ways[transfer.pair, transfer.phase]
        return way(x)
