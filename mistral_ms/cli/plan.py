"""``plan``: which layout fits the cluster, how fast it is, and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from mistral_ms.config import ModelConfig, RunConfig
    from mistral_ms.planner import Candidate
    from mistral_ms.planner.sensitivity import Effect


def plan(
    config: Annotated[Path, typer.Option(help="A run file of a training.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Changes to the run file."),
    ] = None,
    nodes: Annotated[
        int | None,
        typer.Option(min=1, help="Nodes of the cluster; as many cards as the run file has."),
    ] = None,
    hardware: Annotated[
        str, typer.Option(help="A file of configs/hardware without its suffix, or a path.")
    ] = "atlas_800t_a2",
    top: Annotated[int, typer.Option(min=1, help="How many layouts are shown.")] = 10,
    expert_load: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|zipf:S",
            help="How uneven the experts' loads are: metrics.jsonl of a training, or the n-th "
            "expert has a share of 1 / n ** S.",
        ),
    ] = None,
    sensitive: Annotated[
        bool,
        typer.Option("--sensitivity", help="How the answer depends on what nobody has measured."),
    ] = False,
    figure: Annotated[
        Path | None, typer.Option(help="Draw the best layouts into this PNG file.")
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write all layouts to this file as JSON.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write the best layout to this file, for train and dryrun.")
    ] = None,
) -> None:
    """Find the fastest layout of a training on a cluster, and say why; nothing is run."""
    from rich.console import Console

    from mistral_ms.cli.output import write_file, write_json
    from mistral_ms.config import load_run_config
    from mistral_ms.planner import Cluster, explain, load_hardware
    from mistral_ms.planner import plan as search
    from mistral_ms.planner.sensitivity import sensitivity, weak_numbers

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 120  # a table in a file need not fit a screen
    run, kind = load_run_config(config, tuple(overrides or ())), load_hardware(hardware)
    cards = run.parallel.world if nodes is None else nodes * kind.devices_per_node
    cluster = Cluster.of(kind, cards)
    loads = _loads(expert_load, run.model)
    candidates = search(run, cluster, loads=loads)
    fitting = [each for each in candidates if each.fits]
    console.print(f"{cards} cards, {kind.name}: {len(fitting)} of {len(candidates)} layouts fit")
    if fitting:
        _show(console, fitting[:top])
    for sentence in explain(candidates):
        console.print(sentence, markup=False)
    if sensitive:
        _show_sensitivity(console, sensitivity(candidates, cluster, loads=loads))
    weak = len(weak_numbers(kind))
    console.print(
        f"{weak} of the hardware's {len(kind.sources)} numbers are assumed or from memory; times "
        "are predictions (docs/planner.md)"
    )
    if json is not None:
        write_json(json, {"candidates": [each.values() for each in candidates]})
    if output is not None and fitting:
        write_file("--output", output, _run_file(fitting[0], config).encode())
    if figure is not None and fitting:
        from mistral_ms.planner.picture import plan_png

        write_file("--figure", figure, plan_png(fitting))
    if not fitting:
        raise typer.Exit(1)


def _loads(text: str | None, model: ModelConfig) -> tuple[tuple[float, ...], ...]:
    """The loads that are meant.

    Raises:
        ConfigError: a model without experts, or what cannot be read.
    """
    from mistral_ms.errors import ConfigError
    from mistral_ms.planner import read_loads, zipf

    if text is None:
        return ()
    if model.moe is None:
        raise ConfigError("no experts", where="--expert-load", rule="only a sparse model has loads")
    experts = model.moe.num_local_experts
    kind, _, exponent = text.partition(":")
    if kind != "zipf":
        return read_loads(Path(text), experts)
    try:
        return (zipf(experts, float(exponent)),)
    except ValueError as error:
        rule = "zipf:S with a number S of 0 or more"
        raise ConfigError("no skew", where="--expert-load", value=text, rule=rule) from error


def _show(console: Console, candidates: Sequence[Candidate]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for name in ("dp", "mp", "pp", "ep", "micro", "recompute", "optimizer", "all-to-all"):
        table.add_column(name, justify="right" if len(name) < 6 else "left")
    for name in ("GiB", "bubble", "tokens/s/card"):
        table.add_column(name, justify="right")
    for each in candidates:
        parallel, training, step = each.run.parallel, each.run.training, each.step
        assert step is not None
        route = "-" if parallel.ep == 1 else parallel.all_to_all
        table.add_row(
            *map(str, (parallel.dp, parallel.mp, parallel.pp, parallel.ep)),
            str(training.gradient_accumulation_steps),
            parallel.recompute,
            "host" if training.offload_optimizer == "host" else "card",
            f"{route}, shards" if parallel.group_wise_a2a else route,
            f"{each.memory.gib:.1f}",
            f"{step.bubble_fraction:.1%}",
            f"{each.tokens_per_s_per_card:.0f}",
        )
    console.print(table)


def _show_sensitivity(console: Console, effects: Sequence[Effect]) -> None:
    from rich.table import Table

    from mistral_ms.planner.sensitivity import rows

    table = Table(box=None, pad_edge=False)
    for name in ("number", "divided by 1.5", "times 1.5", "another layout wins"):
        table.add_column(name, justify="left" if name == "number" else "right")
    for row in rows(effects):
        table.add_row(*row)
    console.print(table)


def _run_file(best: Candidate, source: Path) -> str:
    """The run in its best layout, as a file."""
    from mistral_ms.config import spelled_out
    from mistral_ms.planner import checked

    run: RunConfig = checked(best.run)
    return f"# {source.name} in the layout that the plan command chose\n{spelled_out(run)}"
