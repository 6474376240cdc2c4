"""``moe-lab``: mixtures of experts trained side by side, and a page that compares them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mistral_ms.data import CONFIGS

if TYPE_CHECKING:
    from rich.console import Console

    from mistral_ms.config import RunConfig
    from mistral_ms.datasets import SequenceSource
    from mistral_ms.training.comparison import Trained

PRESETS = CONFIGS / "moe"
STEPS = 100
OF_THE_ROUTER = ("router_aux_loss_coef", "router_z_loss_coef", "router_losses")
"""Settings of a training that belong to the mixture and may differ."""


def moe_lab(
    presets: Annotated[
        list[str],
        typer.Argument(
            metavar="PRESET... [KEY.PATH=VALUE]...",
            help="Names of files in configs/moe, or run files; and keys to change in all of them.",
            show_default=False,
        ),
    ],
    steps: Annotated[int, typer.Option(min=2, help="Updates of each.")] = STEPS,
    output: Annotated[
        Path, typer.Option(help="Directory for the page, its pictures and the metrics.")
    ] = Path("runs/moe-lab"),
    json: Annotated[
        Path | None, typer.Option("--json", help="Write the numbers to this file as JSON.")
    ] = None,
) -> None:
    """Train a small decoder under several mixtures, on the same data; write a page about them."""
    from rich.console import Console

    from mistral_ms.cli.backend_log import backend_log
    from mistral_ms.cli.demo import prepare
    from mistral_ms.cli.output import write_json

    overrides = [word for word in presets if "=" in word]
    lab = load_lab([word for word in presets if "=" not in word], overrides, steps)
    if (output / PAGE).exists():
        _refuse_output(output)
    prepare(output, json)
    console = Console(highlight=False, soft_wrap=True)
    with backend_log(output / "backend.log"):
        from mistral_ms.cli.moe_lab_page import numbers, write_page

        runs, sequences = _train_all(console, lab, output)
        written = write_page(lab, runs, sequences, output)
    console.print()
    for run in runs:
        console.print(
            f"{run.name:{lab.width}}  loss {run.evaluated:6.3f} evaluated  load varies by "
            f"{run.load_variation:.2f}  {100 * run.dropped:4.1f} % dropped  "
            f"{1000 * run.step_seconds:.0f} ms a step",
            markup=False,
        )
    console.print()
    for path, meaning in written:
        console.print(f"{meaning:9} {path}", markup=False)
    if json is not None:
        write_json(json, numbers(lab, runs, output))


PAGE = "report.html"


@dataclass(frozen=True)
class Lab:
    """What is compared.

    Attributes:
        runs: by the names of their files.
        steps: of each.
    """

    runs: dict[str, RunConfig]
    steps: int

    @property
    def width(self) -> int:
        """Of the longest name."""
        return max(map(len, self.runs))


def load_lab(names: Sequence[str], overrides: Sequence[str], steps: int) -> Lab:
    """Reads the presets and makes all that is not the mixture the same.

    Args:
        names: of files in ``configs/moe``, or paths.
        overrides: ``key.path=value`` items for all of them.
        steps: of each.

    Raises:
        ConfigError: no such preset, one twice, a dense model, texts of several domains, or presets
            whose data or training differ.
    """
    from mistral_ms.config import load_run_config
    from mistral_ms.errors import ConfigError

    if not names:
        rule = f"name presets: {', '.join(known())}"
        raise ConfigError("nothing to compare", where="PRESET", rule=rule)
    paths = [_path(name) for name in names]
    stems = [path.stem for path in paths]
    twice = next((stem for stem in stems if stems.count(stem) > 1), None)
    if twice is not None:
        rule = "each is trained once"
        raise ConfigError("one preset twice", where="PRESET", value=twice, rule=rule)
    runs = [load_run_config(path, overrides) for path in paths]
    warmup = min(max(run.training.warmup_steps for run in runs), steps // 4)
    layers = max(run.model.num_hidden_layers for run in runs)
    alike = [
        f"training.max_steps={steps}",
        f"training.warmup_steps={warmup}",
        f"model.num_hidden_layers={layers}",
    ]
    runs = [load_run_config(path, [*overrides, *alike]) for path in paths]
    for path, run in zip(paths, runs, strict=True):
        if not run.model.sparse_layers:
            raise ConfigError(
                "no experts", where=path, rule="mixtures are compared, and this model is dense"
            )
        assert run.model.moe is not None
        if run.model.moe.gate.row_domains > 1:
            raise ConfigError(
                "texts of several domains",
                where=f"{path}: model.moe.gate",
                value=run.model.moe.gate.name,
                rule="the evaluation that compares mixtures knows no domains",
                todo="train it alone, and evaluate what the extract command makes of a checkpoint",
            )
        if run.data is None:
            raise ConfigError("nothing to learn", where=f"{path}: data", rule="name data.inputs")
        _check_alike(paths[0], runs[0], path, run)
    return Lab(dict(zip(stems, runs, strict=True)), steps)


def known() -> list[str]:
    """The names of presets."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def _path(name: str) -> Path:
    from mistral_ms.config.names import perhaps
    from mistral_ms.errors import ConfigError

    if name.endswith((".yaml", ".yml")):
        return Path(name)
    if name not in known():
        raise ConfigError(
            "no such preset",
            where="PRESET",
            value=name,
            rule=f"there are {', '.join(known())}; or give the path of a run file",
            todo=perhaps(name, known()),
        )
    return PRESETS / f"{name}.yaml"


def _check_alike(first: Path, one: RunConfig, path: Path, other: RunConfig) -> None:
    """Raises where two presets differ in more than the model and its router's losses."""
    from mistral_ms.errors import ConfigError

    def shared(run: RunConfig) -> dict[str, Any]:
        assert run.data is not None
        data = run.data.model_dump()
        data["inputs"] = [str(path.resolve()) for path in run.data.inputs]
        training = run.training.model_dump(exclude=set(OF_THE_ROUTER))
        return {
            **{f"data.{key}": value for key, value in data.items()},
            "model.vocab_size": run.model.vocab_size,
            **{f"training.{key}": value for key, value in training.items()},
        }

    wanted, found = shared(one), shared(other)
    for key in wanted:
        if wanted[key] != found[key]:
            raise ConfigError(
                "presets that cannot be compared",
                where=f"{path}: {key}",
                value=found[key],
                rule=f"all must learn the same in the same way, and {first} has {wanted[key]}",
                todo=f"give the value for all: {key}=VALUE",
            )


def _refuse_output(output: Path) -> None:
    from mistral_ms.errors import ConfigError

    raise ConfigError(
        "output exists",
        where=f"--output {output}",
        value=PAGE,
        rule="a comparison overwrites nothing",
        todo="choose another output",
    )


def _train_all(console: Console, lab: Lab, output: Path) -> tuple[list[Trained], SequenceSource]:
    from mistral_ms.checkpoint.run_files import RunFiles
    from mistral_ms.parallel.context import ParallelContext
    from mistral_ms.training.prepare import open_data

    def say(line: str) -> None:
        console.print(line, markup=False)

    first = next(iter(lab.runs.values()))
    data, _ = open_data(first, RunFiles(output), ParallelContext(first.parallel), say)
    say(
        f"{len(lab.runs)} mixtures in decoders of {first.model.num_hidden_layers} layers, "
        f"{lab.steps} steps of {first.training.global_batch_size} x {first.training.seq_length} "
        f"tokens each, seed {first.training.seed}"
    )
    runs = []
    for number, (name, run) in enumerate(lab.runs.items(), 1):
        console.print(f"\n[bold]{number}/{len(lab.runs)}[/]  {name}")
        runs.append(_train(console, name, run, data, output / name))
    return runs, data


def _train(
    console: Console, name: str, run: RunConfig, data: SequenceSource, directory: Path
) -> Trained:
    """One of them; its configuration and its metrics go into a directory of its own."""
    import time
    from itertools import pairwise

    from mistral_ms.checkpoint.run_files import RunFiles
    from mistral_ms.config import spelled_out
    from mistral_ms.models import CausalLM, share_parameters
    from mistral_ms.training import (
        MetricsWriter,
        StepRecord,
        TrainStep,
        make_objective,
        show_progress,
        train,
    )
    from mistral_ms.training.comparison import Trained
    from mistral_ms.training.evaluate import evaluate

    files, length = RunFiles(directory), run.training.seq_length
    directory.mkdir(exist_ok=True)
    files.config.write_text(spelled_out(run), encoding="utf-8")
    model = CausalLM(run.model, run.routing, positions=length)
    model.initialize(run.training.seed)
    pooled = run.routing.aux_loss == "pooled"
    update = TrainStep(make_objective(model, run.training, pooled_aux=pooled), run.training)
    records: list[StepRecord] = []
    stamps = [time.perf_counter()]

    def stamp(record: StepRecord) -> None:
        stamps.append(time.perf_counter())

    with (
        MetricsWriter(files.metrics) as metrics,
        show_progress(console, run.training.last_step) as progress,
    ):
        train(update, data, (stamp, records.append, metrics, progress))
    judged = share_parameters(model, run.routing.evaluation, positions=length)
    evaluation = evaluate(judged, data, run.training.global_batch_size)
    sizes = {key: weight.size for key, weight in model.weights().items()}
    assert run.model.moe is not None
    chosen = run.model.moe.num_experts_per_tok / run.model.moe.num_local_experts
    experts = sum(size for key, size in sizes.items() if ".moe.experts." in key)
    parameters = sum(sizes.values())
    return Trained(
        name=name,
        records=records,
        seconds=[after - before for before, after in pairwise(stamps)],
        evaluated=evaluation.loss,
        parameters=parameters,
        active=round(parameters - (1 - chosen) * experts),
    )
