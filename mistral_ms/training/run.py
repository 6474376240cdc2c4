"""A run from its configuration: data, model, resume, the loop, checkpoints, pictures, summary."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mindspore as ms

from mistral_ms.checkpoint import BackgroundWriter, CheckpointSeries, read_state
from mistral_ms.checkpoint.run_files import RunFiles
from mistral_ms.config import RunConfig, spelled_out
from mistral_ms.datasets import SequenceSource
from mistral_ms.errors import CheckpointError, TrainingError
from mistral_ms.models import CausalLM
from mistral_ms.optimizers import with_settings
from mistral_ms.parallel.context import ParallelContext
from mistral_ms.parallel.memory import too_large
from mistral_ms.tokenizer import Tokenizer
from mistral_ms.training.adapters import check_adapters, initialize_weights, write_adapter
from mistral_ms.training.failure import write_failure
from mistral_ms.training.figures import write_figures
from mistral_ms.training.graph_step import GraphTrainStep
from mistral_ms.training.held_out import HeldOut, OnEvaluation, check_evaluation
from mistral_ms.training.identity import Identity
from mistral_ms.training.interrupt import stop_on_signals
from mistral_ms.training.loop import Observer, TrainingSummary, train
from mistral_ms.training.memory import MemoryReport, step_memory
from mistral_ms.training.metrics import MetricsWriter, StepRecord, read_metrics
from mistral_ms.training.objective import make_objective
from mistral_ms.training.parts import save_parts, take_part
from mistral_ms.training.preferences import add_reference, open_preferences
from mistral_ms.training.prepare import (
    Say,
    check_settings,
    open_data,
    open_held_out,
    open_teacher,
    quantization_of_base,
    side_files,
)
from mistral_ms.training.result import NotFiniteError
from mistral_ms.training.state import restore, take_snapshot
from mistral_ms.training.step import TrainStep, Update
from mistral_ms.training.tensorboard import TensorBoardWriter

LOOKS_AHEAD = (
    "routing.allow_future: experts are chosen among later tokens, too, so the losses of this "
    "training are not those of a causal model; evaluate and generate let the tokens choose"
)


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
        parallel_context: which part of the run this process has; None when it is alone.
        data: the sequences, of a program that has them; None: those that the run names.
        held_out: likewise, those that it is judged by.
        model: what is trained, of a program that has it, with explicit execution in one process;
            None: one is made, its weights drawn or read as the run says.

    Raises:
        BusyError: another training is writing into the directory.
        MistralMsError: whatever is wrong with configuration, data, checkpoint or directory; a new
            run has then left nothing behind but its dataset.
    """

    def __init__(
        self,
        run: RunConfig,
        output: Path,
        *,
        resume: bool,
        say: Say,
        parallel_context: ParallelContext | None = None,
        data: SequenceSource | None = None,
        held_out: SequenceSource | None = None,
        model: CausalLM | None = None,
    ) -> None:
        self.files, self._say = RunFiles(output), say
        self._given = data, held_out, model
        self.parallel_context = (
            ParallelContext(run.parallel) if parallel_context is None else parallel_context
        )
        run = check_settings(run)
        if resume:
            self.files.again()
        elif self.parallel_context.is_rank_0:
            self.files.begin()
        with ExitStack() as stack:
            if self.parallel_context.is_rank_0:
                stack.enter_context(self.files.claim())
            self._prepare(run, resume)
            self._claim = stack.pop_all()

    def _prepare(self, run: RunConfig, resume: bool) -> None:
        """Everything that comes before the first step."""
        say = self._say
        check_adapters(run, self._given[-1] is not None)
        if run.evaluation is not None:
            way = run.parallel.execution_on(ms.get_context("device_target"))
            check_evaluation(self.parallel_context.world, way)
        given, held_out, _ = self._given
        tokenizer: Tokenizer | None = None
        self.data: SequenceSource
        if given is None and run.dpo is not None:
            self.data, tokenizer = open_preferences(run, self.files, say, resuming=resume)
        elif given is None:
            self.data, tokenizer = open_data(
                run, self.files, self.parallel_context, say, resuming=resume
            )
        else:
            self.data = given
        if run.evaluation is not None and held_out is None:
            held_out = open_held_out(run, self.files, tokenizer, self.parallel_context, say)
        if run.looks_ahead:
            say(LOOKS_AHEAD)
        training = with_settings(run.training.with_max_steps(self.data.sequences))
        self.run = run.model_copy(update={"training": training})
        way = run.parallel.execution_on(ms.get_context("device_target"))
        layout = run.parallel.model_copy(update={"execution": way})
        self.identity = Identity(
            run.model, run.routing, training, layout, self.data.digest, run.dpo
        )
        self.series = CheckpointSeries(self.files.checkpoints, run.checkpoint.save_total_limit)
        found = self._newest() if resume else None
        self.update = self._update(drawn=found is None)
        if found is None:  # a new run's preferences have their reference only now
            self.identity = replace(self.identity, dataset=self.data.digest)
        start = run.init_from if found is None else None
        begun_from, follow = (start.directory, start.follow_links) if start else (found, False)
        self.side_files = side_files(begun_from, tokenizer, follow)
        self.history: list[StepRecord] = []
        self._saved: int | None = None
        self._phase: Callable[[str], None] = lambda name: None
        if found is not None:
            restore(self.update, found)
            self._saved = self.update.progress.step
            if self._saved > self.run.training.last_step:
                raise TrainingError(
                    "nothing to train",
                    where=found,
                    value=f"step {self._saved} of {self.run.training.last_step}",
                    rule="the run that is resumed is beyond the last step",
                    todo=f"set training.max_steps to {self._saved} or more",
                )
            if self.files.metrics.exists():
                step = self.update.progress.step
                self.history = read_metrics(self.files.metrics, step)
        self.held_out: HeldOut | None = None
        if run.evaluation is not None:
            assert held_out is not None and isinstance(self.update, TrainStep)
            self.held_out = HeldOut(
                run.evaluation,
                self.update.model,
                run.routing.evaluation,
                run.training.dtype,
                held_out,
                last_step=self.run.training.last_step,
                path=self.files.evaluations,
                step=self.update.progress.step,
                best=self.files.best,
                extra_files=dict(self.side_files),
            )
        self.memory = self.update.memory()
        device = ms.get_context("device_target")
        self.activations = step_memory(self.run, self.parallel_context, self.memory, device)
        needed = self.memory.device + self.activations.total
        self.memory_warning = too_large(needed, self.run.parallel.max_device_memory, device)

    def _update(self, drawn: bool) -> Update:
        """The training step, on the path that the run names.

        Args:
            drawn: its weights are drawn or read now; otherwise a checkpoint's will come.
        """
        run, parallel_context = self.run, self.parallel_context
        drawn = drawn or run.lora is not None  # a checkpoint of adapters has no base
        if run.parallel.execution_on(ms.get_context("device_target")) == "graph":
            update = GraphTrainStep(run, parallel_context, segmented=self.data.segmented)
            if drawn:
                held, lies = update.weights(), update.storage
                initialize_weights(held, lies, run, parallel_context, self._say)
            return update
        *_, model = self._given
        if model is None:
            kept = quantization_of_base(run, parallel_context)
            dtype, length = run.training.dtype, run.training.seq_length
            model = parallel_context.build_stage(run.model, run.routing, dtype, length, kept)
        else:
            drawn = False  # it has its weights
        if drawn:  # before the optimizer copies them
            storage = parallel_context.storage(model.specs)
            path, say = self.files.preferences, self._say

            def begun() -> None:
                model.begin_adapters()
                add_reference(model, run.training, self.data, path, parallel_context, say)

            initialize_weights(model.weights(), storage, run, parallel_context, say, begun)
        objective = make_objective(
            model,
            run.training,
            pooled_aux=run.routing.aux_loss == "pooled",
            parallel_context=parallel_context,
            before=open_teacher(run, self._say),
            dpo=run.dpo,
        )
        return TrainStep(objective, run.training, parallel_context=parallel_context)

    def _newest(self) -> Path:
        """The checkpoint to go on with; says why others are not taken."""
        if self.parallel_context.is_rank_0:
            for leftover in self.series.clean():
                self._say(f"removed what a killed writer left: {leftover}")
        self.parallel_context.barrier()
        found = self._verified()
        if found is None:
            raise TrainingError(
                "nothing to resume",
                where=self.files.checkpoints,
                rule="the run that is resumed must have saved a checkpoint",
                todo="start it again without --resume, into another directory",
            )
        for change in self.identity.compare(read_state(found), found):
            self._say(f"changed since the checkpoint: {change}")
        self._say(f"resuming from {found}")
        return found

    def _verified(self) -> Path | None:
        """The newest whole checkpoint: the first process reads every byte, the others ask it."""
        found = None
        try:
            if self.parallel_context.is_rank_0:
                found = self.series.newest()
        except CheckpointError:
            self.parallel_context.broadcast(0)
            raise
        number = self.parallel_context.broadcast(0 if found is None else found.step + 1)
        for other in found.passed_over if found is not None else ():
            self._say(f"passed over {other.path}: {other.reason}")
        return None if number == 0 else self.series.path(number - 1)

    def execute(
        self,
        observers: Sequence[Observer] = (),
        phase: Callable[[str], None] = lambda name: None,
        *,
        on_evaluation: Sequence[OnEvaluation] = (),
        stop: Callable[[], bool] = lambda: False,
    ) -> RunResult:
        """Trains to the end, or until a signal, too many evaluations without progress, or ``stop``
        ask to end; each saves a checkpoint.

        Args:
            observers: called with each step's record, after the run's own.
            phase: told the name of whatever takes time and is not a step.
            on_evaluation: called with the record of each evaluation on held-out data.
            stop: asked before each step.

        Raises:
            NotFiniteError: a loss that is not finite; a report and a checkpoint from before the
                step were written.
            CheckpointError: a checkpoint could not be written; older ones are still there.
        """
        self._phase = phase
        phase("first step")
        with self._claim:  # ends when the last file is written
            return self._execute(observers, on_evaluation, stop)

    def _execute(
        self,
        observers: Sequence[Observer],
        on_evaluation: Sequence[OnEvaluation],
        ends: Callable[[], bool],
    ) -> RunResult:
        files, update, held_out = self.files, self.update, self.held_out
        records = list(self.history)
        with ExitStack() as stack:
            writer = stack.enter_context(BackgroundWriter())
            stop = stack.enter_context(stop_on_signals())
            own: list[Observer] = [records.append]
            if self.parallel_context.is_rank_0:
                files.config.write_text(spelled_out(self.run), encoding="utf-8")
                own.append(stack.enter_context(MetricsWriter(files.metrics, self.history)))
                first = update.progress.step + 1
                board = stack.enter_context(TensorBoardWriter(files.tensorboard, first))
                own.append(board)
                on_evaluation = (board.evaluated, *on_evaluation)
            if self.held_out is not None:  # before it is saved: a resume makes up for no evaluation
                own.append(self._judge(self.held_out, on_evaluation))
            own.append(self._saver(writer))
            try:
                summary = train(
                    update,
                    self.data,
                    (*own, *observers),
                    history=self.history,
                    stop=lambda: self.parallel_context.any_rank(
                        stop() or ends() or (held_out is not None and held_out.ends_training)
                    ),
                    world_size=self.parallel_context.world,
                )
            except NotFiniteError as error:
                self._explain(error, writer)
                raise
            self._save(writer)
        path = self.series.path(update.progress.step)
        result = RunResult(files, summary, path, self.memory, stop.number)
        if self.parallel_context.is_rank_0:
            if self.run.lora is not None:
                write_adapter(self.run, path, files.adapter)
            write_figures(files.figures, records, self.run)
            if len(records) > len(self.history) or not files.summary.exists():
                text = json.dumps(result.summary_values(), indent=2) + "\n"
                files.summary.write_text(text, encoding="utf-8")
        return result

    def _saver(self, writer: BackgroundWriter) -> Observer:
        every, last = self.run.checkpoint.save_steps, self.run.training.last_step

        def save(record: StepRecord) -> None:
            writer.check()
            if every is not None and record.step % every == 0 and record.step < last:
                self._save(writer)

        return save

    def _judge(self, held_out: HeldOut, told: Sequence[OnEvaluation]) -> Observer:
        def judge(record: StepRecord) -> None:
            self._phase("evaluating")
            held_out(record, told)

        return judge

    def _save(self, writer: BackgroundWriter) -> None:
        """Copies the state now and writes it while the training goes on."""
        step = self.update.progress.step
        if step == self._saved:
            return
        self._saved = step
        self._phase("saving")
        if self.parallel_context.world > 1:
            part = take_part(self.update, self.identity, self.parallel_context)
            save_parts(part, self.series, self.side_files, self.parallel_context, writer)
            return
        snapshot = take_snapshot(self.update, self.identity)

        def write(path: Path) -> None:
            snapshot.write(path, self.side_files)

        writer.submit(lambda: self.series.save(step, write))

    def _explain(self, error: NotFiniteError, writer: BackgroundWriter) -> None:
        path = self.files.failure(error.step)
        write_failure(path, self.update, error, self.parallel_context)
        self._save(writer)
        self._say(
            f"report with the samples and the statistics of every layer: {path}; "
            f"the state before the step: {self.series.path(error.step - 1)} "
            f"(--resume {self.files.root} replays it)"
        )
