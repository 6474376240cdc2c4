"""What one stage does, step by step, its messages included.

A message between two stages is a meeting: both sides wait for each other. If every stage runs its
part of one common order of all steps and messages, nobody waits for ever: whatever comes first in
that order and is not done yet can always be done by those whom it concerns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mistral_ms.parallel.pipeline.schedule import Phase, Schedule, Step


@dataclass(frozen=True)
class Transfer:
    """One message between two consecutive stages.

    Attributes:
        pair: the first of the two stages; they are ``Topology.neighbours(pair, rank)``.
        phase: FORWARD carries activations on, BACKWARD their gradients back.
        micro_batch: whose.
    """

    pair: int
    phase: Phase
    micro_batch: int

    @property
    def sender(self) -> int:
        """The stage that gives."""
        return self.pair if self.phase is Phase.FORWARD else self.pair + 1

    @property
    def receiver(self) -> int:
        """The stage that gets."""
        return self.pair + 1 if self.phase is Phase.FORWARD else self.pair


def program(schedule: Schedule, stage: int) -> tuple[Step | Transfer, ...]:
    """The steps of a stage and the messages that it takes part in, in its order."""
    found = []
    for _, event in sorted(_events(schedule), key=lambda item: item[0]):
        concerned = (event.stage,) if isinstance(event, Step) else (event.sender, event.receiver)
        if stage in concerned:
            found.append(event)
    return tuple(found)


Key = tuple[int, int, int, int]


def _events(schedule: Schedule) -> Iterator[tuple[Key, Step | Transfer]]:
    """Everything that happens: steps when they start, messages when they are ready, and those
    first: the step that waits for a message may start in the same slot.
    """
    for row in schedule.steps:
        for step in row:
            yield (step.start, 1, step.stage, step.micro_batch), step
            forward = step.phase is Phase.FORWARD
            pair = step.stage if forward else step.stage - 1
            if 0 <= pair < schedule.stages - 1:
                transfer = Transfer(pair, step.phase, step.micro_batch)
                yield (step.end, 0, step.stage, step.micro_batch), transfer
