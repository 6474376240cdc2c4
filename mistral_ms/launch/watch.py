"""Judges signs of life: which rank is overdue, and which one the others wait for. No processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from mistral_ms.launch.heartbeat import FAILED, FINISHED, STEPPING, Beat

LEAST = 30.0
"""Seconds: no step counts as stuck before."""
TIMES = 10.0
"""So many times longer than the longest step so far."""


@dataclass(frozen=True)
class Limits:
    """Seconds without a sign of life.

    Attributes:
        step: in a step; None: derived from the steps so far.
        slow: in anything else, the first step included.
    """

    step: float | None = None
    slow: float = 1800.0


@dataclass(frozen=True)
class Overdue:
    """A rank that is too late.

    Attributes:
        rank: which.
        beat: its last sign of life; None when there never was one.
        seconds: since then.
        limit: what was allowed.
    """

    rank: int
    beat: Beat | None
    seconds: float
    limit: float


@dataclass
class _Seen:
    beat: Beat | None
    at: float
    longest: float | None = None
    steps: int = 0


class Watch:
    """Remembers when each rank's sign of life last changed, by the clock of who looks.

    Args:
        ranks: those of this machine.
        limits: how long they may be silent.
        now: the time, in seconds.
    """

    def __init__(self, ranks: Collection[int], limits: Limits, now: float) -> None:
        self._limits = limits
        self._seen = {rank: _Seen(None, now) for rank in ranks}

    def look(self, beats: Mapping[int, Beat | None], now: float) -> list[Overdue]:
        """Takes in the newest signs of life.

        Returns:
            The ranks that have been silent for too long, by number.
        """
        for rank, seen in self._seen.items():
            beat = beats.get(rank)
            if beat is not None and beat != seen.beat:
                self._change(seen, beat, now)
        late = []
        for rank, seen in self._seen.items():
            if seen.beat is not None and seen.beat.phase in (FINISHED, FAILED):
                continue
            limit, silent = self._limit(seen), now - seen.at
            if silent > limit:
                late.append(Overdue(rank, seen.beat, silent, limit))
        return late

    def is_quiet(self, now: float) -> bool:
        """Whether some rank has used up half of what a step may take: time to look closer."""
        return any(
            seen.beat is not None
            and seen.beat.phase == STEPPING
            and now - seen.at > self._limit(seen) / 2
            for seen in self._seen.values()
        )

    def _change(self, seen: _Seen, beat: Beat, now: float) -> None:
        before = seen.beat
        if beat.phase == STEPPING and before is not None and beat.step > before.step:
            seen.steps += 1
            took = now - seen.at
            # the first step compiles: it bounds the second one, and is forgotten then
            seen.longest = took if seen.steps <= 2 else max(seen.longest or 0.0, took)
        seen.beat, seen.at = beat, now

    def _limit(self, seen: _Seen) -> float:
        if seen.beat is None or seen.beat.phase != STEPPING or seen.steps == 0:
            return self._limits.slow
        if self._limits.step is not None:
            return self._limits.step
        longest = max(each.longest or 0.0 for each in self._seen.values())
        return max(LEAST, TIMES * longest)


def stands_out(
    beats: Mapping[int, Beat | None],
    stopped: Collection[int],
    stacks: Mapping[int, str],
) -> tuple[int, str] | None:
    """The rank that the others wait for, with the reason; None when all are alike.

    Processes that wait for each other look stuck alike. The culprit is the one that a signal has
    stopped; or that has done fewer steps; or whose Python stack is unlike that of all others.

    Args:
        beats: last signs of life.
        stopped: ranks whose processes are stopped.
        stacks: their Python stacks, of those that could still tell.
    """
    if stopped:
        return min(stopped), "a signal has stopped its process (SIGSTOP?)"
    steps = {rank: -1 if beat is None else beat.step for rank, beat in beats.items()}
    behind = [rank for rank, step in steps.items() if step < max(steps.values(), default=-1)]
    if len(behind) == 1:
        return behind[0], f"the others have done step {max(steps.values())}"
    if dumb := [rank for rank in beats if not stacks.get(rank)]:
        return (dumb[0], "it no longer answers signals") if len(dumb) == 1 else None
    places = {rank: _place(stack) for rank, stack in stacks.items()}
    common, count = Counter(places.values()).most_common(1)[0]
    others = [rank for rank, place in places.items() if place != common]
    if len(others) == 1 and count > 1:
        return others[0], f"it is not where the others wait, but in {places[others[0]][0]}"
    return None


def _place(stack: str) -> tuple[str, ...]:
    """The frames of a stack, innermost first, without its first line (which names a thread)."""
    lines = [line.strip() for line in stack.splitlines() if line.strip().startswith("File ")]
    return tuple(lines) or ("?",)
