"""``demo``: the whole story on this machine, in minutes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mistral_ms.data import CONFIGS

if TYPE_CHECKING:
    from mistral_ms.config import RunConfig

RUN_FILE = CONFIGS / "run" / "demo.yaml"


def demo(
    output: Annotated[
        Path, typer.Option(help="Directory for the report and the checkpoints.")
    ] = Path("demo"),
    steps: Annotated[
        int | None, typer.Option(min=2, help="Updates to train; by default as many as it takes.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write the result to this file as JSON.")
    ] = None,
) -> None:
    """Train a tiny Mixtral on this machine, export it, check it, generate, write a report."""
    from rich.console import Console

    from mistral_ms.cli.backend_log import backend_log
    from mistral_ms.cli.output import write_json

    run = load_demo_run(steps)
    prepare(output, json)
    console = Console(highlight=False, soft_wrap=True)
    console.print("[bold]mistral_ms demo[/]: a tiny Mixtral, from random weights to a report")
    with backend_log(output / "backend.log"):
        from mistral_ms.cli.demo_page import write_page
        from mistral_ms.cli.demo_story import result, tell

        story = tell(console, run, output, learns=steps is None)
        write_page(story)
    if json is not None:
        write_json(json, result(story))
    failed = [check.name for check in story.checks if not check.passed]
    console.print(f"\nreport  [bold]{story.files.page}[/]   ({story.seconds:.0f} s in total)")
    if failed:
        console.print(f"[bold]failed[/]  {'; '.join(failed)}")
        raise typer.Exit(1)


def load_demo_run(steps: int | None = None) -> RunConfig:
    """The demo's run file; with fewer steps the warm-up gets shorter, too.

    Raises:
        ConfigError: it is not valid.
    """
    from mistral_ms.config import load_run_config

    run = load_run_config(RUN_FILE)
    if steps is None:
        return run
    warmup = min(run.training.warmup_steps, steps // 4)
    shorter = [f"training.max_steps={steps}", f"training.warmup_steps={warmup}"]
    return load_run_config(RUN_FILE, shorter)


def prepare(output: Path, json: Path | None) -> None:
    """Makes the directory; finds out before the training what could not be written after it.

    Raises:
        ConfigError: a place that cannot be written to.
    """
    from mistral_ms.errors import ConfigError

    for option, directory in (("--output", output), ("--json", json and json.absolute().parent)):
        if directory is None:
            continue
        try:
            if option == "--output":
                directory.mkdir(parents=True, exist_ok=True)
            probe = directory / ".mistral_ms_probe"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                "cannot write", where=f"{option} {directory}", value=error.strerror
            ) from error
