"""Which test files cost most: wall and processor time, as a table at the end of a run.

Processor time is that of the test process and of every process that it started, whether it still
runs or has been waited for. A fixture is paid for by the first test that asks for it.
"""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from time import monotonic  # bound here: a test may patch the module's clock

import pytest

ROWS = 15


def now() -> tuple[float, float]:
    """Seconds of wall time and of processor time, children included."""
    return monotonic(), _processor_time(os.getpid())


def _processor_time(pid: int) -> float:
    """Of a process, of those that it has waited for, and of those that run under it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        tasks = Path(f"/proc/{pid}/task").glob("*/children")
        children = [child for task in tasks for child in task.read_text().split()]
    except OSError:  # it has ended; who waited for it has its time, now or the next time
        return 0.0
    own = sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")
    return own + sum(_processor_time(int(child)) for child in children)


class Slowest:
    """Measures from the end of one test to the end of the next one."""

    def __init__(self) -> None:
        self.before = now()
        self.files: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, call):
        """In the process that runs the test; pytest-xdist carries the attribute over."""
        report = yield
        if call.when != "teardown":  # looking at all processes takes time, too
            return report
        after = now()
        report.cost = tuple(b - a for a, b in zip(self.before, after, strict=True))
        self.before = after
        return report

    def pytest_runtest_logreport(self, report):
        """In the process that a person looks at."""
        for number, seconds in enumerate(getattr(report, "cost", ())):
            self.files[report.nodeid.partition("::")[0]][number] += seconds

    def pytest_terminal_summary(self, terminalreporter):
        total = sum(cost[1] for cost in self.files.values())
        if total < 60:
            return
        terminalreporter.section("slowest files")
        ordered = sorted(self.files.items(), key=lambda item: -item[1][1])
        wall = sum(cost[0] for cost in self.files.values())
        for name, (elapsed, processor) in [*ordered[:ROWS], ("all files", (wall, total))]:
            terminalreporter.write_line(f"{elapsed:8.1f} s {processor:8.1f} s processor  {name}")
