"""What a server is told at its start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

LENGTH = 4096
"""Positions for prompt and new tokens unless told otherwise, where the model has so many."""


@dataclass(frozen=True)
class ServerSettings:
    """How a server answers, and what it refuses.

    Attributes:
        model: the name under which the model is served.
        host: the address that is listened on.
        port: 0 takes a free one.
        api_key: what a request must bring as ``Authorization: Bearer``; None: nothing.
        sampling: defaults of temperature, top_p and so on where a request does not say them.
        most_waiting: sequences that may wait for a slot; more are refused.
        most_body_bytes: of a request.
        request_seconds: the most time that a request takes, its wait for a slot included.
        shutdown_seconds: how long running requests may go on after the server was told to end.
    """

    model: str
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    sampling: Mapping[str, float] = field(default_factory=dict)
    most_waiting: int = 128
    most_body_bytes: int = 1 << 20
    request_seconds: float = 600.0
    shutdown_seconds: float = 30.0

    @property
    def local(self) -> bool:
        """Whether only this machine can connect."""
        return self.host in ("127.0.0.1", "::1", "localhost")
