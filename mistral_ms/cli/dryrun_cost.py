"""``dryrun --cost``: what the operators of a compiled rank cost."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from mistral_ms.config import PredictConfig, RunConfig
    from mistral_ms.parallel.dryrun.ir import Graph
    from mistral_ms.planner import Hardware
    from mistral_ms.planner.compiled import StepCost

SUFFIXES = (".png", ".svg")


class CostReport:
    """Prints the cost of a rank's step, and draws it.

    Args:
        run: what is compiled, a training.
        hardware: a file of ``configs/hardware``, or a path.
        picture: where it is drawn; None: nowhere.

    Raises:
        ConfigError: it is no training, the hardware is not known, or no picture can be written in
            a file of that name.
    """

    def __init__(self, run: RunConfig | PredictConfig, hardware: str, picture: Path | None) -> None:
        from mistral_ms.config import RunConfig
        from mistral_ms.errors import ConfigError
        from mistral_ms.planner import load_hardware

        if not isinstance(run, RunConfig):
            rule = "the step of a training is what has a cost"
            raise ConfigError("no cost", where="--cost", value="a prediction file", rule=rule)
        if picture is not None and picture.suffix not in SUFFIXES:
            rule = f"ends with {' or '.join(SUFFIXES)}"
            raise ConfigError("no picture", where="--picture", value=picture, rule=rule)
        self.run: RunConfig = run
        self.hardware: Hardware = load_hardware(hardware)
        self.picture = picture

    def of(self, text: str, graph: Graph, rank: int, layers: int | None) -> StepCost:
        """The cost of one rank.

        Args:
            text: of the compiled graph.
            graph: the same, read.
            rank: whose.
            layers: that were compiled; None: all.
        """
        from mistral_ms.parallel.dryrun.cost import costs
        from mistral_ms.parallel.dryrun.peak import peak
        from mistral_ms.planner.compiled import step_cost

        return step_cost(self.run, self.hardware, costs(text), graph, peak(text), rank, layers)

    def show(self, console: Console, cost: StepCost, one: dict[str, Any]) -> None:
        """Tables and sentences, and the picture.

        Args:
            console: where to.
            cost: of a rank.
            one: its report.
        """
        from mistral_ms.cli.output import print_table, write_file
        from mistral_ms.planner.compiled_report import cost_figure, sentences, tables

        for table in tables(cost):
            console.print(f"\n{table.title}", markup=False)
            print_table(console, table.columns, table.rows)
        for sentence in sentences(cost, self.run, self.hardware):
            console.print(sentence, markup=False)
        if self.picture is not None:
            title = f"rank {one['rank']} of {self.run.parallel.world}, {self.run.parallel.sizes}"
            suffix = self.picture.suffix.removeprefix(".")
            write_file("--picture", self.picture, cost_figure(cost, title, suffix))
            console.print(f"picture      {self.picture}", markup=False)
