"""One process of a job that computes nothing: ranks beat, and wait for each other in each step.

What goes wrong is asked for by variables: ``FAULT=rank:step:kind`` after that step (``end``: after
the work of all ranks), ``STEPS`` for another number of steps, ``LEAVE`` for ranks that do not save
when they are asked to end. The scheduler ends when all ranks have said that they do.
"""

import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

from mistral_ms.launch.heartbeat import DIRECTORY, FAILED, FINISHED, Heartbeat, read_beat

RANK, WORLD = int(os.environ["RANK_ID"]), int(os.environ["RANK_SIZE"])
BEATS = Path(os.environ[DIRECTORY])
asked = []


def all_reduce(step: int) -> bool:
    """Whether a rank was asked to end when it came here: all ranks learn the same.

    It is where a rank is that waits for another one; it sleeps longer and longer, always in one
    line, since the launcher compares stacks.
    """
    arrived, begun = [BEATS / f"arrived-{r}-{step}" for r in range(WORLD)], time.monotonic()
    fresh = arrived[RANK].with_suffix(".new")
    fresh.write_text("asked" if asked else "")
    fresh.replace(arrived[RANK])
    while not all(path.exists() for path in arrived):
        waited = time.monotonic() - begun
        if waited > float(os.environ.get("GIVE_UP", "inf")):
            raise RuntimeError("AllReduce: no answer")
        time.sleep(min(0.5, 0.02 + waited / 4))
    return any(path.read_text() for path in arrived)


def misbehave(kind: str) -> None:
    Path(os.environ["FAULT_TIME"]).write_text(str(time.time()))
    if kind == "raise":
        raise RuntimeError("planted")
    if kind == "sleep":
        time.sleep(3600)
    os.kill(os.getpid(), getattr(signal, kind))


def barrier() -> None:
    """Until every rank has come to its end, as long as it takes."""

    def done(rank):
        beat = read_beat(BEATS, rank)
        return beat is not None and beat.phase in (FINISHED, FAILED, "saving")

    while not all(map(done, range(WORLD))):
        time.sleep(0.05)


def train(heart: Heartbeat) -> None:
    rank, step, kind = os.environ.get("FAULT", "-1:0:none").split(":")
    heart.phase("first step")
    for number in range(1, int(os.environ.get("STEPS", "6")) + 1):
        # the first one compiles: the launcher looks twice a second, and must have seen it begin
        time.sleep(1.2 if number == 1 else 0.1)
        asked_to_end = all_reduce(number)
        heart(SimpleNamespace(step=number))
        if (rank, step) == (str(RANK), str(number)):
            misbehave(kind)
        if asked_to_end:
            Path(f"saved_{RANK}").write_text(str(number))
            heart.phase("saving")
            barrier()  # msrun kills the others as soon as one has left
            sys.exit(128 + signal.SIGTERM)
    if RANK == 0:
        print("lm loss 1.0 -> 0.5", flush=True)
    heart.phase(FINISHED)
    if (rank, step) == (str(RANK), "end"):
        barrier()
        misbehave(kind)


if os.environ["MS_ROLE"] == "MS_SCHED":
    barrier()
elif "CANNOT_BEGIN" in os.environ:
    sys.exit("error: nothing to resume")
else:
    if "LEAVE" in os.environ:
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(128 + number))
    else:
        signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    beats = Heartbeat.of_environment(RANK)
    try:
        train(beats)
    except RuntimeError as error:
        beats.phase(FAILED, f"{type(error).__name__}: {error}")
        raise
