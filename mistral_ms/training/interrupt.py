"""A polite end: SIGTERM and Ctrl-C let the step in progress finish."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mistral_ms.signals import ask, asked


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
        """The first signal is a request; a second one ends the process."""
        if self.number is not None:
            ask(number, frame)
        self.number = asked(number)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Catches SIGTERM and SIGINT inside the context; the handlers before come back after it.

    Under the command line Ctrl-C arrives here as a SIGTERM: see :mod:`mistral_ms.signals`.
    """
    request = StopRequest()
    signals = (signal.SIGTERM, signal.SIGINT)
    before = {number: signal.signal(number, request.receive) for number in signals}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
