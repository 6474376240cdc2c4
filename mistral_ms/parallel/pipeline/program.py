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
    """One message between two stages whose parts of the model follow each other.

    Attributes:
        pair: the first of the two stages; they are ``Topology.neighbours(pair, rank)``. With
            interleaved chunks also the last one, whose chunk the first stage's next one follows.
        phase: FORWARD carries activations on, BACKWARD their gradients back.
        micro_batch: whose.
        stages: pp.
        chunk: of the sender.
    """

    pair: int
    phase: Phase
    micro_batch: int
    stages: int
    chunk: int = 0

    @property
    def sender(self) -> int:
        """The stage that gives."""
        return self.pair if self.phase is Phase.FORWARD else (self.pair + 1) % self.stages

    @property
    def receiver(self) -> int:
        """The stage that gets."""
        return (self.pair + 1) % self.stages if self.phase is Phase.FORWARD else self.pair

    @property
    def receiving_chunk(self) -> int:
        """Of the receiver."""
        if self.pair < self.stages - 1:
            return self.chunk
        return self.chunk + (1 if self.phase is Phase.FORWARD else -1)


def common_order(schedule: Schedule) -> tuple[Step | Transfer, ...]:
    """All steps and messages of all stages, in the order that each stage keeps."""
    return tuple(event for _, event in sorted(_events(schedule), key=lambda item: item[0]))


def program(schedule: Schedule, stage: int) -> tuple[Step | Transfer, ...]:
    """The steps of a stage and the messages that it takes part in, in its order."""
    found = []
    for event in common_order(schedule):
        concerned = (event.stage,) if isinstance(event, Step) else (event.sender, event.receiver)
        if stage in concerned:
            found.append(event)
    return tuple(found)


Key = tuple[int, int, int, int, int]


def _events(schedule: Schedule) -> Iterator[tuple[Key, Step | Transfer]]:
    """Everything that happens: steps when they start, messages when they are ready, and those
    first: the step that waits for a message may start in the same slot.
    """
    parts = schedule.stages * schedule.chunks
    for row in schedule.steps:
        for step in row:
            place = step.stage, step.micro_batch, step.chunk
            yield (step.start, 1, *place), step
            part = step.chunk * schedule.stages + step.stage
            before = part if step.phase is Phase.FORWARD else part - 1
            if 0 <= before < parts - 1:
                pair = before % schedule.stages
                number, chunk = step.micro_batch, step.chunk
                transfer = Transfer(pair, step.phase, number, schedule.stages, chunk)
                yield (step.end, 0, *place), transfer
