"""From a request of HTTP to its answer: checks, prompts, tokens, refusals."""

from __future__ import annotations

import asyncio
import hmac
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect

from mistral_ms.config import GenerationConfig
from mistral_ms.config.base import validate
from mistral_ms.errors import MistralMsError
from mistral_ms.inference.sequence import RunningSequence
from mistral_ms.reading import parse_json
from mistral_ms.serving.answers import ChatAnswer, CompletionAnswer
from mistral_ms.serving.errors import ApiError, bad_request, draining, overloaded
from mistral_ms.serving.job import CLIENT_LEFT, EventStream, Job
from mistral_ms.serving.metrics import Metrics
from mistral_ms.serving.runner import EngineRunner, Token
from mistral_ms.serving.schema import ChatRequest, CompletionRequest, Request
from mistral_ms.serving.settings import ServerSettings
from mistral_ms.tokenizer import ChatFormat, Tokenizer

BODY_SECONDS = 30.0
"""In so much time a client has sent its request."""
_LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")


class Service:
    """Answers the requests of one event loop.

    Args:
        runner: the engine, started.
        tokenizer: the model's.
        settings: of the server.
        chat: how conversations become ids; or the error with which they are refused.

    Attributes:
        metrics: what is counted.
        draining: True refuses new requests.
        jobs: what is being answered.
    """

    def __init__(
        self,
        runner: EngineRunner,
        tokenizer: Tokenizer,
        settings: ServerSettings,
        chat: ChatFormat | MistralMsError,
    ) -> None:
        self.runner, self.tokenizer, self.settings = runner, tokenizer, settings
        self.metrics, self.created = Metrics(runner), int(time.time())
        self.draining = False
        self.jobs: set[Job] = set()
        self._chat = chat
        self._encoder = ThreadPoolExecutor(1, "tokenizer")

    @property
    def no_chat(self) -> str:
        """Why there are no chats; empty if there are."""
        return str(self._chat) if isinstance(self._chat, MistralMsError) else ""

    @property
    def healthy(self) -> bool:
        """Whether new requests are answered."""
        return not (self.draining or self.runner.failed)

    def model_card(self) -> dict[str, Any]:
        """The served model, as OpenAI's list has it."""
        return {
            "id": self.settings.model,
            "object": "model",
            "created": self.created,
            "owned_by": "mistral_ms",
            "max_model_len": self.runner.engine.max_length,
        }

    def check_host(self, request: HttpRequest) -> None:
        """Checks under which name the server is asked.

        Raises:
            ApiError: another name than this machine's, where only it may ask: a page in a browser
                whose name was pointed here.
        """
        host = request.headers.get("host", "")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if self.settings.local and name.lower() not in (*_LOCAL_NAMES, self.settings.host.lower()):
            raise ApiError(421, f"this server is not {host[:200]!r}", "wrong_host")

    def admit(self, request: HttpRequest) -> None:
        """Checks who asks.

        Raises:
            ApiError: see :meth:`check_host`; a missing or wrong key.
        """
        self.check_host(request)
        if self.settings.api_key is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(
            key.strip().encode("utf-8", "surrogateescape"), self.settings.api_key.encode()
        )
        if scheme.lower() != "bearer" or not right:
            headers = {"WWW-Authenticate": "Bearer"}
            raise ApiError(401, "no key, or a wrong one", "invalid_api_key", headers=headers)

    async def answer(self, request: HttpRequest, kind: type[Request]) -> Response:
        """Answers a request for text.

        Args:
            request: whose body was not read.
            kind: what it should hold.
        """
        begun = time.monotonic()
        try:
            self.admit(request)
            if self.draining:
                raise draining()
            if self.runner.failed:
                raise ApiError(500, "the engine has failed: see the server's log", "engine_failed")
            asked = _parse(kind, await self._body(request))
            if asked.model != self.settings.model:
                raise ApiError(404, f"no model {asked.model[:200]!r}", "model_not_found", "model")
            loop = asyncio.get_running_loop()
            sequences = await loop.run_in_executor(self._encoder, self._sequences, asked)
            job = self._start(asked, sequences, begun)
        except ApiError as error:
            self.metrics.requests.labels(request.url.path, error.status).inc()
            return refusal(error)
        except ClientDisconnect:
            self.metrics.requests.labels(request.url.path, CLIENT_LEFT).inc()
            return Response(status_code=CLIENT_LEFT)
        except asyncio.CancelledError:
            if not self.draining:
                raise
            return refusal(draining())  # the rest of its body did not come in time
        if asked.stream:
            return EventStream(job, request.url.path)
        return await self._whole(job, request)

    def abort(self) -> None:
        """Ends all jobs with an error."""
        for job in self.jobs:
            job.put(0, Token("", None, finish_reason="error", error="the server was shut down"))

    async def _body(self, request: HttpRequest) -> bytes:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            # a page of another site could send a form without being asked whether it may
            raise ApiError(415, "Content-Type must be application/json", "unsupported_media_type")
        body = bytearray()
        most = self.settings.most_body_bytes

        async def read() -> None:
            async for part in request.stream():
                body.extend(part)
                if len(body) > most:
                    raise ApiError(413, f"the body has more than {most} bytes", "body_too_large")

        try:
            await asyncio.wait_for(read(), BODY_SECONDS)
        except asyncio.TimeoutError:
            message = f"the body was not sent within {BODY_SECONDS:g} s"
            raise ApiError(408, message, "timeout") from None
        return bytes(body)

    def _sequences(self, asked: Request) -> list[RunningSequence]:
        """In a thread: long texts take a while."""
        try:
            if isinstance(asked, ChatRequest):
                if isinstance(self._chat, MistralMsError):
                    raise self._chat
                messages = [message.as_dict() for message in asked.messages]
                prompts = [self._chat.encode_chat(messages)]
            else:
                assert isinstance(asked, CompletionRequest)
                prompts = [
                    self.tokenizer.encode(prompt, bos=self.tokenizer.adds_bos)
                    if isinstance(prompt, str)
                    else prompt
                    for prompt in asked.prompts
                ]
            engine, continues = self.runner.engine, isinstance(asked, CompletionRequest)
            self._check_lengths(asked, prompts, engine.max_length)
            request = self._request(asked)
            return [
                engine.sequence(prompt, request, number=number, continues=continues)
                for number, prompt in enumerate(prompts)
            ]
        except MistralMsError as error:
            raise bad_request(error) from error

    def _check_lengths(
        self, asked: Request, prompts: Sequence[Sequence[int]], positions: int
    ) -> None:
        new = asked.told_tokens or 1
        longest = max(map(len, prompts))
        if longest + new > positions:
            raise ApiError(
                400,
                f"this model has {positions} positions here: {longest} tokens of the prompt and "
                f"{new} new ones are too many",
                "context_length_exceeded",
                "messages" if isinstance(asked, ChatRequest) else "prompt",
            )

    def _request(self, asked: Request) -> GenerationConfig:
        given = {
            "temperature": asked.temperature,
            "top_p": asked.top_p,
            "top_k": asked.top_k,
            "repetition_penalty": asked.repetition_penalty,
        }
        values = {
            "temperature": 1.0,
            **self.settings.sampling,
            **{key: value for key, value in given.items() if value is not None},
            "max_new_tokens": asked.new_tokens or self.runner.engine.max_length,
            "seed": secrets.randbits(63) if asked.seed is None else asked.seed % 2**64,
            "stop": asked.stops,
            "top_logprobs": asked.alternatives,
        }
        return validate(GenerationConfig, values, "request")

    def _start(self, asked: Request, sequences: list[RunningSequence], begun: float) -> Job:
        """Puts the sequences into the engine's queue.

        Raises:
            ApiError: there is no room, or the server has begun to end.
        """
        if self.draining:
            raise draining()
        slots, most = self.runner.engine.batch, self.settings.most_waiting
        if len(sequences) > slots + most:
            message = f"at most {slots + most} prompts in a request"
            raise ApiError(400, message, "too_many_prompts", "prompt")
        if sum(job.left for job in self.jobs) + len(sequences) > slots + most:
            raise overloaded(most)
        kind = ChatAnswer if isinstance(asked, ChatRequest) else CompletionAnswer
        answer = kind(self.settings.model, self.tokenizer, asked.wants_logprobs)
        seconds = self.settings.request_seconds
        return Job(self.runner, self.metrics, self.jobs, seconds, asked, answer, sequences, begun)

    async def _whole(self, job: Job, request: HttpRequest) -> Response:
        """The answer in one piece; a client that leaves ends it."""
        reading = asyncio.ensure_future(job.read_all())
        leaving = asyncio.ensure_future(_left(request))
        status, path = CLIENT_LEFT, request.url.path
        try:
            await asyncio.wait({reading, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                return Response(status_code=CLIENT_LEFT)
            reading.result()
            status = 200
            return JSONResponse(job.answer.complete(job.choices, job.usage))
        except ApiError as error:
            status = error.status
            return refusal(error)
        finally:
            for task in (reading, leaving):
                task.cancel()
            job.close(path, status)


def refusal(error: ApiError) -> JSONResponse:
    """The answer that says an error."""
    return JSONResponse(error.body, error.status, error.headers)


def _parse(kind: type[Request], body: bytes) -> Request:
    """The request that a body holds.

    Raises:
        ApiError: it does not.
    """
    try:
        values = parse_json(body.decode("utf-8"))
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {error}", "invalid_json") from error
    if not isinstance(values, dict):
        raise ApiError(400, "the body must be an object of JSON", "invalid_json")
    try:
        return validate(kind, values, "request")
    except MistralMsError as error:
        raise bad_request(error) from error


async def _left(request: HttpRequest) -> None:
    """Returns when the client has left; its body was read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
