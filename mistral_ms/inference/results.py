"""What a request came to."""

from __future__ import annotations

from dataclasses import dataclass

from mistral_ms.inference.sampling import Alternative
from mistral_ms.inference.sequence import FinishReason, RunningSequence


@dataclass(frozen=True)
class Completion:
    """What was generated after one prompt.

    Attributes:
        token_ids: the generated tokens, the ending EOS included.
        logprobs: the model's own log-probability of each.
        text: their text, without special tokens, up to a stop string.
        finish_reason: ``eos``, ``stop`` (a stop string) or ``length``.
        top_logprobs: in the place of each token the most likely ones with their log-probabilities,
            as many as the request's ``top_logprobs``; empty without them.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    finish_reason: FinishReason
    top_logprobs: tuple[tuple[Alternative, ...], ...] = ()

    @classmethod
    def of(cls, sequence: RunningSequence) -> Completion:
        """That of a sequence that has ended."""
        assert sequence.finish_reason is not None
        return cls(
            tuple(sequence.new_ids),
            tuple(sequence.logprobs),
            sequence.text,
            sequence.finish_reason,
            tuple(sequence.top_logprobs),
        )


@dataclass(frozen=True)
class Generation:
    """One request's results and speed.

    Attributes:
        completions: one for each prompt, in order.
        prefill_tokens: prompt tokens computed.
        prefill_seconds: the time they took, without compiling; that of a step which computes
            both kinds is divided in proportion to their numbers.
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
