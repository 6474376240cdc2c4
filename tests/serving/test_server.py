"""The server itself: models, metrics, its page, how it ends."""

import concurrent.futures
import contextlib
import dataclasses
import json
import re
import time

import httpx
import openai
import pytest
from support.serving import (
    CHAT,
    GOOD,
    HEADERS,
    KEY,
    MODEL,
    SETTINGS,
    complete,
    figures,
    idle,
    post,
    refused,
    start,
)

from mistral_ms.serving.runner import EngineRunner

pytestmark = pytest.mark.slow  # the three files together: some 25 s of processor time


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
