"""What a request came to."""

from __future__ import annotations

from dataclasses import dataclass

from mistral_ms.inference.sequence import FinishReason


@dataclass(frozen=True)
class Completion:
    """What was generated after one prompt.

    Attributes:
        token_ids: the generated tokens, the ending EOS included.
        logprobs: the model's own log-probability of each.
        text: their text, without special tokens, up to a stop string.
        finish_reason: ``eos``, ``stop`` (a stop string) or ``length``.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: FinishReason


@dataclass(frozen=True)
class Generation:
    """One request's results and speed.

    Attributes:
        completions: one for each prompt, in order.
        prefill_tokens: prompt tokens computed.
        prefill_seconds: the time they took, without compiling.
        decode_tokens: tokens computed one step at a time.
        decode_seconds: the time they took, without compiling.
        compile_seconds: the time that compiling new graphs took, 0 when they were there.
    """

    completions: tuple[Completion, ...]
    prefill_tokens: int
    prefill_seconds: float
    decode_tokens: int
    decode_seconds: float
    compile_seconds: float

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens a second."""
        return self.prefill_tokens / max(self.prefill_seconds, 1e-9)

    @property
    def decode_tokens_per_s(self) -> float:
        """Generated tokens a second after the first of each sequence."""
        return self.decode_tokens / max(self.decode_seconds, 1e-9)
