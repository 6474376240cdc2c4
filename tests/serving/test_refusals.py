"""Requests that the server refuses: what is wrong with them, keys, other sites, queue and time."""

import concurrent.futures
import time

import httpx
import openai
import pytest
from support.serving import CHAT, GOOD, HEADERS, KEY, LENGTH, MODEL, complete, idle, post, refused

pytestmark = pytest.mark.slow  # the three files together: some 25 s of processor time


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
