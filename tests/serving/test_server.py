"""The server over real sockets, asked by OpenAI's client: its answers are the engine's."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import json
import re
import threading
import time

import httpx
import numpy as np
import openai
import pytest
from support.hf import make_pair

from mistral_ms.config import GenerationConfig
from mistral_ms.inference import Engine
from mistral_ms.serving.runner import EngineRunner
from mistral_ms.serving.server import Server
from mistral_ms.serving.service import Service
from mistral_ms.serving.settings import ServerSettings
from mistral_ms.tokenizer import ChatFormat, copy_files, packaged_tokenizer

pytestmark = pytest.mark.slow  # some 25 s of processor time

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


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    path = tmp_path_factory.mktemp("served")
    pair = make_pair(
        "mixtral", vocab_size=32000, hidden_size=32, max_position_embeddings=1024, eos_token_id=None
    )
    pair.hf.save_pretrained(path)
    copy_files(packaged_tokenizer(), path)
    # no end token: how long an answer is depends on the request alone
    return Engine.load(path, batch=4, max_length=LENGTH, chunk=32, eos_ids=())


@pytest.fixture(scope="module")
def chat(engine):
    return ChatFormat(engine.tokenizer, "mistral")


@pytest.fixture(scope="module")
def wanted(engine, chat):
    """What the engine itself generates, before the server has it."""
    # the shapes that the server needs anyway: nothing more is compiled
    engine.steps.prefill_shapes = lambda lengths, chunk: engine.steps.fixed_shapes(chunk)
    text = engine.tokenizer.encode(TEXT)
    turns = chat.encode_chat(
        [{**MESSAGES[0]}, {"role": "user", "content": "Where is the harbour?"}]
    )

    def one(ids, continues, **settings):
        request = GenerationConfig(**settings)
        return engine.generate([ids], request, continues=continues).completions[0]

    return {
        "greedy": one(text, True, max_new_tokens=12, top_logprobs=2),
        "sampled": one(text, True, max_new_tokens=12, **SAMPLED),
        "chat": one(turns, False, max_new_tokens=12, top_logprobs=2),
        "chat sampled": one(turns, False, max_new_tokens=12, **SAMPLED),
        "crowd": engine.generate(crowd(), GenerationConfig(max_new_tokens=5)).completions,
        "prompt": len(text),
        "chat prompt": len(turns),
    }


@pytest.fixture(scope="module")
def runner(engine, wanted):
    runner = EngineRunner(engine)
    runner.start()
    yield runner
    runner.stop()


@pytest.fixture(scope="module")
def running(runner, engine, chat):
    running = start(runner, engine, chat, SETTINGS)
    yield running
    running.end()


@pytest.fixture(scope="module")
def client(running):
    with httpx.Client(trust_env=False) as inner:
        yield openai.OpenAI(
            base_url=f"{running.url}/v1", api_key=KEY, max_retries=0, http_client=inner, timeout=60
        )


@pytest.fixture
def settings(running):
    """A function that changes the server's settings for one test."""

    def change(**values):
        running.service.settings = dataclasses.replace(SETTINGS, **values)

    yield change
    running.service.settings = SETTINGS


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


class TestAnswers:
    @pytest.mark.parametrize("way", ["greedy", "sampled"])
    def test_completion(self, client, wanted, way):
        found = complete(client, **(SAMPLED if way == "sampled" else {}))
        assert found.object == "text_completion"
        assert found.choices[0].text == wanted[way].text
        assert found.choices[0].finish_reason == "length"
        assert found.usage.prompt_tokens == wanted["prompt"]
        assert found.usage.completion_tokens == 12
        assert found.usage.total_tokens == wanted["prompt"] + 12

    @pytest.mark.parametrize("way", ["chat", "chat sampled"])
    def test_chat(self, client, wanted, way):
        found = talk(client, **(SAMPLED if "sampled" in way else {}))
        assert found.object == "chat.completion"
        assert found.choices[0].message.role == "assistant"
        assert found.choices[0].message.content == wanted[way].text
        assert found.usage.prompt_tokens == wanted["chat prompt"]

    def test_completion_streamed(self, client, wanted):
        chunks = list(complete(client, stream=True, stream_options={"include_usage": True}))
        assert "".join(c.choices[0].text for c in chunks[:-1]) == wanted["greedy"].text
        assert [c.choices[0].finish_reason for c in chunks[:-1]][-2:] == [None, "length"]
        assert chunks[-1].choices == []
        assert chunks[-1].usage.completion_tokens == 12
        assert len({c.id for c in chunks}) == 1

    def test_chat_streamed(self, client, wanted):
        chunks = list(talk(client, stream=True))
        assert chunks[0].choices[0].delta.role == "assistant"
        pieces = [c.choices[0].delta.content or "" for c in chunks]
        assert "".join(pieces) == wanted["chat"].text
        assert len([piece for piece in pieces if piece]) > 2, "in pieces"
        assert chunks[-1].choices[0].finish_reason == "length"
        assert all(c.usage is None for c in chunks)

    def test_stop(self, client, wanted):
        text = wanted["greedy"].text
        stop = text[len(text) // 2 : len(text) // 2 + 3]
        choice = complete(client, stop=[stop, "never this"]).choices[0]
        assert choice.text == text[: text.index(stop)]
        assert choice.finish_reason == "stop"

    def test_logprobs_of_a_completion(self, client, engine, wanted):
        done = wanted["greedy"]
        (choice,) = complete(client, logprobs=2).choices
        found = choice.logprobs
        # the same steps beside other rows: float32 products in other shapes
        np.testing.assert_allclose(found.token_logprobs, done.logprobs, atol=1e-4)
        assert [len(top) for top in found.top_logprobs] == [2] * 12
        for top, own, name in zip(
            found.top_logprobs, found.token_logprobs, found.tokens, strict=True
        ):
            assert top[name] == own == max(top.values()), "greedy"
        names = [engine.tokenizer.piece(i).text for i in done.token_ids]
        assert [a for a, b in zip(found.tokens, names, strict=True) if b] == list(
            filter(None, names)
        )
        assert found.text_offset[0] == 0
        assert found.text_offset == sorted(found.text_offset)

    def test_logprobs_of_a_chat_streamed(self, client, wanted):
        chunks = list(talk(client, stream=True, logprobs=True, top_logprobs=2))
        entries = [e for c in chunks[1:] for e in c.choices[0].logprobs.content]
        done = wanted["chat"]
        np.testing.assert_allclose([e.logprob for e in entries], done.logprobs, atol=1e-4)
        for entry, top in zip(entries, done.top_logprobs, strict=True):
            found = [each.logprob for each in entry.top_logprobs]
            np.testing.assert_allclose(found, [logprob for _, logprob in top], atol=1e-4)
            assert bytes(entry.bytes).decode("utf-8", "replace") == entry.token

    def test_a_seed_repeats_and_none_does_not(self, client):
        hot = {"temperature": 1.5, "max_tokens": 16}
        seeded = {complete(client, seed=5, **hot).choices[0].text for _ in range(2)}
        free = {complete(client, **hot).choices[0].text for _ in range(2)}
        assert (len(seeded), len(free)) == (1, 2)

    def test_several_prompts_and_ids(self, client, engine, wanted):
        ids = engine.tokenizer.encode(TEXT)
        found = complete(client, prompt=[ids, crowd()[3]], max_tokens=5)
        assert [choice.index for choice in found.choices] == [0, 1]
        assert wanted["greedy"].text.startswith(found.choices[0].text)
        assert found.choices[1].text == wanted["crowd"][3].text

    def test_as_many_tokens_as_there_are_positions(self, client, chat):
        """A chat without max_tokens; the default of completions is OpenAI's."""
        messages = [{"role": "user", "content": "a " * 930}]
        prompt = len(chat.encode_chat(messages))
        found = talk(client, messages=messages, max_tokens=None)
        assert found.usage.completion_tokens == LENGTH - prompt > 0
        assert complete(client, max_tokens=None).usage.completion_tokens == 16

    def test_64_at_once(self, running, wanted):
        """Of 64 clients, each with a connection of its own, everyone gets its own answer."""

        async def ask():
            limits = httpx.Limits(max_connections=CROWD)
            async with httpx.AsyncClient(trust_env=False, limits=limits) as inner:
                client = openai.AsyncOpenAI(
                    base_url=f"{running.url}/v1", api_key=KEY, max_retries=0, http_client=inner
                )

                async def one(number, prompt):
                    values = {"prompt": prompt, "max_tokens": 5, "temperature": 0, "model": MODEL}
                    if number % 2:
                        return (await client.completions.create(**values)).choices[0].text
                    stream = await client.completions.create(**values, stream=True)
                    return "".join([chunk.choices[0].text async for chunk in stream])

                return await asyncio.gather(*(one(*each) for each in enumerate(crowd())))

        assert asyncio.run(ask()) == [done.text for done in wanted["crowd"]]


class TestClientsThatLeave:
    def test_from_a_stream(self, client, running):
        before = idle(running)
        with complete(client, stream=True, max_tokens=900) as stream:
            next(iter(stream))
        after = idle(running)
        left = 'mistral_ms_requests_total{endpoint="/v1/completions",status="499"}'
        assert after[left] - before.get(left, 0.0) == 1
        name = "mistral_ms_generated_tokens_total"
        assert 0 < after[name] - before[name] < 900

    def test_from_an_answer(self, client, running):
        before = idle(running)
        with pytest.raises(openai.APITimeoutError):
            complete(client.with_options(timeout=0.2), max_tokens=990)
        after = idle(running)
        left = 'mistral_ms_requests_total{endpoint="/v1/completions",status="499"}'
        assert after[left] - before.get(left, 0.0) == 1


GOOD = {"model": MODEL, "prompt": "x", "max_tokens": 2}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
BAD = {
    "no JSON": ("{", 400, "not JSON"),
    "no UTF-8": (b'{"model": "\xff"}', 400, "not JSON"),
    "NaN": ('{"model": "tiny", "prompt": "x", "temperature": NaN}', 400, "NaN"),
    "a key twice": ('{"model": "tiny", "model": "tiny"}', 400, "twice"),
    "deep": ("[" * 100_000, 400, "nested"),
    "half a pair": ('{"model": "tiny", "prompt": "\\ud800"}', 400, "surrogate"),
    "no object": ("[]", 400, "object"),
    "no prompt": ({"model": MODEL}, 400, "prompt"),
    "no tokens": ({**GOOD, "prompt": []}, 400, "empty prompt"),
    "no such token": ({**GOOD, "prompt": [1, 32000]}, 400, "outside the vocabulary"),
    "no number": ({**GOOD, "prompt": [True]}, 400, "prompt"),
    "unknown key": ({**GOOD, "beams": 4}, 400, "beams"),
    "two answers": ({**GOOD, "n": 2}, 400, "n: 2"),
    "echo": ({**GOOD, "echo": True}, 400, "echo"),
    "penalty": ({**GOOD, "presence_penalty": 0.5}, 400, "presence_penalty"),
    "hot": ({**GOOD, "temperature": 3}, 400, "temperature"),
    "empty stop": ({**GOOD, "stop": [""]}, 400, "stop"),
    "usage without a stream": (
        {**GOOD, "stream_options": {"include_usage": True}}, 400, "stream_options"
    ),
    "too long": ({**GOOD, "max_tokens": LENGTH}, 400, "positions"),
    "other model": ({**GOOD, "model": "other"}, 404, "no model"),
    "large": ({**GOOD, "prompt": "x" * (1 << 20)}, 413, "bytes"),
    "too many prompts": ({**GOOD, "prompt": ["x"] * 133}, 400, "at most 132 prompts"),
}  # fmt: skip
BAD_CHAT = {
    "no messages": ({**CHAT, "messages": []}, 400, "messages"),
    "no role": ({**CHAT, "messages": [{"content": "x"}]}, 400, "role"),
    "unknown role": ({**CHAT, "messages": [{"role": "judge", "content": "x"}]}, 400, "judge"),
    "picture": (
        {**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "image"
    ),
    "tools": ({**CHAT, "tools": [{}]}, 400, "tools are not supported here"),
    "json mode": ({**CHAT, "response_format": {"type": "json_object"}}, 400, "response_format"),
    "top of nothing": ({**CHAT, "top_logprobs": 2}, 400, "logprobs"),
}  # fmt: skip
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


class TestRefusals:
    @pytest.mark.parametrize("name", BAD)
    def test_completion(self, running, name):
        body, status, text = BAD[name]
        error = refused(post(running, body), status, text)
        assert error["type"] == "invalid_request_error"

    @pytest.mark.parametrize("name", BAD_CHAT)
    def test_chat(self, running, name):
        body, status, text = BAD_CHAT[name]
        refused(post(running, body, "chat/completions"), status, text)

    def test_the_client_understands_them(self, client):
        with pytest.raises(openai.NotFoundError, match="no model") as caught:
            complete(client, model="other")
        assert caught.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError, match="positions") as caught:
            complete(client, prompt="harbour " * 1000)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")

    def test_a_body_without_a_length(self, running):
        """It is counted as it comes."""

        def parts():
            for _ in range(200):
                yield b" " * 8192

        refused(post(running, parts()), 413, "bytes")

    def test_key(self, client, running):
        for given in ("Bearer wrong", f"Bearer {KEY}x", "Bearer", b"Bearer \xfc", KEY):
            refused(post(running, GOOD, Authorization=given), 401, "key")
        assert httpx.get(f"{running.url}/v1/models", trust_env=False).status_code == 401
        with pytest.raises(openai.AuthenticationError):
            complete(client.with_options(api_key="wrong"))

    def test_pages_of_other_sites(self, running):
        """Neither a name that was pointed at this machine nor a form reaches the model."""
        refused(post(running, GOOD, Host="evil.example:80"), 421, "evil.example")
        refused(post(running, GOOD, **{"Content-Type": "text/plain"}), 415, "Content-Type")
        for path, status in (("", 421), ("metrics", 421), ("health", 200)):
            found = httpx.get(
                f"{running.url}/{path}", headers={"Host": "evil.example"}, trust_env=False
            )
            assert found.status_code == status

    def test_paths_and_methods(self, running):
        found = httpx.get(f"{running.url}/v1/embeddings", headers=HEADERS, trust_env=False)
        refused(found, 404, "Not Found")
        found = httpx.get(f"{running.url}/v1/completions", headers=HEADERS, trust_env=False)
        refused(found, 405, "Not Allowed")

    def test_queue(self, client, running, settings):
        settings(most_waiting=0)
        with concurrent.futures.ThreadPoolExecutor(4) as threads:
            long = [threads.submit(complete, client, max_tokens=200) for _ in range(4)]
            until = time.monotonic() + 10
            while sum(job.left for job in running.service.jobs.copy()) < 4:
                assert time.monotonic() < until
                time.sleep(0.01)
            with pytest.raises(openai.RateLimitError) as caught:
                complete(client)
            assert caught.value.response.headers["retry-after"] == "1"
            assert {each.result().usage.completion_tokens for each in long} == {200}
        assert complete(client).usage.completion_tokens == 12

    def test_time(self, client, running, settings):
        settings(request_seconds=0.3)
        with pytest.raises(openai.InternalServerError, match=r"more than 0\.3 s") as caught:
            complete(client, max_tokens=990)
        assert caught.value.status_code == 504
        with pytest.raises(openai.APIError, match=r"more than 0\.3 s"):
            list(complete(client, max_tokens=990, stream=True))
        idle(running)


def test_models(client):
    (found,) = client.models.list().data
    assert (found.id, found.object) == (MODEL, "model")
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("a/b")


def test_metrics(client, running, wanted):
    before = idle(running)
    complete(client)
    refused(post(running, "{"), 400, "JSON")
    after = figures(running)

    def more(name):
        return after[name] - before.get(name, 0.0)

    assert more("mistral_ms_prompt_tokens_total") == wanted["prompt"]
    assert more("mistral_ms_generated_tokens_total") == 12
    assert more('mistral_ms_requests_total{endpoint="/v1/completions",status="200"}') == 1
    assert more('mistral_ms_requests_total{endpoint="/v1/completions",status="400"}') == 1
    assert more("mistral_ms_time_to_first_token_seconds_count") == 1
    assert after["mistral_ms_slots"] == 4


class TestPage:
    def test_it_loads_nothing_from_elsewhere(self, running):
        found = httpx.get(running.url, trust_env=False)
        assert found.status_code == 200
        assert f"<title>{MODEL}</title>" in found.text
        assert not re.search(r"""(src|href)=|https?://|@import|url\(""", found.text)
        policy = found.headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'sha256-")
        assert "unsafe" not in policy

    def test_its_calls_are_answered(self, running):
        """The keys that its script sends, from the element ids in it."""
        page = httpx.get(running.url, trust_env=False).text
        call = re.search(r"JSON.stringify\(\{ (.*?), \.\.\.settings\(\) \}\)", page)[1]
        assert call == "model, messages, stream: true"
        names = json.loads(re.search(r"for \(const name of (\[.*?\])", page)[1])
        assert {f'id="{name}"' in page for name in names} == {True}
        (path,) = re.findall(r'fetch\("(.*?)"', page)
        values = dict(zip(names, (0.5, 0.9, 4, 3), strict=True))
        body = {"model": MODEL, "messages": CHAT["messages"], "stream": True, **values}
        found = httpx.post(f"{running.url}/{path}", json=body, headers=HEADERS, trust_env=False)
        events = found.text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        parsed = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
        assert "".join(p["choices"][0]["delta"].get("content", "") for p in parsed)


class TestShutdown:
    @pytest.fixture
    def another(self, runner, engine, chat):
        """A function of settings: another server over the same engine."""
        with contextlib.ExitStack() as stack:

            def make(**values):
                found = start(runner, engine, chat, dataclasses.replace(SETTINGS, **values))
                stack.callback(found.end)
                return found

            yield make

    def test_running_requests_end_and_new_ones_are_refused(self, another):
        running = another()
        with httpx.Client(trust_env=False) as inner:
            client = openai.OpenAI(
                base_url=f"{running.url}/v1", api_key=KEY, max_retries=0, http_client=inner
            )
            stream = iter(complete(client, stream=True, max_tokens=150))
            next(stream)
            running.server.end()
            with pytest.raises(openai.InternalServerError, match="shutting down") as caught:
                complete(client)
            assert caught.value.status_code == 503
            health = httpx.get(f"{running.url}/health", trust_env=False)
            assert (health.status_code, health.json()["status"]) == (503, "shutting down")
            assert [c.choices[0].finish_reason for c in stream][-1] == "length"
        running.thread.join(20)
        assert not running.thread.is_alive()

    def test_what_takes_too_long_is_told(self, another):
        running = another(shutdown_seconds=0.0)
        assert httpx.get(f"{running.url}/health", trust_env=False).json() == {"status": "ok"}
        with httpx.Client(trust_env=False) as inner:
            client = openai.OpenAI(
                base_url=f"{running.url}/v1", api_key=KEY, max_retries=0, http_client=inner
            )
            stream = iter(complete(client, stream=True, max_tokens=990))
            next(stream)
            running.server.end()
            with pytest.raises(openai.APIError, match="shut down"):
                list(stream)
        running.thread.join(20)
        assert not running.thread.is_alive()

    def test_told_twice_it_ends_at_once_and_quietly(self, another, caplog):
        running = another()
        body = {**GOOD, "max_tokens": 990}
        with concurrent.futures.ThreadPoolExecutor(1) as threads:
            asked = threads.submit(post, running, body)
            until = time.monotonic() + 10
            while not running.service.jobs:
                assert time.monotonic() < until
                time.sleep(0.01)
            running.server.end()
            running.server.end()
            refused(asked.result(), 500, "shut down")
        running.thread.join(10)
        assert not running.thread.is_alive()
        assert not caplog.records


def test_a_failed_step_is_told_and_health_says_so(engine, chat, monkeypatch, settings, running):
    """The last test: the runner cannot be used afterwards."""
    runner = EngineRunner(engine)
    monkeypatch.setattr(engine.steps, "compile", lambda shapes: None)
    runner.start()
    monkeypatch.setattr(runner._scheduler, "step", lambda: 1 / 0)
    other = start(runner, engine, chat, SETTINGS)
    try:
        refused(post(other, GOOD), 500, "division")
        refused(post(other, GOOD), 500, "engine has failed")
        assert httpx.get(f"{other.url}/health", trust_env=False).status_code == 503
    finally:
        other.end()
        runner.stop()
