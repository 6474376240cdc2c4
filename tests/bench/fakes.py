"""Sides without work, which write down what they are asked."""

import json
import os
import time
from pathlib import Path

import numpy as np

from benchmarks.peer import Work


def work(case, name, seconds, answer):
    diary = Path(case["diary"])

    def note(what):
        states = [
            (Path("/proc") / pid / "stat").read_text().rpartition(")")[2].split()[0]
            for pid in case.get("watched", ())
        ]
        with diary.open("a") as file:
            file.write(json.dumps([name, what, states, os.getpid()]) + "\n")

    def measure():
        note("measure")
        time.sleep(0.01)
        return {"work": seconds * case["size"]}

    note("prepare")
    return Work(measure, {"answer": np.array(answer)}, {"bytes": 3.0})


def ours(case):
    return work(case, "ours", 1e-3, [1.0, 2.0, 4.0])


def theirs(case):
    return work(case, "theirs", 2e-3, [1.0, 2.0, 4.0 + 1e-6])


def wrong(case):
    return work(case, "wrong", 1e-3, [1.0, 2.5, 4.0])


def other(case):
    return work(case, "other", 1e-3, [1.0, 2.0])


def best(case):
    return work(case, "best", 0.5e-3, [])


def broken(case):
    raise ValueError("no such kernel")


def rank(case):
    """Of a job: the later ranks are slower."""
    number = int(os.environ["RANK"])
    return Work(lambda: {"work": float(1 + number)}, {"rank": np.array(number)})
