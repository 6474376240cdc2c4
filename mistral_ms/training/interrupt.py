"""A polite end: SIGTERM and Ctrl-C let the step in progress finish."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether somebody asked the training to stop; called by the loop before each step.

    Attributes:
        number: the signal that asked; None while nobody has.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def __call__(self) -> bool:
        """True once a signal has come."""
        return self.number is not None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """The first signal is a request; a second one ends the process at once."""
        if self.number is not None:
            raise SystemExit(128 + number)
        self.number = number


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Catches SIGTERM and SIGINT inside the context; the handlers before come back after it.

    MindSpore, once it has compiled a graph, answers SIGINT by sending its process a SIGTERM: that
    is why Ctrl-C arrives here as one.
    """
    request = StopRequest()
    signals = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, request.receive) for number in signals}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
