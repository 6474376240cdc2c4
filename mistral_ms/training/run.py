"""A run from its configuration: data, model, resume, the loop, checkpoints, pictures, summary."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mindspore as ms
import yaml

from mistral_ms.checkpoint import (
    BackgroundWriter,
    CheckpointSeries,
    open_checkpoint,
    read_state,
    tokenizer_files,
)
from mistral_ms.checkpoint.load import load_weights
from mistral_ms.config import DataConfig, RunConfig
from mistral_ms.datasets import MindRecordWindows, build_dataset
from mistral_ms.errors import ConfigError, TokenizerError, TrainingError
from mistral_ms.models import CausalLM
from mistral_ms.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from mistral_ms.training.failure import write_failure
from mistral_ms.training.figures import write_figures
from mistral_ms.training.files import RunFiles
from mistral_ms.training.identity import Identity, computation
from mistral_ms.training.interrupt import stop_on_signals
from mistral_ms.training.loop import Observer, TrainingSummary, train
from mistral_ms.training.memory import MemoryReport, memory_report
from mistral_ms.training.metrics import MetricsWriter, StepRecord, read_metrics
from mistral_ms.training.state import restore, take_snapshot
from mistral_ms.training.step import NotFiniteError, TrainStep
from mistral_ms.training.tensorboard import TensorBoardWriter

Say = Callable[[str], None]


@dataclass(frozen=True)
class RunResult:
    """What a run left behind.

    Attributes:
        files: where it is.
        summary: what the training came to.
        checkpoint: the last one.
        memory: bytes that were kept, and where.
        stopped_by: the signal that ended it early; None otherwise.
    """

    files: RunFiles
    summary: TrainingSummary
    checkpoint: Path
    memory: MemoryReport
    stopped_by: int | None

    def summary_values(self) -> dict[str, Any]:
        """The content of ``summary.json``."""
        values = asdict(self.summary) | {
            "checkpoint": str(self.checkpoint),
            "memory": asdict(self.memory),
        }
        lost = ("first_lm_loss", "final_lm_loss")  # JSON has no NaN
        return values | {name: None for name in lost if math.isnan(values[name])}


class TrainingRun:
    """Everything of a run that is ready to start.

    Args:
        run: the configuration.
        output: the run's directory.
        resume: go on with the training that is there; otherwise the directory must hold none.
        say: told in a line each what is being done.

    Raises:
        MistralMsError: whatever is wrong with configuration, data, checkpoint or directory; a new
            run has then left nothing behind but its dataset.
    """

    def __init__(self, run: RunConfig, output: Path, *, resume: bool, say: Say) -> None:
        self.files, self._say = RunFiles(output), say
        _check_device(run)
        if resume:
            self.files.again()
        else:
            self.files.begin()
        self.data, tokenizer = _open_data(run, self.files, say)
        training = run.training.with_steps(self.data.windows)
        self.run = run.model_copy(update={"training": training})
        self.identity = Identity(run.model, run.routing, training, self.data.info.digest)
        self.series = CheckpointSeries(self.files.checkpoints, run.checkpoint.keep_last)
        model = CausalLM(run.model, run.routing, dtype=training.dtype)
        found = self._newest() if resume else None
        if found is None:
            _initialize(model, run, say)
        self.side_files = _side_files(found or run.init_from, tokenizer)
        self.update = TrainStep(model, training, pooled_aux=run.routing.aux_loss == "pooled")
        self.history: list[StepRecord] = []
        self._saved: int | None = None
        if found is not None:
            restore(self.update, found)
            self._saved = self.update.progress.step
            if self.files.metrics.exists():
                step = self.update.progress.step
                self.history = read_metrics(self.files.metrics, step)
        self.memory = memory_report(self.update)

    def _newest(self) -> Path:
        """The checkpoint to go on with; says why others are not taken."""
        for leftover in self.series.clean():
            self._say(f"removed what a killed writer left: {leftover}")
        found = self.series.newest()
        if found is None:
            raise TrainingError(
                "nothing to resume",
                where=self.files.checkpoints,
                rule="the run that is resumed must have saved a checkpoint",
                todo="start it again without --resume, into another directory",
            )
        for other in found.passed_over:
            self._say(f"passed over {other.path}: {other.reason}")
        for change in self.identity.compare(read_state(found.path), found.path):
            self._say(f"changed since the checkpoint: {change}")
        self._say(f"resuming from {found.path}")
        return found.path

    def execute(self, observers: Sequence[Observer] = ()) -> RunResult:
        """Trains to the end, or until a signal asks to stop; both save a checkpoint.

        Args:
            observers: called with each step's record, after the run's own.

        Raises:
            NotFiniteError: a loss that is not finite; a report and a checkpoint from before the
                step were written.
            CheckpointError: a checkpoint could not be written; older ones are still there.
        """
        files, update = self.files, self.update
        files.config.write_text(_spelled_out(self.run), encoding="utf-8")
        records = list(self.history)
        with ExitStack() as stack:
            writer = stack.enter_context(BackgroundWriter())
            stop = stack.enter_context(stop_on_signals())
            metrics = stack.enter_context(MetricsWriter(files.metrics, self.history))
            first = update.progress.step + 1
            events = stack.enter_context(TensorBoardWriter(files.tensorboard, first))
            saver = self._saver(writer)
            own: tuple[Observer, ...] = (records.append, metrics, events, saver)
            try:
                summary = train(
                    update, self.data, (*own, *observers), history=self.history, stop=stop
                )
            except NotFiniteError as error:
                self._explain(error, writer)
                raise
            self._save(writer)
        path = self.series.path(update.progress.step)
        result = RunResult(files, summary, path, self.memory, stop.number)
        write_figures(files.figures, records, self.run)
        text = json.dumps(result.summary_values(), indent=2) + "\n"
        files.summary.write_text(text, encoding="utf-8")
        return result

    def _saver(self, writer: BackgroundWriter) -> Observer:
        every, last = self.run.checkpoint.every, self.run.training.last_step

        def save(record: StepRecord) -> None:
            writer.check()
            if every is not None and record.step % every == 0 and record.step < last:
                self._save(writer)

        return save

    def _save(self, writer: BackgroundWriter) -> None:
        """Copies the state now and writes it while the training goes on."""
        step = self.update.progress.step
        if step == self._saved:
            return
        self._saved = step
        snapshot = take_snapshot(self.update, self.identity)

        def write(path: Path) -> None:
            snapshot.write(path, self.side_files)

        writer.submit(lambda: self.series.save(step, write))

    def _explain(self, error: NotFiniteError, writer: BackgroundWriter) -> None:
        path = self.files.failure(error.step)
        write_failure(path, self.update.model, error, self.run.training.micro_batches)
        self._save(writer)
        self._say(
            f"report with the samples and the statistics of every layer: {path}; "
            f"the state before the step: {self.series.path(error.step - 1)} "
            f"(--resume {self.files.root} replays it)"
        )


def _check_device(run: RunConfig) -> None:
    device = ms.get_context("device_target")
    if run.training.dtype == "bfloat16" and device == "CPU":
        raise ConfigError(
            "dtype without kernels",
            where="training.dtype",
            value="bfloat16 on CPU",
            rule="MindSpore's CPU back end multiplies float32 and (slowly) float16 matrices only",
            todo="use float32 here; bfloat16 is for Ascend",
        )


def _open_data(
    run: RunConfig, files: RunFiles, say: Say
) -> tuple[MindRecordWindows, Tokenizer | None]:
    """The windows, packed first where the run names texts; and the tokenizer, if one is known."""
    data, training = run.data, run.training
    if data is None:
        raise ConfigError(
            "nothing to learn", where="data", rule="name data.dataset, or data.inputs"
        )
    tokenizer = _tokenizer(run)
    if data.dataset is not None:
        directory = data.dataset
    else:
        directory = files.dataset
        if not directory.exists():
            assert tokenizer is not None
            config = DataConfig(seq_length=training.seq_length, **data.packing.model_dump())
            counts = build_dataset(data.inputs, tokenizer, config, directory).info.counts
            say(f"packed {counts.tokens} tokens into {counts.windows} windows: {directory}")
    windows = MindRecordWindows(directory, training.global_batch_size, training.seed)
    if windows.seq_length != training.seq_length:
        raise ConfigError(
            "windows of another length",
            where="training.seq_length",
            value=training.seq_length,
            rule=f"the dataset {directory} has windows of {windows.seq_length} tokens",
            todo="pack it again, or train with its length",
        )
    windows.check_model(run.model, tokenizer)
    return windows, tokenizer


def _tokenizer(run: RunConfig) -> Tokenizer | None:
    """The one that the run names, or that of the checkpoint it starts from."""
    if run.data is not None and run.data.tokenizer is not None:
        return find_tokenizer(run.data.tokenizer)
    if run.init_from is None:
        return None
    try:
        return load_tokenizer(run.init_from)
    except TokenizerError:
        return (
            None  # a checkpoint need not have one; then the sizes of the vocabularies are compared
        )


def _side_files(begun_from: Path | None, tokenizer: Tokenizer | None) -> dict[str, bytes]:
    """What checkpoints carry beside the weights: what lay beside those that were read, if any.

    Read now: the checkpoint that a training goes on from may be pruned before the next is written.
    """
    files = {} if begun_from is None else tokenizer_files(begun_from)
    if not files and tokenizer is not None:
        files = dict(tokenizer.files)
    return {n: data if isinstance(data, bytes) else data.read_bytes() for n, data in files.items()}


def _initialize(model: CausalLM, run: RunConfig, say: Say) -> None:
    """Draws the weights, or reads them from the checkpoint that the run names.

    Raises:
        ConfigError: the checkpoint is of another model.
    """
    if run.init_from is None:
        model.initialize(run.training.seed)
        return
    with open_checkpoint(run.init_from) as source:
        ours, theirs = computation(run.model), computation(source.config)
        differing = [key for key in ours if ours[key] != theirs[key]]
        if differing:
            key = differing[0]
            raise ConfigError(
                "checkpoint of another model",
                where=f"model.{key}",
                value=ours[key],
                rule=f"init_from {run.init_from} has {theirs[key]}",
                todo="leave model out of the run to take the checkpoint's",
            )
        load_weights(source, model.weights())
    say(f"weights from {run.init_from}")


def _spelled_out(run: RunConfig) -> str:
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False)
