"""A request while it is answered: its tokens, its stream, its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from mistral_ms.inference.sequence import RunningSequence
from mistral_ms.serving.answers import Answer, Choice, Usage
from mistral_ms.serving.connection import cut_off
from mistral_ms.serving.errors import ApiError, timed_out
from mistral_ms.serving.metrics import Metrics
from mistral_ms.serving.runner import EngineRunner, OnToken, Token
from mistral_ms.serving.schema import Request

CLIENT_LEFT = 499
"""The status in the metrics of a request whose client left; nobody is told."""
LAST_WORDS_SECONDS = 1.0
"""How long after a request's time its client may take the bytes that say so."""


class Job:
    """A request that is being answered.

    Args:
        runner: computes the sequences.
        metrics: counts.
        jobs: has the job until it is closed.
        seconds: the most time, from ``begun``.
        asked: the request.
        answer: its form.
        sequences: one for each prompt.
        begun: when the request came.

    Attributes:
        choices: one for each prompt.
        usage: tokens that were read so far.
    """

    def __init__(
        self,
        runner: EngineRunner,
        metrics: Metrics,
        jobs: set[Job],
        seconds: float,
        asked: Request,
        answer: Answer,
        sequences: Sequence[RunningSequence],
        begun: float,
    ) -> None:
        self.asked, self.answer = asked, answer
        self.choices = [Choice(index) for index in range(len(sequences))]
        self.usage = Usage(sum(len(sequence.prompt) for sequence in sequences))
        self._ended: set[int] = set()
        self._runner, self._metrics, self._jobs = runner, metrics, jobs
        self._sequences, self._seconds, self._begun = sequences, seconds, begun
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[tuple[int, Token]] = asyncio.Queue()
        jobs.add(self)
        metrics.prompt_tokens.inc(self.usage.prompt_tokens)
        for index, sequence in enumerate(sequences):
            runner.submit(sequence, self._listener(index))

    @property
    def left(self) -> int:
        """Sequences that have not ended, whether their tokens were read or not."""
        return len(self._sequences) - len(self._ended)

    @property
    def told(self) -> bool:
        """Whether all tokens of all sequences were read."""
        return all(choice.finish_reason is not None for choice in self.choices)

    @property
    def rest(self) -> float:
        """Seconds until the request's time is over; negative afterwards."""
        return self._begun + self._seconds - time.monotonic()

    def put(self, index: int, token: Token) -> None:
        """Adds a token of a sequence. From the event loop."""
        if token.finish_reason is not None:
            self._ended.add(index)
        self._queue.put_nowait((index, token))

    def _listener(self, index: int) -> OnToken:
        def listen(token: Token) -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self.put, index, token)

        return listen

    async def tokens(self) -> AsyncIterator[tuple[Choice, Token]]:
        """All tokens as they come, with the choices that have taken them.

        Raises:
            ApiError: the time is over, or an error of the engine.
        """
        metrics = self._metrics
        while not self.told:
            if (rest := self.rest) <= 0:  # also where tokens wait for a client that reads slowly
                raise timed_out(self._seconds)
            try:
                index, token = await asyncio.wait_for(self._queue.get(), rest)
            except asyncio.TimeoutError:
                raise timed_out(self._seconds) from None
            if token.error is not None:
                raise ApiError(500, token.error, "generation_failed")
            if not self.usage.completion_tokens:
                metrics.first_token_seconds.observe(time.monotonic() - self._begun)
            self.usage.completion_tokens += 1
            metrics.generated_tokens.inc()
            choice = self.choices[index]
            choice.take(token, self.asked.wants_logprobs)
            yield choice, token

    async def read_all(self) -> None:
        """Reads to the end.

        Raises:
            ApiError: see :meth:`tokens`.
        """
        async for _ in self.tokens():
            pass

    async def events(self) -> AsyncIterator[bytes]:
        """The stream's server-sent events. Errors are events, too."""
        counts = self.asked.counts_usage
        try:
            for choice in self.choices:
                if (first := self.answer.first(choice, counts)) is not None:
                    yield _event(first)
            async for choice, token in self.tokens():
                if token.text or choice.finish_reason or self.asked.wants_logprobs:
                    yield _event(self.answer.piece(choice, token, counts))
            if counts:
                yield _event(self.answer.count(self.usage))
        except ApiError as error:
            yield _event(error.body)
        yield b"data: [DONE]\n\n"

    def close(self, path: str, status: int) -> None:
        """Ends what has not ended, and counts the request."""
        self._jobs.discard(self)
        self._metrics.requests.labels(path, status).inc()
        self._metrics.request_seconds.labels(path).observe(time.monotonic() - self._begun)
        for choice, sequence in zip(self.choices, self._sequences, strict=True):
            if choice.finish_reason is None:
                self._runner.cancel(sequence)


class EventStream(StreamingResponse):
    """A job's events; when the client leaves, the job is closed. A client that does not take them
    is cut off when the job's time is over.

    Args:
        job: is closed in any case.
        path: of the request.
    """

    def __init__(self, job: Job, path: str) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(job.events(), media_type="text/event-stream", headers=headers)
        self._job, self._path = job, path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends it."""

        async def send_in_time(message: Message) -> None:
            # waits while the connection's buffer is full
            rest = max(self._job.rest, 0.0) + LAST_WORDS_SECONDS
            try:
                await asyncio.wait_for(send(message), rest)
            except asyncio.TimeoutError:
                raise _NotTakenError from None

        try:
            await super().__call__(scope, receive, send_in_time)
        except _NotTakenError:
            if cut_off(scope):
                await self.listen_for_disconnect(receive)
        finally:
            self._job.close(self._path, 200 if self._job.told else CLIENT_LEFT)


class _NotTakenError(Exception):
    """The client has not taken what was sent."""


def _event(values: dict[str, Any]) -> bytes:
    text = json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()
