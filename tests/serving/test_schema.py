"""What requests must look like, without a server."""

from types import SimpleNamespace

import pytest

from mistral_ms.config.base import validate
from mistral_ms.errors import ConfigError
from mistral_ms.serving.errors import ApiError
from mistral_ms.serving.schema import ChatRequest, CompletionRequest
from mistral_ms.serving.service import Service

GOOD = {"model": "m", "prompt": "x"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
BAD = {
    "max_tokens": ("3", 3.0, True, 0, 2**31),
    "stream": ("true", 1, "yes"),
    "repetition_penalty": (1e-300, 0.009, 101, float("nan")),
}


@pytest.mark.parametrize("name", BAD)
def test_types_and_bounds(name):
    for value in BAD[name]:
        with pytest.raises(ConfigError, match=f"request: {name}: "):
            validate(CompletionRequest, GOOD | {name: value}, "request")
    with pytest.raises(ConfigError, match="request: max_completion_tokens: '3'"):
        validate(ChatRequest, CHAT | {"max_completion_tokens": "3"}, "request")
    good = {"max_tokens": 3, "stream": True, "repetition_penalty": 0.01}
    asked = validate(CompletionRequest, GOOD | good, "request")
    assert {key: getattr(asked, key) for key in good} == good


def test_a_long_value_is_shortened():
    with pytest.raises(ConfigError, match=r"max_tokens: 7+ \.\.\. 7+: .*less than") as caught:
        validate(CompletionRequest, GOOD | {"max_tokens": int("7" * 4000)}, "request")
    assert len(str(caught.value)) < 400


def test_names_of_this_machine_are_compared_without_case():
    service = Service.__new__(Service)
    service.settings = SimpleNamespace(local=True, host="My-Host", api_key=None)
    for host in ("LOCALHOST:8471", "LocalHost", "my-host:1", "127.0.0.1", "[::1]:8471"):
        service.admit(SimpleNamespace(headers={"host": host}))
    with pytest.raises(ApiError, match="this server is not"):
        service.admit(SimpleNamespace(headers={"host": "evil.example:80"}))
