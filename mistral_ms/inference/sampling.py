"""Choosing the next token of each sequence.

The operations, their order and their arithmetic (float32) are those of transformers 4.57:
repetition penalty, then temperature, top-k, top-p, then a draw. At temperature 0 there is no draw:
the penalised logits' maximum is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from mistral_ms.config import GenerationConfig
from mistral_ms.errors import GenerationError

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
Ids = NDArray[np.int64]
Alternative: TypeAlias = tuple[int, float]
"""A token that might have been chosen, and its log-probability."""


@dataclass(frozen=True)
class Sampled:
    """The chosen tokens of one step.

    Attributes:
        ids: int64 [B].
        logprobs: float32 [B], the model's own log-probability of each chosen token: log-softmax of
            the raw logits, before penalty, temperature and filters. It says how likely the model
            found the token, whatever the settings made of it.
        top: of each sequence the most likely tokens, the most likely first, by the same
            log-probabilities; as many as the request's ``top_logprobs``, so empty without them.
    """

    ids: Ids
    logprobs: Floats
    top: tuple[tuple[Alternative, ...], ...] = ()


class Sampler:
    """Samples for a fixed set of sequences, step by step.

    Every sequence draws from a random stream of its own, derived from the seed and the sequence's
    number. What a sequence gets therefore depends on its own logits and number alone: not on its
    neighbours in the batch, nor on when they finish.

    Args:
        config: the request.
        prompts: the ids that each sequence holds already; the repetition penalty counts them.
        numbers: the number of each sequence, for its random stream; 0, 1, 2, ... by default.
    """

    def __init__(
        self,
        config: GenerationConfig,
        prompts: Sequence[Sequence[int]],
        numbers: Sequence[int] | None = None,
    ) -> None:
        self._config = config
        self._prompts = [np.asarray(prompt, dtype=np.int64) for prompt in prompts]
        self._seen: Bools | None = None  # [sequences, V], once V is known
        self._numbers = list(range(len(prompts)) if numbers is None else numbers)
        self._streams = [np.random.default_rng([config.seed, number]) for number in self._numbers]

    def __call__(self, logits: Floats, rows: Sequence[int] | None = None) -> Sampled:
        """Chooses one token for each row of ``logits`` and remembers it.

        Args:
            logits: float32 [B, V], as the model gives them for the last position.
            rows: which sequence each row belongs to, without repeats; all of them, in order, by
                default. Sequences that have ended need not be given any more.

        Raises:
            GenerationError: logits with a NaN or +inf, or a row that is all -inf; or penalty or
                temperature make them so.
        """
        rows = list(range(len(self._streams)) if rows is None else rows)
        if logits.ndim != 2 or len(logits) != len(rows):
            raise ValueError(f"logits {logits.shape} for {len(rows)} sequences")
        _check_finite(logits, [self._numbers[row] for row in rows])
        scores = logits.astype(np.float32)  # a copy: the caller's logits stay as they are
        if self._config.repetition_penalty != 1.0:
            seen = self._seen_tokens(logits.shape[1])[rows]
            with np.errstate(over="ignore"):  # checked next
                scores = penalise_repetition(scores, seen, self._config.repetition_penalty)
            _check_finite(scores, [self._numbers[row] for row in rows])
        if self._config.greedy:
            ids = scores.argmax(axis=1).astype(np.int64)
        else:
            with np.errstate(over="ignore"):  # checked next
                scores = scores / np.float32(self._config.temperature)
            _check_finite(scores, [self._numbers[row] for row in rows])
            scores = keep_top_k(scores, self._config.top_k)
            scores = keep_top_p(scores, self._config.top_p)
            draws = np.array([self._streams[row].random() for row in rows])
            ids = draw(softmax(scores), draws)
        if self._seen is not None:
            self._seen[rows, ids] = True
        top = self._config.top_logprobs
        return Sampled(ids, log_probabilities(logits, ids), most_likely(logits, top) if top else ())

    def _seen_tokens(self, vocab_size: int) -> Bools:
        if self._seen is None:
            self._seen = np.zeros((len(self._prompts), vocab_size), dtype=np.bool_)
            for row, prompt in enumerate(self._prompts):
                self._seen[row, prompt] = True
        return self._seen


def penalise_repetition(scores_BV: Floats, seen_BV: Bools, penalty: float) -> Floats:
    """Makes seen tokens less likely: positive scores are divided, negative ones multiplied."""
    factor = np.float32(penalty)
    penalised = np.where(scores_BV < 0, scores_BV * factor, scores_BV / factor)
    return np.where(seen_BV, penalised, scores_BV)


def keep_top_k(scores_BV: Floats, top_k: int) -> Floats:
    """Sets all but the ``top_k`` highest scores of each row to -inf; equals of the last stay."""
    if not 0 < top_k < scores_BV.shape[1]:
        return scores_BV
    lowest = np.partition(scores_BV, -top_k, axis=1)[:, -top_k, None]
    return np.where(scores_BV < lowest, np.float32(-np.inf), scores_BV)


def keep_top_p(scores_BV: Floats, top_p: float) -> Floats:
    """Keeps the fewest highest scores whose probabilities reach ``top_p``; at least one.

    From the lowest up, tokens go while their summed probability is at most 1 - top_p; of equals
    the larger id goes first (torch leaves open which one).
    """
    if top_p >= 1:
        return scores_BV
    order = np.argsort(-scores_BV, axis=1, kind="stable")[:, ::-1]
    ascending = np.take_along_axis(scores_BV, order, axis=1)
    # Summed in float64 and rounded, as torch does: the same tokens fall at the threshold.
    summed = np.cumsum(softmax(ascending), axis=1, dtype=np.float64).astype(np.float32)
    drop = summed <= np.float32(1 - top_p)
    drop[:, -1] = False
    dropped = np.zeros_like(drop)
    np.put_along_axis(dropped, order, drop, axis=1)
    return np.where(dropped, np.float32(-np.inf), scores_BV)


def softmax(scores_BV: Floats) -> Floats:
    """Probabilities of each row, float32; exactly 0 where the score is -inf."""
    powers = np.exp(scores_BV - scores_BV.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def draw(probabilities_BV: Floats, uniforms_B: NDArray[np.float64]) -> Ids:
    """Turns uniform numbers in [0, 1) into tokens, by the inverse of the cumulative distribution.

    A token of probability 0 is never drawn.
    """
    cumulative = np.cumsum(probabilities_BV, axis=1, dtype=np.float64)
    targets = uniforms_B[:, None] * cumulative[:, -1:]
    ids = (cumulative <= targets).sum(axis=1)
    # Rounding may carry a target up to the total: then the last possible token is meant.
    last = probabilities_BV.shape[1] - 1 - (probabilities_BV[:, ::-1] > 0).argmax(axis=1)
    return np.minimum(ids, last).astype(np.int64)


def log_probabilities(logits_BV: Floats, ids_B: Ids) -> Floats:
    """Log-softmax of each row at the chosen token, float32 [B]."""
    shifted = logits_BV.astype(np.float64) - logits_BV.max(axis=1, keepdims=True)
    total = np.log(np.exp(shifted).sum(axis=1))
    chosen = np.take_along_axis(shifted, ids_B[:, None], axis=1)[:, 0]
    return (chosen - total).astype(np.float32)


def most_likely(logits_BV: Floats, count: int) -> tuple[tuple[Alternative, ...], ...]:
    """The ``count`` most likely tokens of each row; the smallest id first among equals."""
    order_BV = np.argsort(-logits_BV, axis=1, kind="stable")[:, :count]
    logprobs = [log_probabilities(logits_BV, ids_B) for ids_B in order_BV.T]
    return tuple(
        tuple((int(token), float(logprobs[place][row])) for place, token in enumerate(ids))
        for row, ids in enumerate(order_BV)
    )


class LogitsError(GenerationError):
    """Logits that no token can be chosen by."""


def _check_finite(logits_BV: Floats, numbers: Sequence[int]) -> None:
    """The maximum of a row is a number unless the row holds a NaN, a +inf, or only -inf."""
    bad = np.flatnonzero(~np.isfinite(logits_BV.max(axis=1)))
    if bad.size:
        raise LogitsError(
            "logits are not finite",
            where=f"sequence {numbers[int(bad[0])]}",
            value=f"largest logit {logits_BV[bad[0]].max()}",
            rule="sampling needs numbers",
            todo="check the dtype: float16 overflows at 65504",
        )
