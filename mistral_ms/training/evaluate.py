"""Perplexity and accuracy of a model on a dataset, each sequence once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mindspore import Tensor

from mistral_ms.checkpoint import open_merged
from mistral_ms.checkpoint.load import kept_quantization, load_weights
from mistral_ms.checkpoint.tensor_set import STATE, read_state
from mistral_ms.config import DROPLESS, IGNORE_INDEX, RoutingConfig
from mistral_ms.config.base import validate
from mistral_ms.datasets import Batch, MindRecordSequences, SequenceSource
from mistral_ms.errors import ConfigError, TokenizerError
from mistral_ms.models import CausalLM, Scores
from mistral_ms.models.quantized import quantized_model
from mistral_ms.moe import check_domains_known
from mistral_ms.ops.modes import graph_mode
from mistral_ms.reading import is_file
from mistral_ms.tokenizer import load_tokenizer


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How well a model predicts a dataset.

    Attributes:
        loss: mean negative log-likelihood per predicted token, in nats.
        perplexity: exp(loss).
        accuracy: share of the predicted tokens that were the model's best guess.
        tokens: predicted tokens.
        sequences: of the dataset.
        seconds: wall time, compilation included.
        tokens_per_s: predicted tokens per second, without the first batch, which compiles.
    """

    loss: float
    perplexity: float
    accuracy: float
    tokens: int
    sequences: int
    seconds: float
    tokens_per_s: float


class Evaluator:
    """Predicts every token of a dataset that counts; compiled once, called as often as one likes.

    Args:
        model: with its weights, and the routing it shall be judged with (dropless, usually).
        data: the sequences; their order does not matter.
        batch_size: sequences at a time.

    Raises:
        ConfigError: the routing's local groups do not divide such a batch; a gate that knows
            several domains.
    """

    def __init__(self, model: CausalLM, data: SequenceSource, batch_size: int = 8) -> None:
        check_domains_known(model.row_domains)
        model.set_train(False)
        self.data, self.batch_size = data, min(batch_size, data.sequences)
        rule = model.routing.broken_groups(self.batch_size, data.seq_length)
        if rule is not None:
            raise ConfigError("impossible evaluation", where="batch_size", rule=rule)
        self._scores = Scores(model)

    def __call__(self, progress: Callable[[int, int], None] | None = None) -> Evaluation:
        """The model's weights as they are now.

        Args:
            progress: called with the sequences done and their number.
        """
        data, size = self.data, self.batch_size
        sums = np.zeros(3, np.float64)
        started = time.perf_counter()
        compiled, first = started, 0.0
        for begin in range(0, data.sequences, size):
            samples = np.arange(begin, min(begin + size, data.sequences), dtype=np.int32)
            batch = _filled(data.read(samples), size)
            arrays = (batch.ids_BS, batch.labels_BS, batch.positions_BS, batch.segments_BS)
            with graph_mode():
                parts = self._scores(*(Tensor(array) for array in arrays))
            sums += [float(part.asnumpy()) for part in parts]
            if begin == 0:
                compiled, first = time.perf_counter(), sums[2]
            if progress is not None:
                progress(begin + len(samples), data.sequences)
        ended = time.perf_counter()
        nll, right, tokens = sums.tolist()
        alone = tokens == first
        rate = tokens / (ended - started) if alone else (tokens - first) / (ended - compiled)
        loss = nll / tokens
        return Evaluation(
            loss=loss,
            perplexity=math.exp(min(loss, 700.0)),
            accuracy=right / tokens,
            tokens=int(tokens),
            sequences=data.sequences,
            seconds=round(ended - started, 3),
            tokens_per_s=round(rate, 1),
        )


def evaluate(
    model: CausalLM,
    data: SequenceSource,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Predicts every token of a dataset that counts, once; see :class:`Evaluator`."""
    return Evaluator(model, data, batch_size)(progress)


def _filled(batch: Batch, rows: int) -> Batch:
    """The graph has one shape: a last batch that is short gets rows of padding."""
    missing = rows - len(batch.samples_B)

    def fill(array: np.ndarray, value: int) -> np.ndarray:
        return np.pad(array, ((0, missing), (0, 0)), constant_values=value)

    return Batch(
        ids_BS=fill(batch.ids_BS, 0),
        labels_BS=fill(batch.labels_BS, IGNORE_INDEX),
        positions_BS=fill(batch.positions_BS, -1),
        segments_BS=fill(batch.segments_BS, -1),
        samples_B=batch.samples_B,
    )


def _routing(checkpoint: Path) -> RoutingConfig:
    """How a checkpoint's model is evaluated."""
    if not is_file(checkpoint / STATE):
        return DROPLESS
    trained = read_state(checkpoint).get("routing", {})
    return validate(RoutingConfig, trained, f"{checkpoint / STATE}: routing").evaluation


def load_for_evaluation(
    checkpoint: Path,
    data: MindRecordSequences,
    kind: str | None = None,
    *,
    adapter: Path | None = None,
    verify: bool = True,
    follow_links: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> CausalLM:
    """A checkpoint's model in float32, after checking that it fits the dataset. Quantised experts
    stay so on CPU.

    It is dropless, unless the training whose checkpoint it is has ``routing.eval_capacity_factor``.
    Then the batches of the evaluation are its dispatch groups.

    Args:
        checkpoint: of any known format.
        data: the dataset.
        kind: which format to take when the directory holds several.
        adapter: directory of an adapter of the checkpoint.
        verify: compare a checkpoint of ours with its digests while it is read.
        follow_links: links may lead out of the directory; see :func:`open_merged`.
        say: told what of the checkpoint has no effect, and what becomes of quantised weights.

    Raises:
        CheckpointError: anything that is wrong with the checkpoint.
        DataError: sequences too long for the model, or tokenised with another vocabulary.
    """
    with open_merged(
        checkpoint, kind, adapter=adapter, verify=verify, follow_links=follow_links
    ) as source:
        try:
            tokenizer = load_tokenizer(source.path)
        except TokenizerError:
            tokenizer = None  # then the sizes of the vocabularies are compared
        data.check_model(source.config, tokenizer)
        kept = kept_quantization(source, "float32")
        if remark := source.remark(kept is not None):
            say(remark)
        model = quantized_model(
            source.config, _routing(source.path), kept, positions=data.info.config.seq_length
        )
        load_weights(source, model.weights())
    return model
