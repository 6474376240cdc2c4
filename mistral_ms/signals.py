"""SIGINT and SIGTERM end a command with 130 and 143 at any moment, and what is half-written goes.

Two things stand in the way. A signal that arrives while a library is being imported may end in
the middle of its initialisation, whose own clean-up then crashes. And MindSpore, once it has
compiled a graph, answers SIGINT itself, by a SIGTERM. So SIGINT is blocked before the first thread
of a library starts, a thread of ours waits for it and wakes the main thread, and a process that was
asked to end leaves without the interpreter's farewell.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType

ASKING = (signal.SIGINT, signal.SIGTERM)
POLL_SECONDS = 0.5
"""How often the waiting thread looks whether it is still needed."""


class _State:
    """Of this process: who has asked it to end."""

    number: int | None = None
    interrupted = False


def asked(number: int) -> int:
    """The signal that a handler's ``number`` stands for: a SIGINT is passed on as SIGTERM."""
    return int(signal.SIGINT) if _State.interrupted else number


def ask(number: int, frame: FrameType | None) -> None:
    """A handler: the first signal unwinds the stack, a second one ends the process at once."""
    number = asked(number)
    if _State.number is not None:
        os._exit(128 + number)
    _State.number = number
    raise SystemExit(128 + number)


def run(command: Callable[[], None]) -> None:
    """Runs a command that SIGINT and SIGTERM may end at any moment, its imports included.

    Args:
        command: is called; what it raises goes on, unless a signal had come: then the process ends
            here, with 128 + the signal's number, whatever was made of it on the way out.
    """
    with _asked_by_signals():
        try:
            command()
        except BaseException:
            _leave_if_asked()
            raise
        _leave_if_asked()  # a library swallowed it


def _leave_if_asked() -> None:
    if _State.number is not None:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(128 + _State.number)


@contextlib.contextmanager
def _asked_by_signals() -> Iterator[None]:
    """Installs the handlers and the thread; leaves everything as it was."""
    main, done = threading.get_ident(), threading.Event()
    _State.number, _State.interrupted = None, False
    before = {number: signal.signal(number, ask) for number in ASKING}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

    def wait() -> None:
        while not done.is_set():
            if signal.sigtimedwait({signal.SIGINT}, POLL_SECONDS) is not None:
                _State.interrupted = True
                signal.pthread_kill(main, signal.SIGTERM)

    waiting = threading.Thread(target=wait, name="signals", daemon=True)
    waiting.start()
    try:
        yield
    finally:
        done.set()
        waiting.join()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in before.items():
            signal.signal(number, handler)
