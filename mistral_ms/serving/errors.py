"""Refusals in the shape of OpenAI's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mistral_ms.errors import MistralMsError


class ApiError(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        message: for people.
        code: for programs.
        param: the part of the request that is at fault.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """As OpenAI's clients expect it."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {
            "error": {
                "message": self.message, "type": kind, "param": self.param, "code": self.code,
            }
        }  # fmt: skip


def bad_request(error: MistralMsError, code: str | None = None) -> ApiError:
    """Of an error that the request has caused."""
    where = str(error.where).removeprefix("request: ") if error.where is not None else None
    # the checks are those of configurations
    message = str(error).replace("invalid configuration: request: ", "", 1)
    return ApiError(400, message, code, where)


def draining() -> ApiError:
    """Of a server that ends."""
    return ApiError(
        503, "the server is shutting down", "shutting_down", headers={"Retry-After": "5"}
    )


def overloaded(waiting: int) -> ApiError:
    """Of a queue that is full."""
    message = f"{waiting} prompts are waiting, which is the most: try again later"
    return ApiError(429, message, "queue_full", headers={"Retry-After": "1"})


def timed_out(seconds: float) -> ApiError:
    """Of a request that took too long."""
    return ApiError(504, f"the request took more than {seconds:g} s", "timeout")
