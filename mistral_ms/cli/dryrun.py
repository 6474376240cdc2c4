"""``dryrun``: does a run's graph compile for Ascend, and what does it send?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mistral_ms.enums import StrEnum

if TYPE_CHECKING:
    from rich.console import Console

    from mistral_ms.cli.dryrun_cost import CostReport
    from mistral_ms.config import PredictConfig, RunConfig
    from mistral_ms.parallel.dryrun.process import Compiler, Request
    from mistral_ms.planner.compiled import StepCost


class Step(StrEnum):
    """Which of a run's graphs is compiled."""

    TRAIN = "train"
    PREFILL = "prefill"
    DECODE = "decode"


TARGETS = {
    "train": "mistral_ms.cli.graph_targets:build",
    "prefill": "mistral_ms.cli.graph_targets:prefill",
    "decode": "mistral_ms.cli.graph_targets:decode",
}
"""What is compiled of a run file."""


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
    step: Annotated[
        Step | None,
        typer.Option(
            help="The graph of a prediction file: a piece of the prompts, or (when left out) one "
            "token of each sample. A training has one graph.",
            show_default=False,
        ),
    ] = None,
    time_limit: Annotated[float, typer.Option(min=1, help="Seconds for each rank.")] = 1800.0,
    logs: Annotated[
        Path | None, typer.Option(help="Where to keep the compiler's logs; a temporary directory.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(hidden=True, help="module:function that builds the graph.")
    ] = None,
    cost: Annotated[
        bool,
        typer.Option(
            "--cost",
            help="Also what its operators cost: operations, bytes, and predicted time on "
            "--hardware. Of a training.",
        ),
    ] = False,
    hardware: Annotated[
        str,
        typer.Option(help="With --cost: a file of configs/hardware without its suffix, or a path."),
    ] = "atlas_800t_a2",
    picture: Annotated[
        Path | None,
        typer.Option(help="With --cost, of one rank: draw it into this PNG or SVG file."),
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write the report to this file as JSON.")
    ] = None,
) -> None:
    """Compile the Ascend graph of a rank, without Ascend, and report its communication."""
    import os
    import tempfile

    from rich.console import Console

    from mistral_ms.cli.dryrun_cost import CostReport
    from mistral_ms.cli.output import count_progress, write_json
    from mistral_ms.config import load_any_config
    from mistral_ms.errors import ConfigError, GraphError
    from mistral_ms.parallel.dryrun.process import Compiler, Request
    from mistral_ms.parallel.dryrun.report import summary
    from mistral_ms.parallel.dryrun.servers import check_servers
    from mistral_ms.parallel.dryrun.standins import find_runtime
    from mistral_ms.parallel.topology import Topology

    console = Console(highlight=False, soft_wrap=True)
    changes = tuple(overrides or ())
    run = load_any_config(config, changes)
    ranks = _ranks(rank, run.parallel.world)
    step = _step(run, step)
    if picture is not None and not (cost and len(ranks) == 1):
        rule = "needs --cost, and one rank"
        raise ConfigError("no picture", where="--picture", value=picture, rule=rule)
    costs = CostReport(run, hardware, picture) if cost else None
    runtime = find_runtime(os.environ)
    if target is None:
        _refuse(run, layers)
        target = TARGETS[step.value]
    if not runtime.is_cann:
        check_servers(Topology.of(run.parallel))
    kept = logs or Path(tempfile.mkdtemp(prefix="mistral_ms-dryrun-logs-"))
    reports: list[dict[str, Any]] = []
    found: list[StepCost] = []
    failures: list[str] = []
    with (
        Compiler(runtime, os.environ) as compiler,
        count_progress(console, "compiling", "ranks") as progress,
    ):
        for done, number in enumerate(ranks):
            progress(done, len(ranks))
            request = Request(number, run.parallel.world, target, config, changes, layers)
            try:
                one, its_cost = _compile(compiler, request, run, kept, time_limit, costs)
                reports.append(one)
                found += [its_cost] if its_cost is not None else []
            except GraphError as error:
                failures.append(str(error))
    for each in reports:
        _show(console, each, whole=len(ranks) == 1)
    if costs is not None:
        if not console.is_terminal:
            console.width = 120  # a table in a file need not fit a screen
        for each, its_cost in zip(reports, found, strict=True):
            costs.show(console, its_cost, each)
    for text in failures:
        console.print(f"failed: {text}", style="red", markup=False)
    if json is not None and reports:
        write_json(json, reports[0] if len(ranks) == 1 else summary(reports))
    if failures:
        raise typer.Exit(1)


def _step(run: RunConfig | PredictConfig, asked: Step | None) -> Step:
    """The graph that is meant.

    Raises:
        ConfigError: the run has no such graph.
    """
    from mistral_ms.config import RunConfig
    from mistral_ms.errors import ConfigError

    there = (Step.TRAIN,) if isinstance(run, RunConfig) else (Step.DECODE, Step.PREFILL)
    if asked is not None and asked not in there:
        kind = "a training" if isinstance(run, RunConfig) else "a prediction"
        rule = f"{kind} has {' and '.join(there)}"
        raise ConfigError("no such graph", where="--step", value=asked.value, rule=rule)
    return there[0] if asked is None else asked


def _refuse(run: RunConfig | PredictConfig, layers: int | None) -> None:
    """Raises where it is known beforehand that no rank compiles, or that what it compiles cannot
    run: the dry run computes nothing, so gates are tried here.
    """
    from mistral_ms.config import DROPLESS, RunConfig
    from mistral_ms.parallel.graph.checks import check_gate, check_prediction, check_run

    if isinstance(run, RunConfig):
        check_run(run, layers or run.model.num_hidden_layers)
        check_gate(run.model, run.routing, training=True)
    else:
        check_prediction(run)
        check_gate(run.model, DROPLESS, training=False)


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
    compiler: Compiler,
    request: Request,
    run: RunConfig | PredictConfig,
    logs: Path,
    time_limit: float,
    costs: CostReport | None,
) -> tuple[dict[str, Any], StepCost | None]:
    from mistral_ms.config import RunConfig
    from mistral_ms.parallel.dryrun.ir import read
    from mistral_ms.parallel.dryrun.report import report
    from mistral_ms.parallel.topology import Topology
    from mistral_ms.planner.beside import planned_beside

    with compiler.compiled(request, logs, time_limit) as found:
        text = found.graph.read_text(encoding="utf-8", errors="replace")
        graph = read(text, request.rank, request.world, found.groups)
    topology = Topology.of(run.parallel)
    micro_batches = run.training.gradient_accumulation_steps if isinstance(run, RunConfig) else 1
    one = report(graph, topology, request.rank, found.seconds, micro_batches)
    if isinstance(run, RunConfig) and request.target == TARGETS["train"]:
        one["planned"] = planned_beside(run, one, request.layers)
    if costs is None:
        return one, None
    cost = costs.of(text, graph, request.rank, request.layers)
    one["cost"] = cost.values()
    return one, cost


def _show(console: Console, one: dict[str, Any], whole: bool) -> None:
    """One line about a rank, and a table of its communication when it is the only one."""
    from rich.table import Table

    from mistral_ms.cli.output import size_text

    sent = one["sent"]
    console.print(
        f"rank {one['rank']} (stage {one['stage']}) compiled in {one['compile_seconds']:.1f} s: "
        f"weights {size_text(one['parameter_bytes'])}, "
        + (
            f"cache {size_text(cache)}"
            if (cache := one["cache_bytes"])
            else f"optimizer {size_text(one['optimizer_bytes'])}"
        )
        + "; sends a step "
        f"{size_text(sent['bytes_inside'])} inside its node, "
        f"{size_text(sent['bytes_between'])} to others"
    )
    planned = one.get("planned")
    if planned is not None:
        lines = planned["communication"]
        alike = sum(line["compiled"] == line["planned"] for line in lines)
        console.print(
            f"planned: weights {size_text(planned['parameter_bytes'])}, optimizer "
            f"{size_text(planned['optimizer_bytes'])}; bytes of {alike} of {len(lines)} "
            "communication operators as planned"
        )
        for line in lines:
            if line["compiled"] != line["planned"]:
                console.print(
                    f"  {line['operator']} {line['phase']} of ranks "
                    f"{','.join(map(str, line['ranks']))}: {size_text(line['compiled'])}, planned "
                    f"{size_text(line['planned'])}"
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
