"""Preferences of a run: its pairs, and their log-probabilities under the reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from mindspore import Tensor

from mistral_ms.checkpoint.run_files import RunFiles
from mistral_ms.config import RunConfig, TrainingConfig, load_run_config
from mistral_ms.config.run import data_of
from mistral_ms.datasets import SequenceSource
from mistral_ms.datasets.preferences import PreferenceSequences, read_preferences
from mistral_ms.errors import ConfigError
from mistral_ms.models import CausalLM
from mistral_ms.models.preference import RowLogProbs
from mistral_ms.ops.modes import graph_mode
from mistral_ms.parallel.context import ParallelContext
from mistral_ms.tokenizer import Tokenizer
from mistral_ms.training.prepare import Say, tokenizer_of


def open_preferences(
    run: RunConfig,
    files: RunFiles,
    say: Say,
    *,
    resuming: bool = False,
) -> tuple[PreferenceSequences, Tokenizer | None]:
    """The pairs of a run and its tokenizer. A run that goes on has them in its own directory.

    Raises:
        ConfigError: no data; other data than those that a run which goes on began with.
        DataError: lines that are no pairs, or that are not for this model.
    """
    training = run.training
    if resuming:
        _check_same_data(run, files)
    tokenizer = tokenizer_of(run, optional=resuming)
    size, seed = training.global_batch_size, training.seed
    if resuming:
        sequences = PreferenceSequences.load(files.preferences, size, seed)
    else:
        data = data_of(run)
        assert tokenizer is not None  # data.inputs need one
        sequences, errors, skipped = read_preferences(
            data.inputs,
            tokenizer,
            data.packing,
            seq_length=training.seq_length,
            batch_size=size,
            seed=seed,
        )
        if skipped:
            first = "; ".join(str(error) for error in errors.values())
            say(f"note: {skipped} lines left out, the first of each kind: {first}")
    sequences.check_model(run.model)
    return sequences, tokenizer


def _check_same_data(run: RunConfig, files: RunFiles) -> None:
    """Checks that a run which goes on names the data of its pairs.

    Raises:
        ConfigError: it names others, which would not be read.
    """
    if not files.config.is_file():
        return
    now, then = (_described(each) for each in (run, load_run_config(files.config)))
    for key, value in then.items():
        if now[key] != value:
            raise ConfigError(
                "resume with other data",
                where=key,
                value=f"now {now[key]}, in {files.config} {value}",
                rule=f"a run with dpo goes on with the pairs in {files.preferences}",
                todo=f"leave {key} out, or start a new run with init_from",
            )


def _described(run: RunConfig) -> dict[str, object]:
    """The keys that pairs are made by; their tokenizer may have moved."""
    data = run.data
    if data is None:
        return {"data.inputs": [], "data.packing": {}}
    inputs = [str(path.resolve()) for path in data.inputs]
    packing = data.packing.model_dump(mode="json", exclude_defaults=True)
    return {"data.inputs": inputs, "data.packing": packing}


def add_reference(
    model: CausalLM,
    training: TrainingConfig,
    data: SequenceSource,
    path: Path,
    parallel_context: ParallelContext,
    say: Say,
) -> None:
    """Computes the log-probabilities of all answers under a model as it is now, and keeps them,
    where preferences are learnt and their log-probabilities are not known yet.

    All ranks must ask: each computes its part of every batch.

    Args:
        model: the reference: what the training begins with, without adapters that were read.
        training: the training.
        data: its pairs, which get them.
        path: the file that keeps pairs and log-probabilities.
        parallel_context: this process among the others.
        say: told what was computed.
    """
    if not isinstance(data, PreferenceSequences) or data.reference_P2 is not None:
        return
    number, parts = parallel_context.data_parallel
    pairs = training.global_batch_size // training.gradient_accumulation_steps
    own = pairs // parts
    forward = RowLogProbs(model)
    found = np.zeros((data.sequences, 2), np.float32)
    for begin in range(0, data.sequences, pairs):
        # the graph has one shape: a last batch that is short begins anew with the first pairs
        samples = np.arange(begin, begin + pairs, dtype=np.int32) % data.sequences
        samples = samples[number * own : (number + 1) * own]
        batch = data.read(samples)
        arrays = batch.ids_BS, batch.labels_BS, batch.positions_BS, batch.segments_BS
        with graph_mode():
            logps_B = forward(*(Tensor(np.ascontiguousarray(each)) for each in arrays))
        new = number * own + np.arange(own) + begin < data.sequences
        found[samples[new]] = logps_B.asnumpy().reshape(-1, 2)[new]
    data.reference_P2 = parallel_context.sum_over_ranks(found)
    if parallel_context.is_rank_0:
        data.save(path)
    say(f"log-probabilities of {data.sequences} pairs under the reference: {path}")
