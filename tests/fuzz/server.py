"""Runs cases: one process imports everything, its children read with limits and are replaced.

A child ends at its first hang or crash; the next one goes on behind that case. Time and memory are
limited by the kernel, so that code which catches every exception is caught as well.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from fuzz.mutators import damage
from fuzz.targets import TARGETS, Seen, Target
from mistral_ms.errors import MistralMsError

SECONDS = 10.0
"""Of processor time that a case may take; twelve times as much by the clock of a busy machine."""
MEMORY = 1 << 30
"""Bytes that a case may allocate."""
LONGEST_MESSAGE = 2000
BATCH = 100
READ, REFUSED = "read", "refused"


@dataclass(frozen=True)
class Result:
    """How a case ended.

    Attributes:
        number: of the case.
        target: which reader.
        mutation: what was done to its input.
        outcome: ``read`` and ``refused`` are well; everything else is a failure.
        detail: the message, the traceback or the change.
    """

    number: int
    target: str
    mutation: str
    outcome: str
    detail: str = ""

    @property
    def failed(self) -> bool:
        return self.outcome not in (READ, REFUSED)


class Fuzzer:
    """Cases of one seed.

    Args:
        seed: with the number of a case it decides everything about it.
        root: an empty directory.
        only: names of the targets; all when empty.
    """

    def __init__(self, seed: int, root: Path, only: Sequence[str] = ()) -> None:
        self._seed, self._root = seed, root
        self._names = sorted(only or TARGETS)
        self._good = root / "good"
        self._good.mkdir()
        self._before: dict[str, Seen] = {}
        for name in self._names:
            TARGETS[name].build(self._good / name)
            self._before[name] = TARGETS[name].read(self._good / name, root / f"out-{name}")

    def run(self, numbers: Sequence[int]) -> Iterator[Result]:
        """Runs cases in order, in children that are forked for a hundred each."""
        left = list(numbers)
        while left:
            batch, done = left[:BATCH], 0
            for result in self._in_child(batch):
                yield result
                done += 1
            left = left[done:]

    def _in_child(self, batch: Sequence[int]) -> Iterator[Result]:
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(read_end)
                self._child(batch, write_end)
            except BaseException:  # of the fuzzer itself: the reader's are results
                os.write(write_end, json.dumps({"broken": traceback.format_exc()}).encode())
            finally:
                os._exit(0)
        os.close(write_end)
        begun: Result | None = None
        with os.fdopen(read_end, encoding="utf-8") as lines:
            for line in lines:
                values = json.loads(line)
                if "broken" in values:
                    raise RuntimeError(values["broken"])
                begun = Result(**values)
                if begun.outcome != "begun":
                    yield begun
                    begun = None
        _, status = os.waitpid(pid, 0)
        if begun is not None:  # it died in this case
            number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
            hang = number in (signal.SIGALRM, signal.SIGPROF)
            detail = f"killed by {signal.Signals(number).name}" if number else "exit"
            yield Result(
                begun.number, begun.target, begun.mutation, "hang" if hang else "crash", detail
            )

    def _child(self, batch: Sequence[int], pipe: int) -> None:
        quiet = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(quiet, descriptor)
        os.fsync = lambda descriptor: None  # thousands of syncs would take most of the time
        limit_memory()

        def say(result: Result) -> None:
            os.write(pipe, (json.dumps(asdict(result)) + "\n").encode())

        for number in batch:
            say(self.case(number, say))

    def case(self, number: int, say: object = None) -> Result:
        """Runs one case in this process."""
        rng = Random(f"{self._seed}/{number}")
        name = rng.choice(self._names)
        work = self._root / "work"
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(self._good / name, work / "src")
        if (self._good / "run.yaml").exists():
            shutil.copyfile(self._good / "run.yaml", work / "run.yaml")
        (work / "cwd").mkdir()
        os.chdir(work / "cwd")
        mutation, _ = damage(work / "src", rng)
        mutation = mutation.encode("utf-8", "backslashreplace").decode()[:600]
        if callable(say):
            say(Result(number, name, mutation, "begun"))
        start_clock()
        try:
            outcome, detail = self._judge(TARGETS[name], name, work)
        finally:
            stop_clock()
        return Result(number, name, mutation, outcome, detail)

    def _judge(self, target: Target, name: str, work: Path) -> tuple[str, str]:
        before = listing(work)
        try:
            seen = target.read(work / "src", work / "out")
        except MistralMsError as error:
            outcome, detail = REFUSED, str(error)
            if out_of_memory(error):
                outcome, detail = "memory", "".join(traceback.format_exception(error))[-3000:]
            elif len(detail.encode("utf-8", "replace")) > LONGEST_MESSAGE or not printable(detail):
                outcome = "message"
        except BaseException:
            return "traceback", traceback.format_exc()[-4000:]
        else:
            outcome, detail = READ, ""
            try:
                change = target.judge(work / "src", seen, self._good / name, self._before[name])
            except Exception as error:
                change = f"the second reader refuses: {error!r}"
            if change is not None:
                return "silent change", change
        after = listing(work)
        if strangers := [p for p in after if before.get(p) != after[p]]:
            return "written", ", ".join(strangers)
        return outcome, detail


def listing(work: Path) -> dict[str, tuple[int, ...]]:
    """All files but those of the target, by size and time."""
    found = {}
    for path in work.rglob("*"):
        inside = path.relative_to(work)
        if inside.parts[0] != "out":
            each = path.lstat()
            found[str(inside)] = (each.st_mode, each.st_size if not path.is_dir() else 0)
    return found


def printable(text: str) -> bool:
    return text.isprintable()


def out_of_memory(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def limit_memory() -> None:
    """Private memory of this process, beside what it has."""
    status = Path("/proc/self/status").read_text()
    has = next(int(x.split()[1]) for x in status.splitlines() if x.startswith("VmData")) << 10
    resource.setrlimit(resource.RLIMIT_DATA, (has + MEMORY, has + MEMORY))


def start_clock() -> None:
    """SIGPROF and SIGALRM end the process when nobody catches them."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 12 * SECONDS)


def stop_clock() -> None:
    signal.setitimer(signal.ITIMER_PROF, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
