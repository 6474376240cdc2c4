"""``plan``: which layout fits the cluster, how fast it is, and why."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mistral_ms.enums import StrEnum

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from mistral_ms.config import ModelConfig, RunConfig
    from mistral_ms.planner import Candidate, Cluster
    from mistral_ms.planner.sensitivity import Effect


class Name(StrEnum):
    """The studies."""

    PUBLISHED = "published"
    CARDS = "cards"
    ROUTES = "routes"
    OFFLOAD = "offload"
    MODELS = "models"
    SEQUENCE = "sequence"
    COST = "cost"


class Dispatch(StrEnum):
    """Which dispatch policies are planned."""

    OWN = "own"
    ANY = "any"


def plan(
    config: Annotated[
        Path | None, typer.Option(help="A run file of a training.", show_default=False)
    ] = None,
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
    dispatch: Annotated[
        Dispatch,
        typer.Option(
            help="The run file's own routing.policy, or capacity and dropless alike; the other "
            "one trains something else."
        ),
    ] = Dispatch.OWN,
    study: Annotated[
        Name | None,
        typer.Option(
            help="Instead of a plan: published results against predictions, 8 to 4096 cards, flat "
            "against hierarchical all-to-all, what offload costs, other models, long sequences, "
            "or the cost of a token. Takes --figure and --json alone.",
            show_default=False,
        ),
    ] = None,
    calibrate: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Instead of a plan: measure this machine, and write a file for --hardware.",
            show_default=False,
        ),
    ] = None,
    processes: Annotated[
        int, typer.Option(min=1, help="With --calibrate: processes that measure at the same time.")
    ] = 1,
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
    from mistral_ms.errors import ConfigError
    from mistral_ms.planner import POLICIES, Cluster, explain, load_hardware
    from mistral_ms.planner import plan as search
    from mistral_ms.planner.sensitivity import sensitivity, weak_numbers

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 120  # a table in a file need not fit a screen
    if study is not None or calibrate is not None:
        others = {"--config": config, "KEY.PATH=VALUE": overrides, "--nodes": nodes,
                  "--expert-load": expert_load, "--output": output,
                  "--dispatch": dispatch is not Dispatch.OWN}  # fmt: skip
        if study is not None:
            others["--calibrate"] = calibrate
        if given := [name for name, value in others.items() if value]:
            where = "--study" if study is not None else "--calibrate"
            rule = "it has no run file and no cluster"
            raise ConfigError("no plan", where=where, value=given[0], rule=rule)
    if study is not None:
        _study(console, study, figure, json)
        return
    if calibrate is not None:
        _calibrate(console, calibrate, processes)
        return
    if config is None:
        rule = "a run file, --study NAME, or --calibrate FILE"
        raise ConfigError("nothing to plan", where="--config", rule=rule)
    run, kind = load_run_config(config, tuple(overrides or ())), load_hardware(hardware)
    cards = run.parallel.world if nodes is None else nodes * kind.devices_per_node
    cluster = Cluster.of(kind, cards)
    loads = _loads(expert_load, run.model)
    policies = POLICIES if dispatch is Dispatch.ANY else ()
    candidates = search(run, cluster, loads=loads, policies=policies)
    fitting = [each for each in candidates if each.fits]
    console.print(f"{cards} cards, {kind.name}: {len(fitting)} of {len(candidates)} layouts fit")
    if fitting:
        _show(console, fitting[:top])
    for sentence in explain(candidates, run, kind.devices_per_node):
        console.print(sentence, markup=False)
    if fitting and dispatch is Dispatch.OWN:
        _show_other_dispatch(console, fitting[0], cluster, loads)
    if sensitive:
        _show_sensitivity(console, sensitivity(candidates, cluster, loads=loads))
    weak = len(weak_numbers(kind))
    console.print(
        f"{weak} of the hardware's {len(kind.sources)} numbers are assumed or from memory; times "
        "are predictions (docs/planner.md)"
    )
    if json is not None:
        write_json(json, {"candidates": [each.values() for each in candidates]})
        _say_written(console, "all layouts", json)
    if output is not None and fitting:
        write_file("--output", output, run_file(fitting[0], config).encode())
        _say_written(console, "best layout", output)
    if figure is not None and fitting:
        from mistral_ms.planner.picture import plan_png

        write_file("--figure", figure, plan_png(fitting))
        _say_written(console, "picture", figure)
    if not fitting:
        raise typer.Exit(1)


def _study(console: Console, name: Name, figure: Path | None, json: Path | None) -> None:
    """Prints a study, and writes what is asked for."""
    from mistral_ms.cli.output import print_table, write_file, write_json
    from mistral_ms.planner.studies import STUDIES

    found = STUDIES[name]()
    console.print(found.question, markup=False)
    for table in found.tables:
        console.print(f"\n{table.title}", markup=False)
        print_table(console, table.columns, table.rows)
    for sentence in found.notes:
        console.print(sentence, markup=False)
    console.print("All times are predictions (docs/planner.md)")
    if json is not None:
        write_json(json, found.values())
        _say_written(console, "tables", json)
    if figure is not None:
        from mistral_ms.planner.study_picture import study_png

        write_file("--figure", figure, study_png(found))
        _say_written(console, "picture", figure)


def _say_written(console: Console, what: str, path: Path) -> None:
    console.print(f"{what:11}  {path}", markup=False)


def _calibrate(console: Console, path: Path, processes: int) -> None:
    """Measures, and writes a file of hardware."""
    from mistral_ms.cli.calibrate import calibrate
    from mistral_ms.cli.output import write_file
    from mistral_ms.config import encode_yaml
    from mistral_ms.config.base import validate
    from mistral_ms.planner import Hardware

    values = calibrate(processes)
    found = validate(Hardware, values, "what was measured")
    write_file("--calibrate", path, encode_yaml(values))
    rates = found.compute
    console.print(
        f"{found.name}: products {1000 * rates.peak_tflops.float32:.1f} GFLOP/s, memory "
        f"{rates.memory_gb_per_s:.1f} GB/s; of each other process "
        f"{1000 * found.inside.gb_per_s:.0f} MB/s and {found.inside.latency_us / 1000:.2f} ms a "
        "message",
        markup=False,
    )
    console.print(f"written to {path}: plan --hardware {path}", markup=False)


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
    names = ("dp", "mp", "pp", "ep", "micro", "chunks", "run as", "dispatch", "recompute")
    for name in (*names, "optimizer", "all-to-all"):
        table.add_column(name, justify="right" if name in names[:6] else "left")
    for name in ("GiB", "bubble", "tokens/s/card"):
        table.add_column(name, justify="right")
    for each in candidates:
        parallel, training, step = each.run.parallel, each.run.training, each.step
        assert step is not None
        route = "-" if parallel.ep == 1 else parallel.all_to_all
        policy = "-" if each.run.model.moe is None else each.run.routing.policy
        table.add_row(
            *map(str, (parallel.dp, parallel.mp, parallel.pp, parallel.ep)),
            str(training.gradient_accumulation_steps),
            str(parallel.pp_interleave_num),
            each.execution,
            policy,
            parallel.recompute,
            "host" if training.offload_optimizer == "host" else "card",
            f"{route}, shards" if parallel.group_wise_a2a else route,
            f"{each.memory.gib:.1f}",
            f"{step.bubble_fraction:.1%}",
            f"{each.tokens_per_s_per_card:.0f}",
        )
    console.print(table)


def _show_other_dispatch(
    console: Console,
    first: Candidate,
    cluster: Cluster,
    loads: Sequence[tuple[float, ...]],
) -> None:
    """What the other policy would make of the best layout."""
    from mistral_ms.planner import other_dispatch
    from mistral_ms.planner.explain import other_dispatch as sentence

    other = other_dispatch(first, cluster, loads=loads)
    if other is not None:
        console.print(sentence(other, even=not loads), markup=False)


def _show_sensitivity(console: Console, effects: Sequence[Effect]) -> None:
    from mistral_ms.cli.output import print_table
    from mistral_ms.planner.sensitivity import rows

    columns = ("number", "divided by 1.5", "times 1.5", "another layout wins")
    print_table(console, columns, rows(effects))


def run_file(best: Candidate, source: Path) -> str:
    """The run in its best layout, as a file for ``train`` and ``dryrun``.

    Args:
        best: the layout.
        source: of the run, which a comment names.
    """
    from mistral_ms.config import spelled_out
    from mistral_ms.planner import checked

    run: RunConfig = checked(best.run)
    return f"# {source.name} in the layout that the plan command chose\n{spelled_out(run)}"
