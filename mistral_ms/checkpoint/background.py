"""Writing while the training goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType


class BackgroundWriter:
    """Runs one save at a time on a thread of its own; a context manager.

    This is safe because a save is given arrays that nobody changes any more, and because it only
    ever adds a complete checkpoint: a process that dies in the middle leaves the one before.
    Writing and hashing release Python's lock, so the training does go on.

    A failed save is never silent: its error comes out of the next :meth:`submit` or :meth:`check`,
    or at the end of the context.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._running: Future[object] | None = None

    def submit(self, save: Callable[[], object]) -> None:
        """Starts a save; waits for the one before first, so at most one copy is held.

        Raises:
            CheckpointError: the one before failed; this one is not started.
        """
        self.wait()
        self._running = self._pool.submit(save)

    def check(self) -> None:
        """Does not wait.

        Raises:
            CheckpointError: the last save has failed.
        """
        if self._running is not None and self._running.done():
            self.wait()

    def wait(self) -> None:
        """Waits for the save that is running.

        Raises:
            CheckpointError: it failed.
        """
        running, self._running = self._running, None
        if running is not None:
            running.result()

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finishes the save that is running, even on the way out of an error."""
        self._pool.shutdown()
        if error is None:
            self.wait()
        elif self._running is not None and (failure := self._running.exception()) is not None:
            note = f"and the checkpoint that was being written failed: {failure}"
            if sys.version_info >= (3, 11):
                error.add_note(note)
            else:
                print(note, file=sys.stderr)
