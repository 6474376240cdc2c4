"""Causal language models with the habits of Hugging Face."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mistral_ms.auto.tokenization import PreTrainedTokenizer
from mistral_ms.checkpoint import open_checkpoint, tokenizer_files
from mistral_ms.checkpoint.load import load_weights
from mistral_ms.checkpoint.save import save_model
from mistral_ms.config import (
    DROPLESS,
    IGNORE_INDEX,
    DType,
    GenerationConfig,
    ModelConfig,
)
from mistral_ms.config.base import validate
from mistral_ms.errors import CheckpointError, ConfigError, GenerationError
from mistral_ms.inference import Engine, Generation
from mistral_ms.inference.engine import check_dtype
from mistral_ms.inference.lengths import required_length
from mistral_ms.inference.settings import read_checkpoint_settings
from mistral_ms.layers import CacheSpec, output_logits, token_nll
from mistral_ms.models import CausalLM, share_parameters
from mistral_ms.moe import load_balancing_loss
from mistral_ms.tokenizer import ChatFormat, check_vocabulary, has_tokenizer, load_tokenizer

CHUNK = 256
"""The most prompt tokens that are computed at a time."""
_sum = ops.ReduceSum()


@dataclass(frozen=True)
class CausalLMOutput:
    """What a model gives.

    Attributes:
        logits: float32 [B, S, V].
        loss: float32 scalar, the mean over the labels that count, plus the load-balancing loss
            times its coefficient where that was asked for; None without labels.
        aux_loss: the load-balancing loss by Hugging Face's definition, float32 scalar; None where
            it was not asked for, and of a dense model.
        router_logits: float32 [B * S, E] of each sparse layer; likewise.
    """

    logits: Tensor
    loss: Tensor | None = None
    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


class PreTrainedModel:
    """A Mistral or Mixtral in this process.

    Args:
        config: the architecture.
        dtype: of weights and activations; the CPU has no bfloat16.
        seed: of the weights, which are drawn.
        tokenizer: for texts in and out; without one the model takes and gives ids alone.
        eos_ids: tokens that end a text; those of the configuration when None.

    Attributes:
        model: the :class:`~mistral_ms.models.CausalLM`, a Cell: what ``mindspore.value_and_grad``
            and the objectives of :mod:`mistral_ms.models` take.
        config: the architecture.
        tokenizer: the tokenizer, or None.

    Raises:
        ConfigError: a dtype that the device cannot compute in; an architecture of the other class.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: DType = "float32",
        seed: int = 0,
        tokenizer: PreTrainedTokenizer | None = None,
        eos_ids: Sequence[int] | None = None,
    ) -> None:
        self._check_kind(config, "config")
        check_dtype(dtype)
        self._set(CausalLM(config, DROPLESS, dtype=dtype), dtype, tokenizer, eos_ids)
        self.model.initialize(seed)

    def _set(
        self,
        model: CausalLM,
        dtype: DType,
        tokenizer: PreTrainedTokenizer | None,
        eos_ids: Sequence[int] | None,
        files: Mapping[str, bytes | Path] | None = None,
    ) -> None:
        model.set_train(False)
        self.model, self.config, self.dtype = model, model.config, dtype
        self.tokenizer = tokenizer
        self._eos_ids = tuple(model.config.eos_token_ids if eos_ids is None else eos_ids)
        self._files = dict(files or {})
        self._engine: Engine | None = None
        self._engine_compiled = True

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        dtype: DType = "float32",
        format: str | None = None,
        verify: bool = True,
        follow_links: bool = False,
    ) -> PreTrainedModel:
        """Reads a checkpoint of any known format, and its tokenizer if it has one.

        Args:
            path: the checkpoint's directory.
            dtype: of weights and activations; the CPU has no bfloat16.
            format: which format to read where the directory holds several.
            verify: compare a checkpoint of ours with its recorded digests.
            follow_links: links may lead out of the directory, or of the hub's cache.

        Raises:
            CheckpointError: no checkpoint there, missing or extra tensors, wrong shapes, damage.
            ConfigError: a model of the other class; a dtype that the device cannot compute in.
            TokenizerError: a damaged tokenizer, or one that does not fit the model.
        """
        path = Path(path)
        check_dtype(dtype)
        if not path.is_dir():
            raise CheckpointError(
                "no checkpoint",
                where=path,
                rule="must be a directory on this machine; nothing is downloaded",
                todo="download it first, for example by huggingface-cli download",
            )
        with open_checkpoint(path, format, verify=verify, follow_links=follow_links) as source:
            cls._check_kind(source.config, str(path))
            files = tokenizer_files(source.path, follow_links)
            tokenizer = inner = None
            if has_tokenizer(source.path):
                inner = load_tokenizer(source.path)
                check_vocabulary(inner, source.config)
                tokenizer = PreTrainedTokenizer(inner)
            eos_ids = read_checkpoint_settings(source.path, source.config, inner).eos_ids
            model = CausalLM(source.config, DROPLESS, dtype=dtype)
            load_weights(source, model.weights())
        found = cls.__new__(_class_of(source.config) if cls is PreTrainedModel else cls)
        found._set(model, dtype, tokenizer, eos_ids, files)
        return found

    @classmethod
    def from_config(
        cls, config: ModelConfig, *, dtype: DType = "float32", seed: int = 0
    ) -> PreTrainedModel:
        """A model with fresh weights, a function of the seed; see the class."""
        kind = _class_of(config) if cls is PreTrainedModel else cls
        return kind(config, dtype=dtype, seed=seed)

    @classmethod
    def _check_kind(cls, config: ModelConfig, where: str) -> None:
        kind = _class_of(config)
        if not issubclass(kind, cls):
            raise ConfigError(
                "model of another class",
                where=where,
                value=kind.__name__,
                rule=f"{cls.__name__} has {'sparse' if cls is MixtralForCausalLM else 'dense'} "
                "layers",
                todo=f"use {kind.__name__} or AutoModelForCausalLM",
            )

    def __call__(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        labels: Any = None,
        *,
        output_router_logits: bool = False,
    ) -> CausalLMOutput:
        """Runs whole sequences, operator by operator, each token by all experts that it chooses.

        Args:
            input_ids: int [B, S], a list of rows of equal length, an array or a tensor.
            attention_mask: [B, S], 0 for padding, wherever it stands; None: there is none.
                Positions count from 0 at the first token of a row.
            labels: int [B, S]: ``input_ids`` with -100 where nothing is predicted; shifted here,
                so that column s + 1 is predicted from column s. Labels of padding do not count.
            output_router_logits: give the router's logits, and add the load-balancing loss, times
                ``config.moe.router_aux_loss_coef``, to the loss.

        Raises:
            GenerationError: shapes that differ, or ids outside of the vocabulary.
        """
        ids_BS = self._ids(input_ids)
        positions_BS = _positions(_like(attention_mask, ids_BS, "attention_mask"), ids_BS.shape)
        ids = Tensor(np.where(positions_BS >= 0, ids_BS, 0).astype(np.int32))
        with _eagerly(), self._router_logits(output_router_logits) as routers:
            hidden_TH, sums = self.model.hidden_states(ids, Tensor(positions_BS))
            logits_TV = output_logits(hidden_TH, self.model.head_weight())
            aux = None
            if output_router_logits and sums is not None:
                aux = load_balancing_loss(sums, True)
            loss = None
            if labels is not None:
                given_BS = _like(labels, ids_BS, "labels")
                assert given_BS is not None
                targets = _next_labels(given_BS, positions_BS)
                loss = _mean_nll(logits_TV, Tensor(targets.reshape(-1)))
                if aux is not None and self.config.moe is not None:
                    loss = loss + self.config.moe.router_aux_loss_coef * aux
        logits = logits_TV.reshape(*ids_BS.shape, -1)
        return CausalLMOutput(logits, loss, aux, tuple(routers) if aux is not None else None)

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
            raise GenerationError("no prompt", where="inputs", rule="give inputs or input_ids")
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        request = validate(
            GenerationConfig,
            {
                "max_new_tokens": max_new_tokens,
                "temperature": _temperature(do_sample, temperature),
                "top_k": top_k,
                "top_p": top_p,
                "repetition_penalty": repetition_penalty,
                "seed": seed,
                "stop": stops,
            },
            "generate",
        )
        texts = _texts(given)
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
        form = ChatFormat(inner, chat_template, self._eos_ids)
        ids = form.encode_chat(messages, tools)
        result = self.generate([ids], return_dict_in_generate=True, **settings)
        text: str = result.completions[0].text
        return text

    def save_pretrained(
        self,
        path: str | Path,
        *,
        format: Literal["mistral_ms", "hf", "mistral"] = "mistral_ms",
    ) -> None:
        """Writes weights, configuration and the tokenizer's files; all of it, or nothing.

        Args:
            path: the directory, which must not be there.
            format: ``mistral_ms``; ``hf``, what transformers reads; or ``mistral``.

        Raises:
            CheckpointError: an unknown format, something at ``path``, a full disk.
        """
        save_model(Path(path), self.config, self.model.weights(), format, self._files)

    def parameters(self) -> list[Parameter]:
        """The weights that are trained."""
        return list(self.model.trainable_params())

    def num_parameters(self) -> int:
        """Elements of all weights."""
        return sum(each.size for each in self.model.weights().values())

    # ---- generation

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
        engine, inner = self._engine, None if self.tokenizer is None else self.tokenizer.tokenizer
        if (
            engine is None
            or self._engine_compiled != compiled
            or engine.max_length < length
            or engine.batch != len(prompts)
            or engine.tokenizer is not inner
        ):
            longest = self.config.longest_sequence
            # room for a longer prompt the next time
            length = min(longest, max(CHUNK, 1 << (length - 1).bit_length()))
            spec = CacheSpec.for_model(self.config, len(prompts), length, min(CHUNK, length))
            engine = Engine(
                share_parameters(self.model, cache=spec, positions=length, dtype=self.dtype),
                max_length=length,
                chunk=min(CHUNK, length),
                tokenizer=inner,
                graph=compiled,
                eos_ids=self._eos_ids,
            )
            self._engine, self._engine_compiled = engine, compiled
        return engine

    def _prompts(self, given: Any, attention_mask: Any) -> list[list[int]]:
        """Prompts of ids without their padding."""
        if isinstance(given, list | tuple) and given and not np.isscalar(given[0]):
            rows = [list(map(int, row)) for row in given]
            if attention_mask is None:
                return rows
        ids_BS = self._ids(given)
        if attention_mask is None:
            return [row.tolist() for row in ids_BS]
        present_BS = _positions(_like(attention_mask, ids_BS, "attention_mask"), ids_BS.shape) >= 0
        return [row[here].tolist() for row, here in zip(ids_BS, present_BS, strict=True)]

    def _sequences(self, given: Any, prompts: list[list[int]], result: Generation) -> Any:
        if isinstance(given, list | tuple):
            rows = [
                [*prompt, *done.token_ids]
                for prompt, done in zip(prompts, result.completions, strict=True)
            ]
            return rows[0] if np.isscalar(given[0]) else rows
        ids_BS = self._ids(given)
        longest = max(len(done.token_ids) for done in result.completions)
        new_BN = np.full((len(ids_BS), longest), self._padding(), np.int32)
        for row, done in zip(new_BN, result.completions, strict=True):
            row[: len(done.token_ids)] = done.token_ids
        return np.concatenate([ids_BS, new_BN], 1)

    def _padding(self) -> int:
        if self.config.pad_token_id is not None:
            return self.config.pad_token_id
        return self._eos_ids[0] if self._eos_ids else 0

    # ---- whole sequences

    def _ids(self, given: Any) -> np.ndarray:
        """int32 [B, S]."""
        array = _integers(given, "input_ids")
        ids_BS = array[None] if array.ndim == 1 else array
        outside = ids_BS[(ids_BS < 0) | (ids_BS >= self.config.vocab_size)]
        if ids_BS.ndim != 2 or ids_BS.size == 0 or outside.size:
            raise GenerationError(
                "impossible tokens",
                where="input_ids",
                value=f"id {outside[0]}" if outside.size else f"shape {list(array.shape)}",
                rule=f"[batch, sequence] of ids from 0 to {self.config.vocab_size - 1}",
            )
        return ids_BS.astype(np.int32)

    @contextmanager
    def _router_logits(self, wanted: bool) -> Iterator[list[Tensor]]:
        """Keeps what the routers of a pass give, which only runs operator by operator."""
        found: list[Tensor] = []

        def keep(cell: nn.Cell, inputs: Any, output: Any) -> None:
            found.append(output[3])

        sparse = [layer for layer in self.model.layers if layer.sparse] if wanted else []
        handles = [layer.moe.router.register_forward_hook(keep) for layer in sparse]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()


class MistralForCausalLM(PreTrainedModel):
    """A dense model; see the base."""


class MixtralForCausalLM(PreTrainedModel):
    """A model with sparse layers; see the base."""


class AutoModelForCausalLM:
    """Makes the model that a checkpoint or a configuration is of."""

    from_pretrained = PreTrainedModel.from_pretrained
    from_config = PreTrainedModel.from_config


def _class_of(config: ModelConfig) -> type[PreTrainedModel]:
    return MixtralForCausalLM if config.sparse_layers else MistralForCausalLM


@contextmanager
def _eagerly() -> Iterator[None]:
    """Operator by operator; the mode that was set before comes back."""
    before = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    try:
        yield
    finally:
        ms.set_context(mode=before)


def _temperature(do_sample: bool | None, temperature: float | None) -> float:
    if do_sample is False and temperature:
        raise ConfigError(
            "contradiction",
            where="generate: temperature",
            value=temperature,
            rule="do_sample is False, which is greedy",
            todo="leave one of them out",
        )
    if do_sample and temperature == 0:
        raise ConfigError(
            "contradiction",
            where="generate: do_sample",
            value=True,
            rule="temperature 0 is greedy",
            todo="leave one of them out",
        )
    if temperature is None:
        return 1.0 if do_sample else 0.0
    return temperature


def _texts(given: Any) -> list[str] | None:
    if isinstance(given, str):
        return [given]
    if isinstance(given, list | tuple) and given and all(isinstance(one, str) for one in given):
        return list(given)
    return None


def _integers(given: Any, where: str) -> np.ndarray:
    """A whole-number array of what was given.

    Raises:
        GenerationError: rows of several lengths, or something else than whole numbers.
    """
    try:
        array = np.asarray(given.asnumpy() if isinstance(given, Tensor) else given)
    except ValueError:
        array = np.asarray(None)
    if array.dtype == bool:
        array = array.astype(np.int32)
    if not np.issubdtype(array.dtype, np.integer):
        raise GenerationError(
            "not whole numbers",
            where=where,
            value=f"{type(given).__name__} of {array.dtype}",
            rule="rows of equal length, of whole numbers",
        )
    return array


def _like(given: Any, ids_BS: np.ndarray, where: str) -> np.ndarray | None:
    """What stands beside the ids, as int32 [B, S]."""
    if given is None:
        return None
    array = _integers(given, where)
    array = array[None] if array.ndim == 1 else array
    if array.shape != ids_BS.shape:
        raise GenerationError(
            "wrong shape",
            where=where,
            value=list(array.shape),
            rule=f"that of input_ids, {list(ids_BS.shape)}",
        )
    return array.astype(np.int32)


def _positions(mask_BS: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
    """int32 [B, S]: 0, 1, ... from the first token of each row; -1 for padding.

    Raises:
        GenerationError: a row without a token.
    """
    if mask_BS is None:
        return np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).copy()
    present = mask_BS != 0
    if not present.any(1).all():
        row = int(np.flatnonzero(~present.any(1))[0])
        raise GenerationError(
            "empty prompt", where=f"attention_mask, row {row}", rule="at least one token"
        )
    return np.where(present, np.cumsum(present, 1) - 1, -1).astype(np.int32)


def _next_labels(labels_BS: np.ndarray, positions_BS: np.ndarray) -> np.ndarray:
    """Labels of the tokens after each one; IGNORE_INDEX beside padding and at the end."""
    following = np.full_like(labels_BS, IGNORE_INDEX)
    following[:, :-1] = np.where(positions_BS[:, 1:] >= 0, labels_BS[:, 1:], IGNORE_INDEX)
    return np.where(positions_BS >= 0, following, IGNORE_INDEX).astype(np.int32)


def _mean_nll(logits_TV: Tensor, labels_T: Tensor) -> Tensor:
    nll_T, counted_T = token_nll(logits_TV, labels_T)
    return _sum(nll_T) / ops.maximum(_sum(counted_T), ops.ones((), ms.float32))
