"""A client that does not read its stream, over a real socket and without a model."""

import asyncio
import json
import socket
import time
from types import SimpleNamespace

import uvicorn

from mistral_ms.serving import job as job_module
from mistral_ms.serving.answers import CompletionAnswer
from mistral_ms.serving.connection import Connection
from mistral_ms.serving.job import EventStream, Job
from mistral_ms.serving.metrics import Metrics
from mistral_ms.serving.runner import Token
from mistral_ms.serving.schema import CompletionRequest

SECONDS = 1.0
PIECE = Token("x" * 20_000_000, 7)
"""More than the buffers of a connection hold: Linux has up to 4 and 6 MB for its two ends."""
LAST = Token("", 7, finish_reason="length")


class Runner:
    """Takes sequences and cancels them; tokens come from the test."""

    def __init__(self):
        self.listeners, self.cancelled = [], []
        self.engine, self.running, self.waiting = SimpleNamespace(batch=2), 0, 0

    def submit(self, sequence, on_token):
        self.listeners.append(on_token)

    def cancel(self, sequence):
        self.cancelled.append(sequence)


def served(tokens, reads):
    """Serves two sequences of which the first gets ``tokens``, and the second none.

    Returns:
        What the client got, and after how many seconds; the job, its runner, and the sequences
        that counted as not ended while the client did not read.
    """
    runner, jobs, made, left = Runner(), set(), [], []
    asked = CompletionRequest(model="m", prompt=["a", "b"], stream=True)
    sequences = [SimpleNamespace(prompt=[1]) for _ in range(2)]

    async def app(scope, receive, send):
        answer = CompletionAnswer("m", None, False)
        begun = time.monotonic()
        job = Job(runner, Metrics(runner), jobs, SECONDS, asked, answer, sequences, begun)
        made.append(job)
        for token in tokens:
            runner.listeners[0](token)
        await EventStream(job, "/")(scope, receive, send)

    async def run():
        server = uvicorn.Server(
            uvicorn.Config(app, http=Connection, port=0, lifespan="off", log_config=None)
        )
        serving = asyncio.ensure_future(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        begun, loop = time.monotonic(), asyncio.get_running_loop()
        with socket.create_connection(server.servers[0].sockets[0].getsockname()) as client:
            client.setblocking(False)
            await loop.sock_sendall(client, b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            if not reads:
                await asyncio.sleep(SECONDS / 2)
                left.append(made[0].left)
                while jobs and time.monotonic() < begun + 10:
                    await asyncio.sleep(0.02)
            seconds = time.monotonic() - begun
            got = b""
            try:
                while b"[DONE]" not in got and (part := await loop.sock_recv(client, 1 << 20)):
                    got += part
            except ConnectionResetError:
                pass
        server.should_exit = True
        await serving
        return got, seconds

    got, seconds = asyncio.run(run())
    assert not jobs
    return got, seconds, runner, sequences, left


def test_a_client_that_does_not_read_is_cut_off(monkeypatch, caplog):
    """At the end of the request's time; a sequence that has ended does not count until then."""
    monkeypatch.setattr(job_module, "LAST_WORDS_SECONDS", 0.1)
    got, seconds, runner, sequences, left = served([PIECE, PIECE, LAST], reads=False)
    assert SECONDS < seconds < 9  # of the 10 that the test waits
    assert left == [1]
    assert sequences[1] in runner.cancelled
    assert len(got) < 2 * len(PIECE.text), "the connection has ended before the stream"
    assert b"[DONE]" not in got
    assert [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")] == []


def test_a_client_that_reads_is_told_that_the_time_is_over():
    got, _, runner, sequences, _ = served([Token("x", 7), LAST], reads=True)
    error = json.loads(got.decode().split("data: ")[-2].split("\n\n")[0])
    assert "more than 1 s" in error["error"]["message"]
    assert runner.cancelled == [sequences[1]]
