"""Sides of several processes: how the processes of a job find each other."""

from __future__ import annotations

import contextlib
import random
import socket
import subprocess
import sys
from collections.abc import Mapping

SCHEDULER = """
from benchmarks.peer import end_with_parent
end_with_parent()
from mindspore.communication import init
init()
"""


PORTS = 20000, 32000
"""Below the ports that the system gives to connections, which may be taken again at any time."""


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nothing listens to."""
    found: list[int] = []
    while len(found) < count:
        with socket.socket() as probe, contextlib.suppress(OSError):
            port = random.SystemRandom().randint(*PORTS)
            probe.bind(("127.0.0.1", port))
            found.append(port)
    return found


def rank_environments(processes: int, ports: list[int]) -> list[dict[str, str]]:
    """The variables of every rank, those that msrun sets and those of torch.distributed.

    Args:
        processes: of the job.
        ports: MindSpore's scheduler's, and PyTorch's store's.
    """
    return [
        {
            "MS_WORKER_NUM": str(processes),
            "MS_SCHED_HOST": "127.0.0.1",
            "MS_SCHED_PORT": str(ports[0]),
            "MS_ROLE": "MS_WORKER",
            "MS_NODE_ID": str(rank),
            "RANK_ID": str(rank),
            "RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(ports[1]),
        }
        for rank in range(processes)
    ]


def scheduler(processes: int, port: int, environment: Mapping[str, str]) -> subprocess.Popen[str]:
    """MindSpore's scheduler, through which the ranks find each other."""
    variables = {
        "MS_WORKER_NUM": str(processes),
        "MS_SCHED_HOST": "127.0.0.1",
        "MS_SCHED_PORT": str(port),
        "MS_ROLE": "MS_SCHED",
    }
    return subprocess.Popen(
        [sys.executable, "-c", SCHEDULER],
        env={**environment, **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        text=True,
    )
