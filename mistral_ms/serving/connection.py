"""A connection that what answers on it can cut off."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import Scope
from uvicorn.protocols.http.auto import AutoHTTPProtocol

_KEY = "transport"


class Connection(AutoHTTPProtocol):
    """The protocol of uvicorn's; the ``state`` of a request's scope has its transport.

    ASGI has no message that ends a connection whose client takes no bytes: uvicorn closes it only
    after what was written before has been taken.
    """

    app_state: dict[str, Any]

    def connection_made(self, transport: Any) -> None:
        """Called by the event loop."""
        super().connection_made(transport)
        self.app_state = {**self.app_state, _KEY: transport}


def cut_off(scope: Scope) -> bool:
    """Ends a request's connection at once; what its client has not taken is lost.

    Returns:
        False where the server is another one, whose connections cannot be ended so.
    """
    transport: asyncio.Transport | None = scope.get("state", {}).get(_KEY)
    if transport is None:
        return False
    transport.abort()
    return True
