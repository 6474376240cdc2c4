"""One call of a model's step for tokens of several sequences, in a few fixed shapes.

A step has a row for each sequence of the cache. Its tokens may be a piece of a prompt for one row,
the newest token for another and nothing for a third; what is not a token has position -1. Where
much of the batch is padding, the layers are given the tokens alone, packed, and only attention sees
the rows: then neither the number of tokens nor the rows they are of change the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from mindspore import Tensor

from mistral_ms.ops.graph_cache import kept_graphs
from mistral_ms.ops.modes import graph_mode


class NextToken(Protocol):
    """What gives the logits of a step, see :class:`~mistral_ms.models.NextTokenLogits`."""

    batch: int
    packs: bool
    phase: str

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Float32 [B, V]."""


@dataclass(frozen=True, order=True)
class StepShape:
    """The sizes of one graph.

    Attributes:
        columns: the most tokens of one sequence (S).
        tokens: the most tokens of all (P); as many as places, B * S, when they are not packed.
    """

    columns: int
    tokens: int


@dataclass(frozen=True)
class Piece:
    """Tokens of one sequence that a step enters into the cache.

    Attributes:
        row: of the sequence.
        start: position of the first one.
        ids: the tokens.
    """

    row: int
    start: int
    ids: Sequence[int]


class Steps:
    """A step, its inputs made and its graphs compiled.

    Args:
        step: of a model with a cache.
        graph: compile; otherwise it runs operator by operator.
    """

    def __init__(self, step: NextToken, graph: bool) -> None:
        self._step, self._graph = step, graph
        self._compiled: set[StepShape] = set()

    @property
    def batch(self) -> int:
        """Rows: sequences that are computed side by side (B)."""
        return self._step.batch

    @property
    def one(self) -> StepShape:
        """A token for each sequence."""
        return StepShape(1, self.batch)

    def prefill_shapes(self, lengths: Sequence[int], chunk: int) -> tuple[StepShape, ...]:
        """Shapes for prompts of these lengths, the largest first: few, so that few graphs are
        compiled. The first takes what begins together; the other one, of more prompts than rows,
        what comes into single rows later.

        Args:
            lengths: tokens of each prompt, in the order in which they are taken.
            chunk: the most tokens of a prompt at a time.
        """
        columns = min(chunk, _power(max(lengths)))
        together = sum(min(length, columns) for length in lengths[: self.batch])
        tokens = self.batch * columns
        while self._step.packs and tokens // 2 >= max(together, self.batch + columns):
            tokens //= 2
        shapes = {StepShape(columns, tokens)}
        if later := lengths[self.batch :]:
            narrow = min(columns, _power(2 * sum(later) // len(later)))  # most fit as wholes
            alone = narrow + self.batch if self._step.packs else narrow * self.batch
            shapes.add(StepShape(narrow, min(alone, narrow * self.batch)))
        return tuple(sorted(shapes - {self.one}, key=lambda shape: -shape.tokens))

    def fixed_shapes(self, chunk: int) -> tuple[StepShape, ...]:
        """Shapes for prompts that are not known: a whole chunk beside the other sequences' tokens,
        and a quarter of one.

        Args:
            chunk: the most prompt tokens at a time; of a step that cannot be packed, of each
                prompt.
        """
        shapes = set()
        for columns in (chunk, -(-chunk // 4)):
            places = self.batch * columns
            tokens = min(places, columns + self.batch) if self._step.packs else places
            shapes.add(StepShape(columns, tokens))
        return tuple(sorted(shapes - {self.one}, key=lambda shape: -shape.tokens))

    def compile(self, shapes: Iterable[StepShape]) -> None:
        """Runs each new shape once on padding alone, which compiles it and changes nothing."""
        for shape in sorted(set(shapes) - self._compiled) if self._graph else ():
            with kept_graphs([self._step], self.batch, shape.columns, shape.tokens):
                self(shape, ())
            self._compiled.add(shape)

    def __call__(self, shape: StepShape, pieces: Sequence[Piece]) -> np.ndarray:
        """Enters tokens into the cache.

        Args:
            shape: of the step; has room for the tokens.
            pieces: of different rows.

        Returns:
            Float32 [B, V]: the logits after the last token of each row that has any.
        """
        B, S = self.batch, shape.columns
        ids_BS, positions_BS = np.zeros((B, S), np.int32), np.full((B, S), -1, np.int32)
        last_B = np.zeros(B, np.int32)
        for piece in pieces:
            count = len(piece.ids)
            ids_BS[piece.row, :count] = piece.ids
            positions_BS[piece.row, :count] = np.arange(piece.start, piece.start + count)
            last_B[piece.row] = count - 1
        if shape.tokens == B * S:
            return self._run(shape, ids_BS, positions_BS, last_B)
        here = np.flatnonzero(positions_BS >= 0)
        # the rest are padding: any place without a token will do, and there are some, as P < B * S
        rows_P = np.full(shape.tokens, np.argmin(positions_BS), np.int32)
        rows_P[: len(here)] = here
        places_T = np.full(B * S, shape.tokens, np.int32)
        places_T[here] = np.arange(len(here))
        ids_P = ids_BS.reshape(-1)[rows_P]
        return self._run(shape, ids_P, positions_BS, last_B, rows_P, places_T)

    def _run(self, shape: StepShape, *arrays: np.ndarray) -> np.ndarray:
        inputs = [Tensor(array) for array in arrays]
        if not self._graph:
            return self._step(*inputs).asnumpy()
        # "increment": MindSpore takes the phase's graph without walking through all cells and
        # without looking at the shapes, so only steps of one column have this phase
        self._step.phase = "increment" if shape == self.one else "predict"
        with graph_mode():
            return self._step(*inputs).asnumpy()


def _power(length: int) -> int:
    """The smallest power of two that is not smaller."""
    return 1 << (length - 1).bit_length()
