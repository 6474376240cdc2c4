"""What a server counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from mistral_ms.serving.runner import EngineRunner

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)


class Metrics:
    """The figures of one server.

    Args:
        runner: its engine.

    Attributes:
        requests: by endpoint and status of HTTP; 499 are those whose client left.
        prompt_tokens: of accepted requests.
        generated_tokens: those that were sent, or would have been.
        first_token_seconds: from a request to its first token.
        request_seconds: from a request to its end.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, runner: EngineRunner) -> None:
        self._registry = CollectorRegistry()
        name = "mistral_ms_"
        self.requests = Counter(
            f"{name}requests", "Requests.", ["endpoint", "status"], registry=self._registry
        )
        self.prompt_tokens = Counter(
            f"{name}prompt_tokens", "Tokens of prompts.", registry=self._registry
        )
        self.generated_tokens = Counter(
            f"{name}generated_tokens", "Generated tokens.", registry=self._registry
        )
        self.first_token_seconds = Histogram(
            f"{name}time_to_first_token_seconds",
            "From a request to its first token.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.request_seconds = Histogram(
            f"{name}request_seconds",
            "From a request to its end.",
            ["endpoint"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        for gauge, text, read in (
            ("slots", "Sequences that are computed side by side.", lambda: runner.engine.batch),
            ("sequences_running", "Sequences that have a slot.", lambda: runner.running),
            ("sequences_waiting", "Sequences that wait for a slot.", lambda: runner.waiting),
        ):
            Gauge(f"{name}{gauge}", text, registry=self._registry).set_function(read)

    def text(self) -> bytes:
        """In Prometheus' format."""
        return generate_latest(self._registry)
