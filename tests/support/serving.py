"""A server in a thread, and requests to it by OpenAI's client or plain HTTP."""

import dataclasses
import json
import re
import threading
import time

import httpx
import numpy as np

from mistral_ms.serving.server import Server
from mistral_ms.serving.service import Service
from mistral_ms.serving.settings import ServerSettings

KEY = "a-key-that-nobody-guesses"
MODEL = "tiny"
SETTINGS = ServerSettings(model=MODEL, port=0, api_key=KEY, shutdown_seconds=20.0)
LENGTH = 1000
TEXT = "The harbour of the town"
MESSAGES = [
    {"role": "system", "content": "Answer briefly."},
    {
        "role": "user",
        "content": [
            {"type": "text", "text": "Where is the "},
            {"type": "text", "text": "harbour?"},
        ],
    },
]
SAMPLED = {"temperature": 0.8, "top_p": 0.9, "seed": 11}
CROWD = 64


def crowd():
    """Prompts of 64 clients, as ids."""
    rng = np.random.default_rng(0)
    return [rng.integers(3, 32000, int(n)).tolist() for n in rng.integers(1, 40, CROWD)]


@dataclasses.dataclass
class Running:
    """A server in a thread, and what belongs to it."""

    server: Server
    thread: threading.Thread
    url: str

    @property
    def service(self):
        return self.server.service

    def end(self):
        self.server.end()
        self.thread.join(30)
        assert not self.thread.is_alive()


def start(runner, engine, chat, settings):
    ready = threading.Event()
    ports = []

    def on_ready(port):
        ports.append(port)
        ready.set()

    server = Server(Service(runner, engine.tokenizer, settings, chat), on_ready)
    thread = threading.Thread(target=server.run)
    thread.start()
    assert ready.wait(30)
    return Running(server, thread, f"http://127.0.0.1:{ports[0]}")


def complete(client, **values):
    values = {"model": MODEL, "prompt": TEXT, "max_tokens": 12, "temperature": 0, **values}
    return client.completions.create(**values)


def talk(client, **values):
    values = {"model": MODEL, "messages": MESSAGES, "max_tokens": 12, "temperature": 0, **values}
    return client.chat.completions.create(**values)


def figures(running):
    """The server's metrics, by name and labels."""
    text = httpx.get(f"{running.url}/metrics", trust_env=False).text
    return {k: float(v) for k, v in re.findall(r"^(mistral_ms_\S+) (\S+)$", text, re.MULTILINE)}


def idle(running):
    """Waits until no sequence has a slot, or wants one."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        found = figures(running)
        if not found["mistral_ms_sequences_running"] + found["mistral_ms_sequences_waiting"]:
            return found
        time.sleep(0.02)
    raise AssertionError("slots are not free")


GOOD = {"model": MODEL, "prompt": "x", "max_tokens": 2}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
HEADERS = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}


def post(running, body, path="completions", **headers):
    content = json.dumps(body) if isinstance(body, dict) else body
    return httpx.post(
        f"{running.url}/v1/{path}",
        content=content,
        headers={**HEADERS, **headers},
        trust_env=False,
        timeout=30,
    )


def refused(response, status, text):
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert text in error["message"]
    return error
