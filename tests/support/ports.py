"""Ports for jobs of tests."""

from __future__ import annotations

import random
import socket

FIRST, LAST = 20000, 32000
"""Below the ports that the system gives to connections (32768 and up): one of those would be taken
again, now and then, before the job's scheduler listens to it.
"""


def free_port() -> int:
    """One that nobody listens to."""
    source = random.SystemRandom()
    while True:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", source.randint(FIRST, LAST)))
            except OSError:
                continue
            port: int = probe.getsockname()[1]
            return port
