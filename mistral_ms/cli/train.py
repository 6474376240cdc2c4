"""``train``: a run of a configuration file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from mistral_ms.config import RunConfig
    from mistral_ms.launch import Heartbeat
    from mistral_ms.parallel.context import ParallelContext
    from mistral_ms.training import RunResult
    from mistral_ms.training.held_out import EvaluationRecord


def train(
    config: Annotated[
        Path | None,
        typer.Option(help="A run file, such as those in configs/run; --resume alone needs none."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[KEY.PATH=VALUE]...",
            help="Keys of the run file to change: training.max_steps=50 data.dataset=my-data",
            show_default=False,
        ),
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Go on with the run in this directory, from its newest checkpoint."),
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write the summary to this file as JSON.")
    ] = None,
) -> None:
    """Train a model: metrics, TensorBoard events, checkpoints, pictures and a summary."""
    from rich.console import Console

    from mistral_ms.checkpoint.run_files import run_files
    from mistral_ms.cli.output import write_json
    from mistral_ms.cli.processes import heartbeat_of, join_processes

    config, run = _run_config(config, resume, overrides or [])
    parallel_context = join_processes(run.parallel)
    console = Console(highlight=False, soft_wrap=True, quiet=not parallel_context.is_rank_0)
    output = run_files(config, run.output, resume).root
    with heartbeat_of(parallel_context) as heartbeat:
        result = _execute(
            console, run, output, parallel_context, heartbeat, resuming=resume is not None
        )
        # a rank that ends before the others have written is taken for a failed one
        parallel_context.barrier()
    if json is not None and parallel_context.is_rank_0:
        write_json(json, result.summary_values())
    if result.stopped_by is not None:
        raise typer.Exit(128 + result.stopped_by)


def _run_config(
    config: Path | None, resume: Path | None, overrides: list[str]
) -> tuple[Path, RunConfig]:
    """The run file and its content; that of the run's own directory when it is resumed.

    Raises:
        ConfigError: no run file, or one that cannot be read; says how the run goes on without.
    """
    from mistral_ms.checkpoint.run_files import RunFiles
    from mistral_ms.config import load_run_config
    from mistral_ms.errors import ConfigError
    from mistral_ms.optimizers import settings_of

    own = None if resume is None else RunFiles(resume).config
    if config is None:
        if resume is None:
            raise ConfigError("no run file", where="--config", rule="a new run needs one")
        assert own is not None
        config = own
    if own is not None and config.resolve() == own.resolve():
        # the directory may have been moved since
        return own, load_run_config(own, overrides).model_copy(update={"output": None})
    try:
        run = load_run_config(config, overrides)
        settings_of(run.training.optimizer, f"{config}: training.optimizer")
        return config, run
    except ConfigError as error:
        if own is None or not own.is_file():
            raise
        raise ConfigError(
            error.what,
            where=error.where,
            value=error.value,
            rule=error.rule,
            todo=f"leave --config out: --resume {resume} goes on with {own}",
        ) from error


def _execute(
    console: Console,
    run: RunConfig,
    output: Path,
    parallel_context: ParallelContext,
    heartbeat: Heartbeat,
    *,
    resuming: bool,
) -> RunResult:
    from mistral_ms.checkpoint.run_files import RunFiles
    from mistral_ms.cli.backend_log import backend_log
    from mistral_ms.training import TrainingRun, show_progress

    def say(line: str) -> None:
        console.print(line, markup=False)

    files = RunFiles(output)
    if resuming:
        files.again()
    elif parallel_context.is_rank_0:
        files.begin()
    # a second training says so before it touches the first one's log
    if parallel_context.is_rank_0:
        files.claim().release()
    parallel_context.barrier()
    with backend_log(files.log(parallel_context.rank)):
        training = TrainingRun(
            run, output, resume=resuming, say=say, parallel_context=parallel_context
        )
        parameters = training.memory.parameters
        steps = training.run.training.last_step
        begun = training.update.progress.step
        data = training.data
        rows = "sequences of" if training.run.dpo is None else "pairs of answers, each of"
        say(
            f"training {parameters / 1e6:.1f} million parameters"
            f"{' on this rank,' if parallel_context.world > 1 else ''} on "
            f"{data.sequences} {rows} {data.seq_length} tokens: "
            f"{f'steps {begun + 1} to {steps}' if begun < steps else f'all {steps} steps are made'}"
        )
        say(f"memory {training.memory}")
        say(f"in a step, calculated: {training.activations}")
        if training.memory_warning is not None:
            say(training.memory_warning)
        with show_progress(console, steps) as progress:
            result = training.execute(
                [progress, heartbeat],
                heartbeat.phase,
                on_evaluation=[lambda record: say(evaluation_line(record))],
            )
    report(console, result)
    return result


def evaluation_line(record: EvaluationRecord) -> str:
    """An evaluation on held-out data in one line."""
    return (
        f"step {record.step}: held-out loss {record.loss:.4f}, perplexity {record.perplexity:.2f}, "
        f"accuracy {100 * record.accuracy:.2f} %{', the best so far' if record.best else ''}"
    )


def report(console: Console, result: RunResult) -> None:
    """The short summary at the end: what came of it and where it lies."""
    summary, files = result.summary, result.files
    state = "" if summary.finished else ", stopped before the end"
    lm = f"lm loss {summary.first_lm_loss:.4f} -> {summary.final_lm_loss:.4g} after "
    console.print(  # preferences do not train the lm loss
        f"\n{'' if summary.preference else lm}"
        f"{summary.steps} steps ({summary.epochs:.1f} epochs){state}; {summary.seconds:.0f} s, "
        f"{summary.tokens_per_s:.0f} tokens/s"
    )
    if found := summary.preference:
        console.print(
            f"preferences in the last batch: loss {found['loss']:.4f}, "
            f"{100 * found['rewards/accuracies']:.0f} % in the right order, "
            f"margin of rewards {found['rewards/margins']:.3f}"
        )
    if summary.skipped:
        console.print(f"{summary.skipped} steps without an update: float16 overflowed")
    for what, path in (
        ("checkpoint", result.checkpoint),
        ("adapter", files.adapter),
        ("best", next(iter(sorted(files.best.glob("step-*"))), files.best)),
        ("evaluations", files.evaluations),
        ("metrics", files.metrics),
        ("pictures", files.figures),
        ("TensorBoard", files.tensorboard),
        ("summary", files.summary),
    ):
        if path.exists() or what not in ("adapter", "best", "evaluations"):
            console.print(f"{what:11}  {path}", markup=False)
    if not summary.finished:
        console.print(f"go on with   --resume {files.root}", markup=False)
