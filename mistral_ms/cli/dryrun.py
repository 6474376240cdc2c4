"""``dryrun``: does a run's graph compile for Ascend, and what does it send?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from mistral_ms.config import RunConfig
    from mistral_ms.parallel.dryrun.process import Request
    from mistral_ms.parallel.dryrun.standins import Runtime


def dryrun(
    config: Annotated[Path, typer.Option(help="A run file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY.PATH=VALUE]...", help="Changes to the run file."),
    ] = None,
    rank: Annotated[str, typer.Option(help="The rank to compile for, or all.")] = "0",
    layers: Annotated[
        int | None, typer.Option(min=1, help="Compile so many layers only; all when left out.")
    ] = None,
    time_limit: Annotated[float, typer.Option(min=1, help="Seconds for each rank.")] = 1800.0,
    logs: Annotated[
        Path | None, typer.Option(help="Where to keep the compiler's logs; a temporary directory.")
    ] = None,
    target: Annotated[
        str, typer.Option(hidden=True, help="module:function that builds the graph.")
    ] = "mistral_ms.parallel.graph:build",
    json: Annotated[
        Path | None, typer.Option("--json", help="Write the report to this file as JSON.")
    ] = None,
) -> None:
    """Compile the Ascend graph of a rank, without Ascend, and report its communication."""
    import os
    import tempfile

    from rich.console import Console

    from mistral_ms.cli.output import count_progress, write_json
    from mistral_ms.config import load_run_config
    from mistral_ms.errors import GraphError
    from mistral_ms.parallel.dryrun.process import Request
    from mistral_ms.parallel.dryrun.report import summary
    from mistral_ms.parallel.dryrun.standins import find_runtime

    console = Console(highlight=False, soft_wrap=True)
    changes = tuple(overrides or ())
    run = load_run_config(config, changes)
    ranks = _ranks(rank, run.parallel.world)
    runtime = find_runtime(os.environ)
    _refuse(run, layers, target, runtime)
    kept = logs or Path(tempfile.mkdtemp(prefix="mistral_ms-dryrun-logs-"))
    reports: list[dict[str, Any]] = []
    failures: list[str] = []
    with count_progress(console, "compiling", "ranks") as progress:
        for done, one in enumerate(ranks):
            progress(done, len(ranks))
            request = Request(one, run.parallel.world, target, config, changes, layers)
            try:
                reports.append(_compile(request, runtime, run, kept, time_limit))
            except GraphError as error:
                failures.append(str(error))
    for each in reports:
        _show(console, each, whole=len(ranks) == 1)
    for text in failures:
        console.print(f"failed: {text}", style="red", markup=False)
    if json is not None and reports:
        write_json(json, reports[0] if len(ranks) == 1 else summary(reports))
    if failures:
        raise typer.Exit(1)


def _refuse(run: RunConfig, layers: int | None, target: str, runtime: Runtime) -> None:
    """Raises where it is known beforehand that no rank compiles."""
    from mistral_ms.parallel.dryrun.process import DEFAULT_TARGET
    from mistral_ms.parallel.dryrun.servers import check_servers
    from mistral_ms.parallel.topology import Topology

    if target == DEFAULT_TARGET:
        from mistral_ms.parallel.graph.checks import check_run

        check_run(run, layers or run.model.num_hidden_layers)
    if not runtime.is_cann:
        check_servers(Topology.of(run.parallel))


def _ranks(text: str, world: int) -> range:
    from mistral_ms.errors import ConfigError

    if text == "all":
        return range(world)
    if not text.isdecimal() or int(text) >= world:
        raise ConfigError(
            "no such rank", where="--rank", value=text, rule=f"0 to {world - 1}, or all"
        )
    return range(int(text), int(text) + 1)


def _compile(
    request: Request, runtime: Any, run: RunConfig, logs: Path, time_limit: float
) -> dict[str, Any]:
    import os

    from mistral_ms.parallel.dryrun.ir import read
    from mistral_ms.parallel.dryrun.process import compiled
    from mistral_ms.parallel.dryrun.report import report
    from mistral_ms.parallel.topology import Topology

    with compiled(request, runtime, os.environ, logs, time_limit) as found:
        text = found.graph.read_text(encoding="utf-8", errors="replace")
        graph = read(text, request.rank, request.world, found.groups)
    topology = Topology.of(run.parallel)
    return report(graph, topology, request.rank, found.seconds, run.training.micro_batches)


def _show(console: Console, one: dict[str, Any], whole: bool) -> None:
    """One line about a rank, and a table of its communication when it is the only one."""
    from rich.table import Table

    from mistral_ms.cli.output import size_text

    sent = one["sent"]
    console.print(
        f"rank {one['rank']} (stage {one['stage']}) compiled in {one['compile_seconds']:.1f} s: "
        f"weights {size_text(one['parameter_bytes'])}, "
        f"optimizer {size_text(one['optimizer_bytes'])}; sends a step "
        f"{size_text(sent['bytes_inside'])} inside its node, "
        f"{size_text(sent['bytes_between'])} to others"
    )
    if not whole:
        return
    table = Table(box=None, pad_edge=False)
    for name in ("operator", "phase", "group", "ranks", "tensor", "a step", "nodes"):
        table.add_column(name, justify="right" if name in ("tensor", "a step") else "left")
    for line in one["communication"]:
        members = ",".join(map(str, line["ranks"]))
        nodes = "several" if line["inter_node"] else "one"
        size, count = size_text(line["bytes"]), str(line["count"])
        table.add_row(line["operator"], line["phase"], line["group"], members, size, count, nodes)
    console.print(table)
    each = one["alltoall_per_moe_layer"]
    console.print(
        f"all-to-all per sparse layer and micro-batch: {each['forward']:g} forward, "
        f"{each['backward']:g} backward"
    )
