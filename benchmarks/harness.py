"""Runs sides that do the same work, each in processes of its own, in turns.

Outputs are compared before anything is timed. A round measures every side once; the next round
begins with another one. Sides of one process are stopped while others run, so that their threads
take no time. A ratio is formed within a round, so what slows the whole machine cancels out.
"""

from __future__ import annotations

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.jobs import free_ports, rank_environments, scheduler

ROOT = Path(__file__).parents[1]
ROUNDS = 5
MALLOC = {
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.trim_threshold=17179869184"
    ":glibc.malloc.mmap_threshold=33554432"
}
"""Of all processes: huge pages, and freed memory is kept. PyTorch gains more by it than MindSpore
(15 to 25 % against 5 % of a training step), so it is what peers would choose."""


class BenchmarkError(Exception):
    """A side failed, or did not compute what the others do."""


@dataclass(frozen=True)
class SideSpec:
    """Who takes part.

    Attributes:
        name: as it is shown.
        target: ``module:function``, see :mod:`benchmarks.peer`.
        compared: outputs of the sides with the same word here must agree; none: not compared.
        tolerance: how far an output may be from the first side's, in shares of the largest value.
        flips: the share of an output's rows that may be further away: tokens of which two experts
            are so close that rounding decides.
        limit: not another program but what the machine can do.
        changed: what was changed in a program of others, for the table.
        processes: more than one: they form a job, see :mod:`benchmarks.jobs`.
        scheduled: whether such a job has MindSpore's scheduler.
        environment: further variables.
        when: the cases in which it takes part.
    """

    name: str
    target: str
    compared: str = ""
    tolerance: float = 2e-5
    flips: float = 0.0
    limit: bool = False
    changed: str = ""
    processes: int = 1
    scheduled: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)
    when: Callable[[Mapping[str, Any]], bool] = lambda case: True


def environment() -> dict[str, str]:
    """What all processes find: the same threads and the same allocator."""
    threads = str(os.cpu_count() or 1)
    paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))
    return {
        **os.environ,
        **MALLOC,
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "PYTHONPATH": os.pathsep.join(paths),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
        "GLOG_v": os.environ.get("GLOG_v", "3"),  # noqa: SIM112
        "HF_HUB_OFFLINE": "1",
        "MS_COMPILER_CACHE_ENABLE": "0",  # graphs of earlier runs would not be this run's work
        "TOKENIZERS_PARALLELISM": "false",
    }


class Running:
    """A side's processes; :meth:`wait` until they are there.

    Args:
        spec: which.
        folder: for logs and outputs.
    """

    def __init__(self, spec: SideSpec, folder: Path) -> None:
        self.spec = spec
        self._file = folder / re.sub(r"\W+", "_", spec.name)
        self._log = self._file.with_suffix(".log")
        command = [sys.executable, "-m", "benchmarks.peer", spec.target]
        self._others: list[subprocess.Popen[str]] = []
        environments: list[dict[str, str]] = [{}]
        if spec.processes > 1:
            ports = free_ports(2)
            common = environment() | dict(spec.environment)
            self._others = [scheduler(spec.processes, ports[0], common)] if spec.scheduled else []
            environments = rank_environments(spec.processes, ports)
        with self._log.open("w") as log:
            self._processes = [
                subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                    cwd=folder, env=environment() | dict(spec.environment) | each,
                )
                for each in environments
            ]  # fmt: skip

    def wait(self) -> None:
        """Waits until all have started.

        Raises:
            BenchmarkError: one did not.
        """
        self._answers()

    def prepare(self, case: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, np.ndarray]]:
        """Facts and outputs of a case; of several processes the largest facts and rank 0's outputs.

        Raises:
            BenchmarkError: it failed.
        """
        path = self._file.with_suffix(".npz")
        request = {"do": "prepare", "case": dict(case)}
        found = self._ask({**request, "outputs": str(path)}, {**request, "outputs": None})
        outputs = {}
        if found[0]["outputs"]:
            with np.load(path) as file:
                outputs = dict(file)
            path.unlink()
        facts = {key: max(each["facts"][key] for each in found) for key in found[0]["facts"]}
        return facts, outputs

    def measure(self) -> dict[str, float]:
        """Seconds of each figure; of several processes those of the slowest.

        Raises:
            BenchmarkError: it failed.
        """
        found = [answer["seconds"] for answer in self._ask({"do": "measure"})]
        return {key: max(each[key] for each in found) for key in found[0]}

    def end(self) -> None:
        """Ends the processes."""
        for process in (*self._processes, *self._others):
            process.kill()
            process.wait()

    def _ask(
        self, first: Mapping[str, Any], others: Mapping[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """The answers of all processes; the others than the first may be asked something else."""
        self._signal(signal.SIGCONT)
        for number, process in enumerate(self._processes):
            request = first if number == 0 or others is None else others
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
            except OSError as error:
                raise self._failed("ended") from error
        return self._answers()

    def _answers(self) -> list[dict[str, Any]]:
        found = []
        for process in self._processes:
            assert process.stdout is not None
            if not (line := process.stdout.readline()):
                raise self._failed("ended")
            found.append(json.loads(line))
        for answer in found:
            if "error" in answer:
                raise self._failed(answer["error"])
        self._signal(signal.SIGSTOP)
        return found

    def _signal(self, number: signal.Signals) -> None:
        if self.spec.processes > 1:  # ranks of a job must not miss each other's signs of life
            return
        (process,) = self._processes
        process.send_signal(number)
        if number == signal.SIGSTOP:  # and it has stopped before another one begins
            os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)

    def _failed(self, how: str) -> BenchmarkError:
        tail = self._log.read_text(errors="replace")[-2000:]
        return BenchmarkError(f"{self.spec.name}: {how.strip()}\n{tail}".strip())


@dataclass(frozen=True)
class Measured:
    """One case.

    Attributes:
        case: its values.
        seconds: of each figure, of each side, of each round.
        facts: of each side.
        differences: of each compared side: the largest difference from the first side that it is
            compared with, in shares of the largest value, and the share of rows beyond tolerance.
        limits: names of the sides that are limits.
        changed: what was changed in programs of others, by side.
        bases: of sides that are compared with another one than the first: whose speed over theirs
            the ratio is.
    """

    case: dict[str, Any]
    seconds: dict[str, dict[str, list[float]]]
    facts: dict[str, dict[str, float]]
    differences: dict[str, tuple[float, float]]
    limits: tuple[str, ...]
    changed: dict[str, str]
    bases: dict[str, str] = field(default_factory=dict)

    def rows(self) -> list[dict[str, Any]]:
        """A row for each figure; the first side is ours, ratios are its speed over the others', or
        that of the side that does the same as the other.
        """
        found = []
        for figure, sides in self.seconds.items():
            ours, *others = sides
            bases = {name: self.bases.get(name, ours) for name in others}
            ratios = {name: relative(sides[name], sides[bases[name]]) for name in others}
            limits = {name: ratios.pop(name) for name in others if name in self.limits}
            best = min(limits, key=lambda name: limits[name]["median"], default=None)
            found.append(
                {
                    "name": figure,
                    "case": self.case,
                    "ours": ours,
                    "seconds": statistics.median(sides[ours]),
                    "quartiles": quartiles(sides[ours]),
                    "peers": {n: statistics.median(sides[n]) for n in ratios},
                    "ratios": {n: ratio["median"] for n, ratio in ratios.items()},
                    "bases": {n: bases[n] for n in ratios if bases[n] != ours},
                    "ratio_quartiles": {n: ratio["quartiles"] for n, ratio in ratios.items()},
                    "limits": {n: statistics.median(sides[n]) for n in limits},
                    "limit_fraction": None if best is None else limits[best]["median"],
                    "rounds": sides,
                    "facts": self.facts,
                    "differences": self.differences,
                    "changed": self.changed,
                }
            )
        return found


def relative(theirs: Sequence[float], ours: Sequence[float]) -> dict[str, Any]:
    """Their time over ours within each round: median and quartiles."""
    ratios = [their / our for their, our in zip(theirs, ours, strict=True)]
    return {"median": statistics.median(ratios), "quartiles": quartiles(ratios)}


def quartiles(values: Sequence[float]) -> list[float]:
    """The first and the third."""
    low, high = np.percentile(values, (25, 75))
    return [float(low), float(high)]


def compare(
    specs: Sequence[SideSpec], outputs: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, tuple[float, float]]:
    """Holds every side's outputs to those of the first side that it is compared with.

    Returns:
        See :class:`Measured`.

    Raises:
        BenchmarkError: one computes something else.
    """
    found, first = {}, dict[str, str]()
    for spec in specs:
        if not spec.compared:
            continue
        want_name = first.setdefault(spec.compared, spec.name)
        if want_name == spec.name:
            continue
        got, want = outputs[spec.name], outputs[want_name]
        if not got or got.keys() != want.keys():
            raise BenchmarkError(f"{spec.name}: outputs {sorted(got)}, not {sorted(want)}")
        worst, flipped = 0.0, 0.0
        for key in want:
            if got[key].shape != want[key].shape:
                raise BenchmarkError(
                    f"{spec.name}: {key} is {got[key].shape}, not {want[key].shape}"
                )
            difference, share = _difference(got[key], want[key], spec.tolerance)
            if not share <= spec.flips:
                raise BenchmarkError(
                    f"{spec.name} does not compute what {want_name} does: {key}: {share:.2%} of "
                    f"the rows differ by more than {spec.tolerance:g} of the largest value, up to "
                    f"{difference:.3g}; {spec.flips:.2%} may"
                )
            worst, flipped = max(worst, difference), max(flipped, share)
        found[spec.name] = (worst, flipped)
    return found


def _bases(specs: Sequence[SideSpec]) -> dict[str, str]:
    """For each later side of a group that is not the first side's the group's first."""
    first: dict[str, str] = {specs[0].compared: specs[0].name}
    found = {}
    for spec in specs[1:]:
        base = first.setdefault(spec.compared, spec.name) if spec.compared else specs[0].name
        if base not in (spec.name, specs[0].name):
            found[spec.name] = base
    return found


def _difference(got: np.ndarray, want: np.ndarray, tolerance: float) -> tuple[float, float]:
    """The largest difference over the largest value, and the share of rows beyond tolerance."""
    got, want = got.astype(np.float64), want.astype(np.float64)
    scale = max(float(np.abs(want).max(initial=0)), 1e-30)
    away = np.atleast_1d(np.abs(got - want) / scale)
    rows = away.reshape(away.shape[0], -1).max(-1, initial=0)
    return float(rows.max()), float((~(rows <= tolerance)).mean())  # a NaN is beyond, too


@contextmanager
def started(specs: Sequence[SideSpec], say: Callable[[str], None]) -> Iterator[dict[str, Running]]:
    """The sides' processes; they end with the context.

    Raises:
        BenchmarkError: one did not start.
    """
    running: dict[str, Running] = {}
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        try:
            for spec in specs:
                running[spec.name] = Running(spec, Path(folder))
            for side in running.values():
                side.wait()
            say(f"started: {'; '.join(running)}")
            yield running
        finally:
            for side in running.values():
                side.end()


def measure(
    running: Mapping[str, Running],
    cases: Sequence[Mapping[str, Any]],
    *,
    rounds: int = ROUNDS,
    seconds: float = 30.0,
    say: Callable[[str], None] = lambda line: None,
) -> list[Measured]:
    """Prepares, compares and times every case.

    Args:
        running: the sides, ours first.
        cases: in order.
        rounds: of each.
        seconds: no further round of a case begins after so long; three there always are, if
            ``rounds`` asks for as many.
        say: told what is going on.

    Raises:
        BenchmarkError: a side failed or computes something else.
    """
    return [_case(running, case, rounds, seconds, say) for case in cases]


def _case(
    running: Mapping[str, Running],
    case: Mapping[str, Any],
    rounds: int,
    limit: float,
    say: Callable[[str], None],
) -> Measured:
    sides = [side for side in running.values() if side.spec.when(case)]
    title = ", ".join(f"{k} {v}" for k, v in case.items() if isinstance(v, int))
    facts, outputs = {}, {}
    for side in sides:
        facts[side.spec.name], outputs[side.spec.name] = side.prepare(case)
    differences = compare([side.spec for side in sides], outputs)
    del outputs
    times: dict[str, dict[str, list[float]]] = {}
    begun = time.monotonic()
    for number in range(rounds):
        if number >= 3 and time.monotonic() - begun > limit:
            break
        order = sides[number % len(sides) :] + sides[: number % len(sides)]
        for side in order:
            for figure, taken in side.measure().items():
                by_side = times.setdefault(figure, {})
                by_side.setdefault(side.spec.name, []).append(taken)
    names = [side.spec.name for side in sides]
    seconds = {
        figure: {name: by_side[name] for name in names if name in by_side}
        for figure, by_side in times.items()
    }
    limits = tuple(side.spec.name for side in sides if side.spec.limit)
    changed = {side.spec.name: side.spec.changed for side in sides if side.spec.changed}
    bases = _bases([side.spec for side in sides])
    measured = Measured(dict(case), seconds, facts, differences, limits, changed, bases)
    for row in measured.rows():
        ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in row["ratios"].items())
        ratios = f"; speed over {ratios}" if ratios else ""
        limit_text = f"; {row['limit_fraction']:.0%} of the limit" if row["limits"] else ""
        say(f"{title}: {row['name']} {1e3 * row['seconds']:.2f} ms{ratios}{limit_text}")
    return measured
