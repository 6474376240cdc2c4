"""The ``serve`` command: one server from start to end, and what it refuses before it starts."""

import importlib.util
import signal
import socket
import sys
import time

import httpx
import pytest
from support.commands import start
from support.hf import save_with_tokenizer
from support.ports import free_port

from mistral_ms.cli import main
from mistral_ms.cli.serve import _check_port, _key
from mistral_ms.errors import ConfigError, MissingExtraError
from mistral_ms.serving import check_installed

KEY = "0123456789abcdef"


def healthy(url, running, seconds=120):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        assert running.poll() is None, running.wait(1)
        try:
            return httpx.get(f"{url}/health", trust_env=False).status_code == 200
        except httpx.TransportError:
            time.sleep(0.1)
    return False


def test_from_start_to_end(tmp_path):
    """With a key, operator by operator; SIGTERM lets the request that runs end."""
    save_with_tokenizer(tmp_path / "tiny")
    (tmp_path / "key").write_text(f"{KEY}\n")
    port = free_port()
    running = start(
        "serve", "tiny", "--port", port, "--slots", 2, "--max-length", 64, "--pynative",
        "--api-key-file", "key",
        cwd=tmp_path,
    )  # fmt: skip
    url = f"http://127.0.0.1:{port}"
    try:
        assert healthy(url, running)
        body = {"model": "tiny", "prompt": "The harbour", "max_tokens": 40, "stream": True}
        assert httpx.post(f"{url}/v1/completions", json=body, trust_env=False).status_code == 401
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx.stream(
            "POST", f"{url}/v1/completions", json=body, headers=headers, trust_env=False, timeout=60
        ) as answer:
            lines = (line for line in answer.iter_lines() if line)
            next(lines)
            running.send_signal(signal.SIGTERM)
            assert list(lines)[-1] == "data: [DONE]"
        done = running.wait(60)
    finally:
        running.kill()
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stdout == f"serving tiny at {url}\n"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("key", ["", "short", "two words of a key", "schlüssel-schlüssel"])
def test_keys_that_are_none(tmp_path, key):
    (tmp_path / "key").write_text(key)
    with pytest.raises(ConfigError, match=r"not a key: .*at least 16 printable"):
        _key(tmp_path / "key")


def test_a_port_in_use():
    """It is told before anything is loaded."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen: 127.0.0.1 port {port}: .* in use"):
            _check_port("127.0.0.1", port)
    _check_port("127.0.0.1", port)
    with pytest.raises(ConfigError, match=r"cannot listen: no\.such\.name\.invalid port 80: "):
        _check_port("no.such.name.invalid", 80)


def test_without_its_packages(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError):
        check_installed()
    monkeypatch.setattr(sys, "argv", ["run_mixtral.py", "serve", "nothing"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert (
        'missing package: fastapi: the serve command needs it: pip install "mistral_ms[serve]"'
        in (capsys.readouterr().err)
    )
