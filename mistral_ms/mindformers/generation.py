"""Our steps under MindFormers' generator: its loop, sampling, streamers and stopping stay.

Its own steps keep a graph for each phase of a model and pad every prompt to ``seq_length``. Here a
step is the same as in :mod:`mistral_ms.inference`: ragged rows by position -1, prompts padded to
the next power of two, one graph for each width, ``config.batch_size`` rows.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import mindspore as ms
import numpy as np
from mindformers.generation.text_generator import GenerationMixin
from mindspore import Tensor

from mistral_ms.errors import GenerationError
from mistral_ms.layers.parameter import is_buffer
from mistral_ms.models import CausalLM, NextTokenLogits
from mistral_ms.parallel.graph import GraphNextToken


class CachedGeneration(GenerationMixin):
    """Generation for a model whose ``language_model`` has a cache.

    Attributes:
        config: has ``batch_size``, the rows of the cache.
    """

    config: Any
    detailed_latency: Any

    @property
    @abstractmethod
    def language_model(self) -> CausalLM | GraphNextToken:
        """The model that generates, with its cache."""

    def make_steps(self, model: CausalLM) -> None:
        """To be called with the model, before its parameters get their names."""
        # in a prediction of several processes MindSpore leaves parameters without values, which
        # the first graph would give them when the cache was reset already
        for kept in filter(is_buffer, model.get_parameters()):
            kept.init_data()
        step = NextTokenLogits(model)
        step.set_train(False)
        self._next_token_logits = ms.jit(step.construct)

    def generate(self, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """See MindFormers. Prompts may be of different lengths, as lists or padded on the right;
        more of them than ``config.batch_size`` run in groups.

        Args:
            input_ids: token ids, of one prompt or of several.
            args: those of MindFormers.
            kwargs: likewise.

        Returns:
            The token ids of each prompt and its continuation, or what
            ``return_dict_in_generate`` asks for.

        Raises:
            GenerationError: more prompts than rows, and a streamer or scores are asked for.
        """
        prompts = self._padded(input_ids, kwargs.get("pad_token_id"))
        rows = self._rows()
        if len(prompts) <= rows:
            return super().generate(prompts, *args, **kwargs)
        if kwargs.get("streamer") is not None or kwargs.get("return_dict_in_generate"):
            raise GenerationError(
                "more prompts than rows",
                where="model_config.batch_size",
                value=f"{len(prompts)} prompts, {rows} rows",
                rule="a streamer, or a result with scores, is of one group of prompts",
                todo=f"set batch_size to {len(prompts)}",
            )
        found: list[np.ndarray] = []
        for first in range(0, len(prompts), rows):
            found += super().generate(prompts[first : first + rows], *args, **kwargs)
            kwargs.pop("seed", None)  # the first group's stream of random numbers goes on
        return found

    def _rows(self) -> int:
        """Prompts that are computed side by side."""
        return int(self.config.batch_size) if self.config.use_past else 1 << 30

    def _padded(self, input_ids: Any, pad: int | None) -> np.ndarray:
        """Prompts as one array, padded on the right."""
        if isinstance(input_ids, Tensor):
            input_ids = input_ids.asnumpy()
        if np.ndim(input_ids[0]) == 0:
            input_ids = [input_ids]
        if pad is None:
            pad = self.config.pad_token_id or 0
        width = max(len(prompt) for prompt in input_ids)
        padded = np.full((len(input_ids), width), pad, np.int32)
        for row, prompt in zip(padded, input_ids, strict=True):
            row[: len(prompt)] = prompt
        return padded

    def _incremental_infer(
        self,
        model_inputs: dict[str, Any],
        prefill: bool,
        current_index: Any,
        key_cache: Any = None,
        value_cache: Any = None,
        need_flatten: bool = False,
    ) -> Tensor:
        """The logits [b, V] after the newest token of each row; called by MindFormers' loop.

        Args:
            model_inputs: ``input_ids`` [b, S], ``batch_valid_length``, and ``slot_mapping``, which
                is -1 for rows that have ended.
            prefill: the first step, of whole prompts.
            current_index: unused.
            key_cache: unused.
            value_cache: unused.
            need_flatten: unused.
        """
        ids = model_inputs["input_ids"]
        ids = ids.asnumpy() if isinstance(ids, Tensor) else np.asarray(ids)
        lengths = np.asarray(model_inputs["batch_valid_length"]).reshape(-1)
        self.detailed_latency.start_predict_timer()
        if prefill:
            inputs = self._prompts(ids, lengths)
            self.language_model.reset_cache()
        else:
            living = model_inputs["slot_mapping"].asnumpy().reshape(-1) >= 0
            inputs = self._newest(ids, lengths, living)
        logits = self._next_token_logits(*(Tensor(array) for array in inputs))
        return logits[: len(lengths)]

    def _prompts(self, ids: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, ...]:
        """Ids and positions [batch_size, width], and the last column of each row."""
        width = min(ids.shape[1], 1 << (int(lengths.max()) - 1).bit_length())
        new, positions, last = self._padding(width)
        for row, length in enumerate(lengths):
            new[row, :length] = ids[row, :length]
            positions[row, :length] = np.arange(length)
            last[row] = length - 1
        return new, positions, last

    def _newest(
        self, ids: np.ndarray, lengths: np.ndarray, living: np.ndarray
    ) -> tuple[np.ndarray, ...]:
        """The same of one token a row; rows that have ended are padding."""
        new, positions, last = self._padding(1)
        for row, length in enumerate(lengths):
            if living[row]:
                new[row, 0] = ids[row, min(length, ids.shape[1]) - 1]
                positions[row, 0] = length - 1
        return new, positions, last

    def _padding(self, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = self._rows()
        shape = rows, width
        return np.zeros(shape, np.int32), np.full(shape, -1, np.int32), np.zeros(rows, np.int32)
