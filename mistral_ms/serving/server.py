"""The process: listens, and ends in order."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from types import FrameType

import uvicorn

from mistral_ms.serving.app import make_app
from mistral_ms.serving.connection import Connection
from mistral_ms.serving.service import Service

_KEEP_ALIVE_SECONDS = 30
_LAST_WORDS_SECONDS = 2
"""How long aborted requests have for their errors."""


class Server(uvicorn.Server):
    """Serves until it is told to end; then new requests are refused with 503, and those that run
    have the settings' ``shutdown_seconds``. Told a second time, it ends them at once with an error.

    Args:
        service: answers.
        on_ready: called with the port when requests are taken.
    """

    def __init__(self, service: Service, on_ready: Callable[[int], None]) -> None:
        settings = service.settings
        super().__init__(
            uvicorn.Config(
                make_app(service),
                http=Connection,
                host=settings.host,
                port=settings.port,
                log_level="warning",
                access_log=False,
                lifespan="off",
                server_header=False,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=_LAST_WORDS_SECONDS,
            )
        )
        self.service, self._on_ready = service, on_ready
        self._drained_from: float | None = None
        self._hurried = False
        self._told: int | None = None

    def end(self) -> None:
        """Begins to end; from any thread."""
        if self.service.draining:
            self._hurried = True  # on_tick ends the jobs: this may be another thread
        self.service.draining = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal."""
        self._told = sig
        self.end()

    async def startup(self, *args: object, **options: object) -> None:
        """Listens."""
        await super().startup(*args, **options)
        if self.started:
            self._on_ready(self.servers[0].sockets[0].getsockname()[1])

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second."""
        if self.service.draining:
            now = time.monotonic()
            self._drained_from = now if self._drained_from is None else self._drained_from
            waited = now - self._drained_from
            overdue = self._hurried or waited > self.service.settings.shutdown_seconds
            if overdue:
                self.service.abort()
            if overdue or not self.service.jobs:
                self.should_exit = True
        return await super().on_tick(counter)

    def serve_until_told(self) -> None:
        """Serves; a signal that ended it is raised again afterwards, for what else it ends."""
        self.run()
        self.service.runner.stop()
        if self._told is not None:
            signal.raise_signal(self._told)
