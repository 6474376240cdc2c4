"""One sequence while it grows: its tokens, its text, and when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from mistral_ms.config import GenerationConfig
from mistral_ms.errors import GenerationError
from mistral_ms.inference.sampling import Alternative, Floats, Sampler
from mistral_ms.inference.stopping import StopStrings
from mistral_ms.tokenizer import StreamDecoder, Tokenizer

FinishReason = Literal["eos", "stop", "length", "cancelled", "error"]
"""By an end token, a stop string, the most tokens or positions, the caller, logits that are not
finite.
"""


class RunningSequence:
    """A prompt and what has been generated after it.

    Args:
        prompt: its token ids.
        request: the most new tokens, how they are sampled, and the stop strings.
        eos_ids: tokens that end a text.
        max_length: positions for prompt and new tokens together.
        tokenizer: turns ids into text; None keeps the text empty.
        continues: the text goes on where the prompt's ends; otherwise it begins anew.
        number: in its request, for its stream of random numbers.

    Attributes:
        prompt: as given.
        number: as given.
        cached: how many tokens are in the cache.
        new_ids: generated tokens, the ending EOS included.
        logprobs: log-probability of each.
        top_logprobs: the most likely tokens in the place of each, where the request asks for them.
        text: the certain text so far.
        finish_reason: None while the sequence grows.
        error: what ended it, if that was an error.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        request: GenerationConfig,
        eos_ids: Sequence[int],
        max_length: int,
        tokenizer: Tokenizer | None,
        continues: bool = True,
        number: int = 0,
    ) -> None:
        self.prompt, self.number = list(prompt), number
        self.cached = 0
        self.new_ids: list[int] = []
        self.logprobs: list[float] = []
        self.top_logprobs: list[tuple[Alternative, ...]] = []
        self.text = ""
        self.finish_reason: FinishReason | None = None
        self.error: GenerationError | None = None
        self._eos_ids = frozenset(eos_ids)
        self._room = min(request.max_new_tokens, max_length - len(self.prompt))
        context = prompt if continues else ()
        self._decoder = None if tokenizer is None else StreamDecoder(tokenizer, context=context)
        self._stops = StopStrings(request.stop)
        self._sampler = Sampler(request, [self.prompt], [number])

    @property
    def length(self) -> int:
        """Tokens so far, the prompt's included."""
        return len(self.prompt) + len(self.new_ids)

    @property
    def finished(self) -> bool:
        """Whether the sequence has ended."""
        return self.finish_reason is not None

    def tokens(self, start: int, end: int) -> list[int]:
        """The tokens at these positions, from ``start`` to before ``end``."""
        known = len(self.prompt)
        if start >= known:
            return self.new_ids[start - known : end - known]
        return [*self.prompt[start:end], *self.new_ids[: max(0, end - known)]]

    def choose(self, logits_V: Floats) -> str:
        """Samples the next token; returns the text that has become certain by it.

        Args:
            logits_V: float32, after the newest token.

        Raises:
            GenerationError: logits that are not finite.
        """
        sampled = self._sampler(logits_V[None])
        if sampled.top:
            self.top_logprobs += sampled.top
        return self.accept(int(sampled.ids[0]), float(sampled.logprobs[0]))

    def accept(self, token_id: int, logprob: float) -> str:
        """Takes the next token; returns the text that has become certain by it."""
        self.new_ids.append(token_id)
        self.logprobs.append(logprob)
        text = ""
        if self._decoder is not None:
            text = self._stops.push(self._decoder.push(token_id))
        if self._stops.stopped:
            self.finish_reason = "stop"
        elif token_id in self._eos_ids:
            self.finish_reason = "eos"
        elif len(self.new_ids) >= self._room:
            self.finish_reason = "length"
        if self.finished and not self._stops.stopped and self._decoder is not None:
            text += self._stops.push(self._decoder.flush()) + self._stops.flush()
            if self._stops.stopped:
                self.finish_reason = "stop"
        self.text += text
        return text
