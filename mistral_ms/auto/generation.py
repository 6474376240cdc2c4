"""Generation by a model that a program holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mistral_ms.auto.inputs import beside, positions_of, temperature_of, texts_of, token_ids
from mistral_ms.auto.tokenization import PreTrainedTokenizer
from mistral_ms.config import DType, GenerationConfig, ModelConfig
from mistral_ms.config.base import validate
from mistral_ms.errors import GenerationError
from mistral_ms.inference import Engine, Generation
from mistral_ms.inference.lengths import MOST_SLOTS, required_length
from mistral_ms.layers import CacheSpec
from mistral_ms.models import CausalLM, share_parameters
from mistral_ms.tokenizer import ChatFormat

CHUNK = 256
"""The most prompt tokens that are computed at a time."""


class GenerationMixin:
    """Generation for a class that has a model.

    Attributes:
        model: the model, without a cache.
        config: its architecture.
        dtype: of its weights.
        tokenizer: for texts in and out, or None.
        eos_ids: tokens that end a text.
    """

    model: CausalLM
    config: ModelConfig
    dtype: DType
    tokenizer: PreTrainedTokenizer | None
    eos_ids: tuple[int, ...]
    _engine: Engine | None = None
    _engine_compiled: bool = True

    def generate(
        self,
        inputs: Any = None,
        *,
        input_ids: Any = None,
        attention_mask: Any = None,
        max_new_tokens: int = 128,
        do_sample: bool | None = None,
        temperature: float | None = None,
        top_k: int = 0,
        top_p: float = 1.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: str | Sequence[str] = (),
        streamer: Any = None,
        compiled: bool = True,
        return_dict_in_generate: bool = False,
    ) -> Any:
        """Continues prompts, by a cache and compiled steps that later calls reuse.

        Args:
            inputs: a text or a list of texts; or token ids: a row, rows of any lengths, or an
                array or tensor [B, S] with padding on either side.
            input_ids: the latter under Hugging Face's name.
            attention_mask: [B, S], 0 for padding.
            max_new_tokens: the most tokens to generate for each prompt.
            do_sample: True samples, at temperature 1 unless another is given; False is greedy;
                None samples where a temperature above 0 is given.
            temperature: the logits are divided by it.
            top_k: sample among the so many most likely tokens; 0: all.
            top_p: sample among the most likely tokens that have this much probability; 1: all.
            repetition_penalty: above 1 avoids repeats.
            seed: of all random draws.
            stop: texts before which a continuation ends.
            streamer: of one prompt: called with each piece of new text that is certain; or an
                object with ``on_finalized_text``, as Hugging Face's text streamers have.
            compiled: False runs operator by operator, which starts at once and is slower.
            return_dict_in_generate: give ids, log-probabilities, text and the reason of the end
                of each continuation, and speeds.

        Returns:
            Of a text the new text, of a list of texts a list. Of ids in an array or tensor an int32
            array [B, S + N], the prompts as they were and the new tokens, filled up with the
            padding token; of lists of ids lists of prompt and new tokens. With
            ``return_dict_in_generate`` a :class:`~mistral_ms.inference.Generation`.

        Raises:
            ConfigError: a setting out of its range, or two that contradict each other.
            GenerationError: an empty prompt, one that is too long for the model, ids outside of
                the vocabulary; texts without a tokenizer; a streamer for several prompts.
        """
        given = inputs if inputs is not None else input_ids
        if given is None or (inputs is not None and input_ids is not None):
            raise GenerationError(
                "no prompt" if given is None else "two prompts",
                where="inputs",
                rule="give inputs or input_ids",
            )
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        request = validate(
            GenerationConfig,
            {
                "max_new_tokens": max_new_tokens,
                "temperature": temperature_of(do_sample, temperature),
                "top_k": top_k,
                "top_p": top_p,
                "repetition_penalty": repetition_penalty,
                "seed": seed,
                "stop": stops,
            },
            "generate",
        )
        texts = texts_of(given)
        if texts is not None:
            tokenizer = self._needed_tokenizer("a text")
            prompts = [tokenizer.encode(text) for text in texts]
        else:
            prompts = self._prompts(given, attention_mask)
        result = self._run(prompts, request, streamer, compiled, continues=texts is not None)
        if return_dict_in_generate:
            return result
        if texts is not None:
            found = [done.text for done in result.completions]
            return found[0] if isinstance(given, str) else found
        return self._sequences(given, prompts, result)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        **settings: Any,
    ) -> str:
        """The assistant's next turn in a conversation.

        Args:
            messages: each with ``role`` and ``content``; the last one is not the assistant's.
            tools: JSON schemas of functions that the model may call.
            chat_template: a Jinja file instead of the tokenizer's own, or ``mistral``.
            settings: those of :meth:`generate`.

        Raises:
            TokenizerError: no chat format, or a conversation that it does not allow.
            GenerationError: see :meth:`generate`.
        """
        inner = self._needed_tokenizer("a conversation").tokenizer
        form = ChatFormat(inner, chat_template, self.eos_ids)
        ids = form.encode_chat(messages, tools)
        result = self.generate([ids], return_dict_in_generate=True, **settings)
        text: str = result.completions[0].text
        return text

    def _needed_tokenizer(self, what: str) -> PreTrainedTokenizer:
        if self.tokenizer is None:
            raise GenerationError(
                f"{what} without a tokenizer",
                rule="the checkpoint has none",
                todo="give token ids, or set model.tokenizer",
            )
        return self.tokenizer

    def _run(
        self,
        prompts: Sequence[Sequence[int]],
        request: GenerationConfig,
        streamer: Any,
        compiled: bool,
        continues: bool,
    ) -> Generation:
        if streamer is not None and len(prompts) > 1:
            raise GenerationError(
                "a streamer for several prompts",
                where="streamer",
                value=f"{len(prompts)} prompts",
                rule="pieces of several texts would be mixed",
            )
        engine = self._engine_for(prompts, request, compiled)
        put = getattr(streamer, "on_finalized_text", streamer)
        on_text = None if put is None else lambda number, piece: put(piece)
        result = engine.generate(prompts, request, on_text, continues=continues)
        if hasattr(streamer, "on_finalized_text"):
            streamer.on_finalized_text("", stream_end=True)
        return result

    def _engine_for(
        self, prompts: Sequence[Sequence[int]], request: GenerationConfig, compiled: bool
    ) -> Engine:
        """The engine of the call before, if it is large enough, or a new one."""
        length = required_length(self.config, prompts, request)
        batch = min(len(prompts), MOST_SLOTS)
        engine, inner = self._engine, None if self.tokenizer is None else self.tokenizer.tokenizer
        if (
            engine is None
            or self._engine_compiled != compiled
            or engine.max_length < length
            or engine.batch < batch
            or engine.tokenizer is not inner
        ):
            self._engine = engine = None  # its cache goes before another one comes
            longest = self.config.longest_sequence
            # room for a longer prompt the next time
            length = min(longest, max(CHUNK, 1 << (length - 1).bit_length()))
            spec = CacheSpec.for_model(self.config, batch, length, min(CHUNK, length))
            engine = Engine(
                share_parameters(self.model, cache=spec, positions=length, dtype=self.dtype),
                max_length=length,
                chunk=min(CHUNK, length),
                tokenizer=inner,
                graph=compiled,
                eos_ids=self.eos_ids,
            )
            self._engine, self._engine_compiled = engine, compiled
        engine.eos_ids = self.eos_ids
        return engine

    def _prompts(self, given: Any, attention_mask: Any) -> list[list[int]]:
        """Prompts of ids without their padding."""
        if isinstance(given, list | tuple) and given and not np.isscalar(given[0]):
            rows = [list(map(int, row)) for row in given]
            if attention_mask is None:
                return rows
        ids_BS = token_ids(given, self.config.vocab_size)
        if attention_mask is None:
            return [row.tolist() for row in ids_BS]
        present_BS = (
            positions_of(beside(attention_mask, ids_BS, "attention_mask"), ids_BS.shape) >= 0
        )
        return [row[here].tolist() for row, here in zip(ids_BS, present_BS, strict=True)]

    def _sequences(self, given: Any, prompts: list[list[int]], result: Generation) -> Any:
        if isinstance(given, list | tuple):
            rows = [
                [*prompt, *done.token_ids]
                for prompt, done in zip(prompts, result.completions, strict=True)
            ]
            return rows[0] if np.isscalar(given[0]) else rows
        ids_BS = token_ids(given, self.config.vocab_size)
        longest = max(len(done.token_ids) for done in result.completions)
        new_BN = np.full((len(ids_BS), longest), self._padding(), np.int32)
        for row, done in zip(new_BN, result.completions, strict=True):
            row[: len(done.token_ids)] = done.token_ids
        return np.concatenate([ids_BS, new_BN], 1)

    def _padding(self) -> int:
        if self.config.pad_token_id is not None:
            return self.config.pad_token_id
        return self.eos_ids[0] if self.eos_ids else 0
