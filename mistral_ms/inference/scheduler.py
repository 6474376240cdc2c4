"""Continuous batching: which sequence has which slot of the cache, and what each step computes.

A sequence keeps its slot until it ends; then the next one in the queue has it at once (Orca, Yu et
al., OSDI 2022). A step takes the newest token of every sequence whose prompt is in the cache, and
as far as there is room pieces of the prompts that are not, the oldest first: so a long prompt comes
in bit by bit beside the others (Sarathi-Serve, arXiv:2403.02310). What a sequence computes does not
depend on its neighbours: dropless routing gives every token all its experts.

A slot is empty at first, is not cleared for its next sequence, and need not be. Position p lies in
column p % length, and when a query at position q looks, its sequence has entered the positions 0 to
q in order. If q is ``length`` - 1 or more, they have overwritten every column. Otherwise they have
overwritten the columns 0 to q; any other column, with a number c > q, may hold a position k of the
sequence before, and k >= k % length = c > q: the query does not see what comes after it.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mistral_ms.inference.sampling import LogitsError
from mistral_ms.inference.sequence import RunningSequence
from mistral_ms.inference.steps import Piece, Steps, StepShape


@dataclass(frozen=True)
class Progress:
    """What a step did to a sequence: one more token, or its end by an error.

    Attributes:
        sequence: it has the token, its log-probability, and whether it has ended.
        text: the text that has become certain by the token.
    """

    sequence: RunningSequence
    text: str


@dataclass
class Work:
    """What was computed so far.

    Attributes:
        prefill_tokens: prompt tokens.
        prefill_seconds: the time they took; that of a step with both kinds is divided by numbers.
        decode_tokens: tokens computed one at a time.
        decode_seconds: the time they took, and the choice of all tokens.
    """

    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0


class Scheduler:
    """Runs sequences in the slots of a cache. Not for several threads.

    Args:
        steps: the model's step.
        shapes: shapes for prompts, the largest first, as ``steps`` gives them.
        clear: forgets and zeroes the whole cache.

    Attributes:
        work: what was computed so far.
    """

    def __init__(
        self, steps: Steps, shapes: Sequence[StepShape], clear: Callable[[], None]
    ) -> None:
        self._steps, self._shapes, self._clear = steps, tuple(shapes), clear
        self._slots: list[RunningSequence | None] = [None] * steps.batch
        self._waiting: deque[RunningSequence] = deque()
        self._tainted: set[int] = set()  # slots that may hold what is not finite
        self._order: list[int] = []  # slots, by the arrival of their sequences
        self.work = Work()

    @property
    def running(self) -> int:
        """Sequences that have a slot."""
        return len(self._order)

    @property
    def waiting(self) -> int:
        """Sequences that have none yet."""
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._order or self._waiting)

    def add(self, sequence: RunningSequence) -> None:
        """Puts a sequence at the end of the queue."""
        self._waiting.append(sequence)

    def cancel(self, sequence: RunningSequence) -> None:
        """Ends a sequence where it is; of one that has ended nothing changes."""
        if sequence.finished:
            return
        sequence.finish_reason = "cancelled"
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        elif sequence in self._slots:
            row = self._slots.index(sequence)
            if sequence.cached and not sequence.new_ids:  # nobody has looked at its logits
                self._tainted.add(row)
            self._release(row)

    def step(self) -> list[Progress]:
        """Computes one step; returns what it did, the oldest sequence first."""
        self._fill()
        if not self._order:
            return []
        shape, pieces = self._plan()
        begun = time.perf_counter()
        logits_BV = self._steps(shape, pieces)
        computed = time.perf_counter()
        found: list[Progress] = []
        prefilled = 0
        for piece in pieces:
            sequence = self._slots[piece.row]
            assert sequence is not None
            prefilled += len(piece.ids) if not sequence.new_ids else 0
            sequence.cached += len(piece.ids)
            if sequence.cached == sequence.length:
                found.append(self._choose(sequence, piece.row, logits_BV[piece.row]))
        self._count(prefilled, sum(len(piece.ids) for piece in pieces), begun, computed)
        return found

    def _fill(self) -> None:
        """Gives free slots to the next sequences of the queue. Slots that may hold what is not
        finite wait until no sequence runs, and if they are half of all, the queue waits, too.
        """
        if self._tainted and not self._order:
            self._clear()
            self._tainted.clear()
        if 2 * len(self._tainted) >= len(self._slots):
            return
        for row, held in enumerate(self._slots):
            if not self._waiting:
                return
            if held is None and row not in self._tainted:
                self._slots[row] = self._waiting.popleft()
                self._order.append(row)

    def _plan(self) -> tuple[StepShape, list[Piece]]:
        """The shape of the next step, and what it computes."""
        left = {row: held.length - held.cached for row in self._order if (held := self._slots[row])}
        shape = self._steps.one
        if self._shapes and any(count > 1 for count in left.values()):
            shape = self._shapes[-1]
            for larger in self._shapes[:-1]:  # where it would be at least half full
                if 2 * sum(min(count, larger.columns) for count in left.values()) >= larger.tokens:
                    shape = larger
                    break
        room = shape.tokens - sum(count == 1 for count in left.values())
        pieces = []
        for row, count in left.items():
            taken = 1 if count == 1 else min(count, shape.columns, room)
            room -= taken if count > 1 else 0
            held = self._slots[row]
            if taken and held is not None:
                ids = held.tokens(held.cached, held.cached + taken)
                pieces.append(Piece(row, held.cached, ids))
        return shape, pieces

    def _choose(self, sequence: RunningSequence, row: int, logits_V: np.ndarray) -> Progress:
        """The next token of a sequence."""
        try:
            text = sequence.choose(logits_V)
        except LogitsError as error:
            text, sequence.error, sequence.finish_reason = "", error, "error"
            self._tainted.add(row)
        if sequence.finished:
            self._release(row)
        return Progress(sequence, text)

    def _release(self, row: int) -> None:
        self._slots[row] = None
        self._order.remove(row)

    def _count(self, prefilled: int, tokens: int, begun: float, computed: float) -> None:
        share = prefilled / tokens
        self.work.prefill_tokens += prefilled
        self.work.decode_tokens += tokens - prefilled
        self.work.prefill_seconds += share * (computed - begun)
        self.work.decode_seconds += (1 - share) * (computed - begun)
        self.work.decode_seconds += time.perf_counter() - computed
