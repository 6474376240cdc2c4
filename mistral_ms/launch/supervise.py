"""Runs msrun, watches the ranks of this machine, and ends all of them when one has failed.

msrun itself notices a worker that has exited; it does not notice one that is stuck, and it waits
for its scheduler without limit afterwards. So the end is made here: every process of the job is
killed, and the failure is told with rank, step and log. Launchers on other machines learn of it by
a file in the directory of the heartbeats, if they see the same one.
"""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from mistral_ms.launch.command import job_environment, msrun_command
from mistral_ms.launch.heartbeat import (
    FAILED,
    FINISHED,
    STACK_SIGNAL,
    Beat,
    read_beat,
    stack_path,
)
from mistral_ms.launch.options import Options
from mistral_ms.launch.processes import Worker, processes, send
from mistral_ms.launch.watch import Limits, Overdue, Watch, stands_out
from mistral_ms.signals import asked

POLL_SECONDS = 0.5
GRACE_SECONDS = 10.0
"""For a rank that has said that it failed, or a scheduler whose workers are gone, to exit."""
POLITE_SECONDS = 600.0
"""For all ranks to save when the launcher is asked to end; a second signal ends the wait."""
PATIENCE_SECONDS = 3.0
"""For msrun to say which rank is gone, when others have lost patience with it."""
SCHEDULER_SECONDS = 5.0
"""So long ranks may be seen without the scheduler, which outlives them in a job that is well."""
TAIL_LINES = 20
_EXITED = re.compile(r"Worker process (\d+) exit with exception\. Error code: (-?\d+)")

_WAITED = re.compile("AllReduce|AllGather|AlltoAll|ReduceScatter|Broadcast|Send|Receive|HCCL|mccl")
"""In the message of a rank that has waited for another one in vain."""
Beats = dict[int, Beat | None]


@dataclass(frozen=True)
class Failure:
    """Why a job has ended.

    Attributes:
        rank: whose fault it is; None when that cannot be told.
        step: the step that it was in; None when unknown.
        reason: what happened.
    """

    rank: int | None
    step: int | None
    reason: str

    def text(self, options: Options) -> str:
        """One line for the console and for other machines."""
        where = "the job" if self.rank is None else f"rank {self.rank}"
        step = "" if self.step is None else f" in step {self.step}"
        logs = options.log_dir if self.rank is None else options.log(self.rank)
        return f"{where} failed{step}: {self.reason}: log {logs}"


class Supervisor:
    """One machine's part of a job.

    Args:
        options: what to start.
        environ: the environment to start from.
    """

    def __init__(self, options: Options, environ: dict[str, str]) -> None:
        self.options = options
        self.job = f"{os.getpid()}-{time.time_ns()}"
        self._environ = job_environment(options, self.job, environ)
        self._pids: dict[int, int] = {}  # rank of each process that was ever seen
        self._notes = self._other_notes()
        self._signals, self._signal = 0, 0
        self._asked_to_end: set[int] = set()  # processes that a first signal was passed on to
        self._suspect: tuple[int, str] | None = None  # who was seen to be stuck, and why
        self._gave_up_at = math.inf
        self._alone_since = math.inf  # since when ranks have been seen without a scheduler

    def run(self) -> int:
        """Starts everything and waits for the end; the exit code: 0, 1, or 128 + a signal."""
        self._prepare()
        output = (self.options.log_dir / f"msrun_{self.options.node_rank}.log").open("wb")
        handlers = {n: signal.signal(n, self._asked) for n in (signal.SIGTERM, signal.SIGINT)}
        with output:
            msrun = subprocess.Popen(
                msrun_command(self.options),
                env=self._environ,
                stderr=output,
                start_new_session=True,  # Ctrl-C is for the launcher to pass on
            )
            try:
                failure = self._wait(msrun)
            finally:
                self._end(msrun)
                for number, handler in handlers.items():
                    signal.signal(number, handler)
        if self._signals:
            return 128 + self._signal
        if failure is not None:
            self._tell(failure)
        return 0 if failure is None else 1

    def _prepare(self) -> None:
        """Nothing of an earlier job may look like a sign of life of this one."""
        self.options.heartbeats.mkdir(parents=True, exist_ok=True)
        self._note.unlink(missing_ok=True)
        for rank in self.options.local_ranks:
            for path in self.options.heartbeats.glob(f"rank-{rank:05d}.*"):
                path.unlink(missing_ok=True)
            self.options.log(rank).unlink(missing_ok=True)

    def _asked(self, number: int, frame: object) -> None:
        self._signals += 1
        self._signal = asked(number)

    def _pass_on(self, workers: list[Worker]) -> None:
        """Asks each rank to end, once: a second signal would end it before it has saved."""
        send([each for each in workers if each.pid not in self._asked_to_end], signal.SIGTERM)
        self._asked_to_end |= {each.pid for each in workers}

    def _wait(self, msrun: subprocess.Popen[bytes]) -> Failure | None:
        limits = Limits(self.options.step_limit, self.options.slow_limit)
        watch = Watch(self.options.local_ranks, limits, time.monotonic())
        failure: Failure | None = None
        deadline, looked = math.inf, False
        while True:
            now, code, alive = time.monotonic(), msrun.poll(), processes(self.job)
            workers = [each for each in alive if each.rank is not None]
            self._pids |= {each.pid: each.rank for each in workers if each.rank is not None}
            beats = self._beats()
            late = watch.look(beats, now)
            quiet = bool(late) or watch.is_quiet(now)
            if quiet and (late or not looked):
                self._suspect = self._look_closer(beats, workers) or self._suspect
            looked = quiet
            crashed = self._crashed_at_exit(beats)
            if crashed is not None and (code is not None or not workers):
                print(f"warning: {crashed}", file=sys.stderr, flush=True)
                return None
            if crashed is None and failure is None and not self._signals:
                failure = self._failure(beats, late, now) or self._abandoned(alive, beats, now)
            if self._signals > 1:  # nobody waits for its reasons
                return None
            if self._signals:
                self._pass_on(workers)
            # ranks may have to save; what is left when they are gone (a scheduler that waits for
            # one that had no time to say farewell) has nothing to do
            patience = POLITE_SECONDS if self._signals and workers else GRACE_SECONDS
            if failure is not None or self._signals:
                deadline = min(deadline, now + patience)
            if code is not None:
                if failure is None and code != 0 and not self._signals:
                    failure = self._failure(beats, [], math.inf) or Failure(
                        None, None, f"msrun ended with {code}"
                    )
                return failure
            # what is stuck needs no time to exit, nor does what waits for another machine
            hopeless = failure is not None and (late or not workers or self._others_failed())
            if hopeless or now > deadline:
                return failure
            time.sleep(POLL_SECONDS)

    def _beats(self) -> Beats:
        return {r: read_beat(self.options.heartbeats, r) for r in self.options.local_ranks}

    def _failure(self, beats: Beats, late: list[Overdue], now: float) -> Failure | None:
        """What is known to have failed; a rank that only waited for another is not at fault."""
        failed = {rank: beat for rank, beat in beats.items() if beat and beat.phase == FAILED}
        for rank, beat in failed.items():
            if not _WAITED.search(beat.detail):
                return Failure(rank, beat.step + 1, beat.detail)
        exited = self._exited()
        if exited is not None and self._pids.get(exited[0]) not in failed:
            pid, code = exited
            known = self._pids.get(pid, self._complaining())
            ending = f"killed by {_signal_name(-code)}" if code < 0 else f"exit code {code}"
            return Failure(known, _step(beats.get(known) if known is not None else None), ending)
        if note := self._others_failed():
            return Failure(None, None, f"another machine says: {note}")
        if late:
            return self._stuck(beats, late)
        if failed:
            return self._waited_in_vain(beats, failed, now)
        return None

    def _crashed_at_exit(self, beats: Beats) -> str | None:
        """Of a job whose ranks have all said that their work is done: which one a signal ended.

        MindSpore was seen to crash while its process ends, everything saved.
        """
        exited = self._exited()
        done = all(beat is not None and beat.phase == FINISHED for beat in beats.values())
        if not done or exited is None or exited[1] >= 0:
            return None
        rank = self._pids.get(exited[0])
        name = "a rank" if rank is None else f"rank {rank}"
        ending = _signal_name(-exited[1])
        return f"{name} was ended by {ending} after all ranks had finished their work"

    def _abandoned(self, alive: list[Worker], beats: Beats, now: float) -> Failure | None:
        """The scheduler is gone: ranks that have not found each other would wait for minutes."""
        ranks = {each.rank for each in alive if each.rank is not None}
        busy = [
            rank for rank in ranks if (beat := beats.get(rank)) is None or beat.phase != FINISHED
        ]
        # it is on machine 0, and leaves at once when there is only one process to find
        needed = busy and self.options.node_rank == 0 and self.options.world > 1
        alone = needed and not any(each.scheduler for each in alive)
        self._alone_since = min(self._alone_since, now) if alone else math.inf
        if now - self._alone_since < SCHEDULER_SECONDS:
            return None
        log = self.options.log_dir / "scheduler.log"
        return Failure(None, None, f"the scheduler is gone, ranks still run (see {log})")

    def _waited_in_vain(self, beats: Beats, failed: dict[int, Beat], now: float) -> Failure | None:
        """Ranks gave up a collective operation: because of one that had been seen to be stuck, or
        of one of which msrun will speak within a second; otherwise nobody here is to blame.
        """
        rank, beat = next(iter(failed.items()))
        if self._suspect is not None:
            suspect, why = self._suspect
            reason = f"stuck: others gave up waiting for it ({beat.detail}); {why}"
            return Failure(suspect, _step(beats.get(suspect)), reason)
        self._gave_up_at = min(self._gave_up_at, now)
        if now - self._gave_up_at < PATIENCE_SECONDS:
            return None
        return Failure(rank, beat.step + 1, f"it gave up waiting for other ranks: {beat.detail}")

    def _look_closer(self, beats: Beats, workers: list[Worker]) -> tuple[int, str] | None:
        """Asks all ranks for their stacks; the rank that the others wait for, if one stands out."""
        stopped = [each.rank for each in workers if each.stopped and each.rank is not None]
        # only who has written its file has installed the handler; others the signal would end
        able = [each for each in workers if each.rank is not None and beats.get(each.rank)]
        files = {rank: stack_path(self.options.heartbeats, rank) for rank in beats}
        before = {rank: path.stat().st_size for rank, path in files.items() if path.exists()}
        send(able, STACK_SIGNAL)
        time.sleep(1.0)
        stacks = {
            rank: files[rank].read_bytes()[size:].decode(errors="replace")
            for rank, size in before.items()
        }
        return stands_out(beats, stopped, stacks)

    def _stuck(self, beats: Beats, late: list[Overdue]) -> Failure:
        worst = max(late, key=lambda each: each.seconds)
        silence = f"no sign of life for {worst.seconds:.0f} s ({worst.limit:.0f} are allowed)"
        if self._suspect is not None:
            rank, why = self._suspect
            return Failure(rank, _step(beats.get(rank)), f"stuck: {silence}; {why}")
        ranks = ", ".join(str(each.rank) for each in late)
        return Failure(
            None,
            _step(worst.beat),
            f"stuck: {silence} of ranks {ranks}, which all wait in the same place; their stacks "
            f"are in {self.options.heartbeats}",
        )

    def _complaining(self) -> int | None:
        """The first rank with an error in its log: one that ended too soon to be seen alive."""
        for rank in self.options.local_ranks:
            log = self.options.log(rank)
            text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
            if "Traceback" in text or "error:" in text:
                return rank
        return None

    def _exited(self) -> tuple[int, int] | None:
        path = self.options.log_dir / f"msrun_{self.options.node_rank}.log"
        found = _EXITED.search(path.read_text(encoding="utf-8", errors="replace"))
        return (int(found[1]), int(found[2])) if found else None

    @property
    def _note(self) -> Path:
        return self.options.heartbeats / f"node-{self.options.node_rank:05d}.failed"

    def _other_notes(self) -> dict[str, str]:
        """What launchers have left in the common directory: of this job, or of an earlier one."""
        found = {}
        for path in self.options.heartbeats.glob("node-*.failed"):
            if path != self._note:
                found[path.name] = path.read_text(encoding="utf-8", errors="replace").strip()
        return found

    def _others_failed(self) -> str | None:
        for name, text in self._other_notes().items():
            if self._notes.get(name) != text:
                return text.partition("\n")[0]
        return None

    def _end(self, msrun: subprocess.Popen[bytes]) -> None:
        """Nothing of the job is left when this returns."""
        for _ in range(20):
            left = processes(self.job)
            if not left and msrun.poll() is not None:
                return
            send(left, signal.SIGKILL)
            msrun.poll()
            time.sleep(0.1)

    def _tell(self, failure: Failure) -> None:
        text = failure.text(self.options)
        if not self._others_failed():
            # the time makes it differ from an earlier job's
            self._note.write_text(f"{text}\n{time.time_ns()}\n", encoding="utf-8")
        rank = failure.rank
        if rank is not None and self.options.log(rank).exists():
            print(f"--- last lines of {self.options.log(rank)}", file=sys.stderr)
            with self.options.log(rank).open(encoding="utf-8", errors="replace") as lines:
                sys.stderr.writelines(deque(lines, TAIL_LINES))
        stack = None if rank is None else stack_path(self.options.heartbeats, rank)
        if stack is not None and stack.exists() and stack.stat().st_size:
            print(f"--- where rank {rank} was, innermost first", file=sys.stderr)
            sys.stderr.write(stack.read_text(encoding="utf-8", errors="replace"))
        print(f"error: {text}", file=sys.stderr, flush=True)


def _step(beat: Beat | None) -> int | None:
    """The step that a rank was in: the one after the last that it has done."""
    return None if beat is None else beat.step + 1


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
