"""Generation for ragged prompts with a cache of fixed shape; see
:mod:`~mistral_ms.inference.scheduler` for which of them is computed when.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol, cast

from mindspore import Parameter, nn

from mistral_ms.checkpoint import open_merged
from mistral_ms.checkpoint.dtypes import FROM_CONFIG, count_not_finite
from mistral_ms.checkpoint.load import kept_quantization, load_weights, to_numpy
from mistral_ms.config import DROPLESS, DType, GenerationConfig, ModelConfig, ParallelConfig
from mistral_ms.errors import GenerationError
from mistral_ms.inference.dtypes import check_weights_dtype
from mistral_ms.inference.lengths import check_length
from mistral_ms.inference.results import Completion, Generation
from mistral_ms.inference.scheduler import Scheduler
from mistral_ms.inference.sequence import RunningSequence
from mistral_ms.inference.settings import read_checkpoint_settings
from mistral_ms.inference.steps import NextToken, Steps
from mistral_ms.layers import CacheSpec
from mistral_ms.models import CausalLM, NextTokenLogits
from mistral_ms.moe import try_gates
from mistral_ms.parallel.context import ParallelContext
from mistral_ms.tokenizer import Tokenizer, check_vocabulary, load_tokenizer

OnText = Callable[[int, str], None]


class KeySpec(Protocol):
    """Where a model keeps the sizes of its cache."""

    spec: CacheSpec


class CachedModel(Protocol):
    """What an engine needs of a model beside its logits."""

    config: ModelConfig
    key_positions: KeySpec

    def weights(self) -> Mapping[str, Parameter]:
        """What this process holds of the weights, by the names of checkpoints."""

    def reset_cache(self) -> None:
        """Forgets all cached positions."""

    def clear_cache(self) -> None:
        """Resets and zeroes the cache."""


class Engine:
    """A model with a cache, ready to generate.

    Args:
        model: a :class:`~mistral_ms.models.CausalLM` with a cache, or another that has the same
            to offer.
        max_length: positions per sequence, prompt and new tokens together.
        chunk: the most tokens of a prompt that are computed at a time.
        tokenizer: turns ids into text; without one completions have ids only.
        graph: compile the two steps (prefill and decode) into graphs; PyNative starts sooner and
            is many times slower.
        step: gives the logits of a step, as NextTokenLogits does; that of a CausalLM when None.
        eos_ids: tokens that end a text; those of the model's configuration when None.

    Attributes:
        batch: slots of the cache, for sequences that are computed side by side.
        steps: the two steps.

    Raises:
        GenerationError: the model's cache is too short for these settings.
        ConfigError: a gate that breaks its contract.
    """

    def __init__(
        self,
        model: CachedModel,
        *,
        max_length: int,
        chunk: int,
        tokenizer: Tokenizer | None = None,
        graph: bool = True,
        step: nn.Cell | None = None,
        eos_ids: Sequence[int] | None = None,
    ) -> None:
        self.config: ModelConfig = model.config
        self.model, self.tokenizer = model, tokenizer
        self.eos_ids = tuple(self.config.eos_token_ids if eos_ids is None else eos_ids)
        if step is None:
            assert isinstance(model, CausalLM)
            step = NextTokenLogits(model)
        if isinstance(model, CausalLM):
            try_gates(model, model.config, training=False)
        spec = model.key_positions.spec
        needed = CacheSpec.for_model(self.config, spec.batch, max_length, chunk).length
        if spec.length < needed:
            raise GenerationError(
                "cache too short",
                value=f"{spec.length} columns",
                rule=f"max_length {max_length} and chunk {chunk} need {needed}",
            )
        step.set_train(False)
        model.reset_cache()  # what was initialised late holds position 0 everywhere
        self.steps = Steps(cast(NextToken, step), graph)
        self.batch, self.max_length, self.chunk = self.steps.batch, max_length, chunk

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        batch: int = 1,
        max_length: int | None = None,
        chunk: int = 256,
        kind: str | None = None,
        graph: bool = True,
        with_tokenizer: bool = True,
        verify: bool = True,
        follow_links: bool = False,
        dtype: DType = "float32",
        parallel_context: ParallelContext | None = None,
        eos_ids: Sequence[int] | None = None,
        adapter: Path | None = None,
    ) -> Engine:
        """Opens a checkpoint of any known format and loads it.

        Args:
            path: its directory.
            batch: sequences computed side by side; more prompts take turns.
            max_length: see the class; the model's longest sequence by default.
            chunk: see the class.
            kind: which format to take when the directory holds several.
            graph: see the class.
            dtype: dtype of weights, cache and activations; on CPU bfloat16 is of weights alone, see
                :func:`mistral_ms.ops.select_cpu.activations`. Quantised experts stay so on CPU in
                one process, with activations in float32.
            with_tokenizer: load the directory's tokenizer; without it completions have no text.
            verify: compare a checkpoint of ours with its digests while it is read.
            follow_links: links may lead out of the directory; see :func:`open_merged`.
            parallel_context: this process's part of several; all must then do the same with their
                engines.
            eos_ids: tokens that end a text; what the checkpoint's files say when None, see
                :func:`~mistral_ms.inference.settings.read_checkpoint_settings`.
            adapter: directory of an adapter, which is added to the weights.

        Raises:
            CheckpointError: see :func:`open_merged` and :func:`load_weights`.
            TokenizerError: no tokenizer, or one that does not fit the model.
            GenerationError: ``max_length`` exceeds the model's positions, or the backend cannot
                compute in ``dtype``.
        """
        parallel_context = (
            ParallelContext(ParallelConfig()) if parallel_context is None else parallel_context
        )
        check_weights_dtype(dtype, parallel_context.world)
        with open_merged(
            Path(path),
            kind,
            adapter=adapter,
            verify=verify,
            follow_links=follow_links,
            rank=parallel_context.rank,
            world=parallel_context.world,
        ) as source:
            config = source.config
            check_weights_dtype(dtype, parallel_context.world, config.tie_word_embeddings)
            length = config.longest_sequence if max_length is None else max_length
            check_length(config, length, "max_length")
            chunk = min(chunk, length)
            rows = -(-batch // parallel_context.data_parallel[1])
            spec = CacheSpec.for_model(config, rows, length, chunk)
            tokenizer = None
            if with_tokenizer:
                tokenizer = load_tokenizer(source.path)
                check_vocabulary(tokenizer, config)
            kept = kept_quantization(source, dtype, parallel_context.world)
            model = parallel_context.build_model(
                config, DROPLESS, dtype, cache=spec, positions=length, quantization=kept
            )
            if eos_ids is None:
                eos_ids = read_checkpoint_settings(source.path, config, tokenizer).eos_ids
            storage = parallel_context.storage(model.specs) if kept is None else None
            load_weights(source, model.weights(), storage=storage)
        step = parallel_context.next_token(model, dtype)
        return cls(
            model,
            max_length=length,
            chunk=chunk,
            tokenizer=tokenizer,
            graph=graph,
            step=step,
            eos_ids=eos_ids,
        )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        request: GenerationConfig,
        on_text: OnText | None = None,
        *,
        continues: bool = True,
    ) -> Generation:
        """Continues every prompt; of more than there are slots the first ones begin, and each of
        the others when one has ended.

        Args:
            prompts: token ids, of any lengths, at least one token each.
            request: lengths, sampling, stop strings.
            on_text: called with the prompt's number and each piece of text that is certain.
            continues: the new text goes on where the prompt's ends, so its first space counts;
                off for an answer in a chat.

        Raises:
            GenerationError: an empty prompt, one that leaves no room for a new token, an id
                outside the vocabulary, or stop strings without a tokenizer.
        """
        sequences = [
            self.sequence(prompt, request, number=number, continues=continues)
            for number, prompt in enumerate(prompts)
        ]
        started = time.perf_counter()
        shapes = self.steps.prefill_shapes(list(map(len, prompts)), self.chunk) if prompts else ()
        self.steps.compile({self.steps.one, *shapes})
        compiled = time.perf_counter() - started
        scheduler = Scheduler(self.steps, shapes, self.model.clear_cache)
        for sequence in sequences:
            scheduler.add(sequence)
        while scheduler.busy:
            for progress in scheduler.step():
                if progress.sequence.error is not None:
                    self.model.clear_cache()  # what it holds is not finite either
                    raise self.explained(progress.sequence.error) from progress.sequence.error
                if on_text is not None and progress.text:
                    on_text(progress.sequence.number, progress.text)
        work = scheduler.work
        return Generation(
            tuple(map(Completion.of, sequences)),
            work.prefill_tokens,
            work.prefill_seconds,
            work.decode_tokens,
            work.decode_seconds,
            compiled,
        )

    def sequence(
        self,
        prompt: Sequence[int],
        request: GenerationConfig,
        *,
        number: int = 0,
        continues: bool = True,
    ) -> RunningSequence:
        """A sequence for a :class:`~mistral_ms.inference.scheduler.Scheduler` of this engine.

        Args:
            prompt: token ids, at least one.
            request: lengths, sampling, stop strings.
            number: of the prompt in its request: its random numbers come from the seed and this.
            continues: see :meth:`generate`.

        Raises:
            GenerationError: see :meth:`generate`.
        """
        self._check(prompt, request, f"prompt {number}")
        return RunningSequence(
            prompt, request, self.eos_ids, self.max_length, self.tokenizer, continues, number
        )

    def explained(self, error: GenerationError) -> GenerationError:
        """An error of logits that are not finite with its cause, where that is a weight."""
        for name, parameter in self.model.weights().items():
            values, dtype = to_numpy(parameter)
            if dtype not in FROM_CONFIG:
                continue  # codes are finite
            nans, infinities = count_not_finite(values, FROM_CONFIG[dtype])
            if nans or infinities:
                return GenerationError(
                    error.what,
                    where=f"weight {name}",
                    value=f"{nans} NaN and {infinities} infinite of {values.size}",
                    rule="every weight is a finite number",
                    todo="count them in the files with inspect --verify; if there are none, the "
                    f"dtype {dtype} cannot hold them",
                )
        return error

    def _check(self, prompt: Sequence[int], request: GenerationConfig, where: str) -> None:
        if request.stop and self.tokenizer is None:
            raise GenerationError("stop strings need a tokenizer", where="stop")
        if not len(prompt):
            raise GenerationError("empty prompt", where=where, rule="at least one token")
        outside = [t for t in prompt if not 0 <= t < self.config.vocab_size]
        if outside:
            raise GenerationError(
                "token id outside the vocabulary",
                where=where,
                value=self._named(outside[0]),
                rule=f"0 to {self.config.vocab_size - 1}",
                todo="the tokenizer's added tokens beyond that cannot be used with this model",
            )
        if len(prompt) > self.config.longest_sequence:
            check_length(self.config, len(prompt), where)
        if len(prompt) >= self.max_length:
            raise GenerationError(
                "prompt too long",
                where=where,
                value=f"{len(prompt)} tokens",
                rule=f"prompt and new tokens have {self.max_length} positions together",
                todo="shorten it, or raise max_length if the model allows",
            )

    def _named(self, token_id: int) -> str:
        if self.tokenizer is None or token_id < 0:
            return str(token_id)
        return f"{token_id} ({self.tokenizer.piece(token_id).text!r})"
