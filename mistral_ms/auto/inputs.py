"""What programs give to a model, as arrays: lists, NumPy arrays, MindSpore tensors, texts."""

from __future__ import annotations

from typing import Any

import numpy as np
from mindspore import Tensor

from mistral_ms.config import IGNORE_INDEX
from mistral_ms.errors import ConfigError, GenerationError


def token_ids(given: Any, vocab_size: int) -> np.ndarray:
    """int32 [B, S] of a row, of rows of equal length, of an array or a tensor.

    Raises:
        GenerationError: something else, or ids outside of the vocabulary.
    """
    array = integers(given, "input_ids")
    ids_BS = array[None] if array.ndim == 1 else array
    outside = ids_BS[(ids_BS < 0) | (ids_BS >= vocab_size)]
    if ids_BS.ndim != 2 or ids_BS.size == 0 or outside.size:
        raise GenerationError(
            "impossible tokens",
            where="input_ids",
            value=f"id {outside[0]}" if outside.size else f"shape {list(array.shape)}",
            rule=f"[batch, sequence] of ids from 0 to {vocab_size - 1}",
        )
    return ids_BS.astype(np.int32)


def temperature_of(do_sample: bool | None, temperature: float | None) -> float:
    """What the logits are divided by; 0 is greedy.

    Raises:
        ConfigError: the two contradict each other.
    """
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


def texts_of(given: Any) -> list[str] | None:
    """One text or several, as a list; None of anything else."""
    if isinstance(given, str):
        return [given]
    if isinstance(given, list | tuple) and given and all(isinstance(one, str) for one in given):
        return list(given)
    return None


def integers(given: Any, where: str) -> np.ndarray:
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


def beside(given: Any, ids_BS: np.ndarray, where: str) -> np.ndarray | None:
    """What stands beside the ids, as int32 [B, S]."""
    if given is None:
        return None
    array = integers(given, where)
    array = array[None] if array.ndim == 1 else array
    if array.shape != ids_BS.shape:
        raise GenerationError(
            "wrong shape",
            where=where,
            value=list(array.shape),
            rule=f"that of input_ids, {list(ids_BS.shape)}",
        )
    return array.astype(np.int32)


def positions_of(mask_BS: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray:
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


def check_labels(labels_BS: np.ndarray, vocab_size: int) -> None:
    """Raises where a label is no token.

    Raises:
        GenerationError: names it.
    """
    counted = labels_BS[labels_BS != IGNORE_INDEX]
    wrong = counted[(counted < 0) | (counted >= vocab_size)]
    if wrong.size:
        raise GenerationError(
            "impossible label",
            where="labels",
            value=int(wrong[0]),
            rule=f"ids from 0 to {vocab_size - 1}, or {IGNORE_INDEX} where nothing is predicted",
        )


def next_labels(labels_BS: np.ndarray, positions_BS: np.ndarray) -> np.ndarray:
    """Labels of the tokens after each one; IGNORE_INDEX beside padding and at the end."""
    following = np.full_like(labels_BS, IGNORE_INDEX)
    following[:, :-1] = np.where(positions_BS[:, 1:] >= 0, labels_BS[:, 1:], IGNORE_INDEX)
    return np.where(positions_BS >= 0, following, IGNORE_INDEX).astype(np.int32)
