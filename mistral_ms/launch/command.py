"""The command that starts this machine's processes, and what they find in their environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import mistral_ms
from mistral_ms.launch.heartbeat import DIRECTORY
from mistral_ms.launch.options import Options

JOB = "MISTRAL_MS_JOB"
"""All processes of a job have this variable, with the same value: that is how they are found."""
NODE_RANK = "MISTRAL_MS_NODE_RANK"
SCRIPT = Path(mistral_ms.__file__).parents[1] / "run_mixtral.py"


def msrun_command(options: Options) -> list[str]:
    """The program and its arguments.

    The log of rank 0 is on the console; on machines that do not have it nothing is. msrun ends
    this machine's other processes when one of them fails (``--join``).
    """
    return [
        "msrun",
        f"--worker_num={options.world}",
        f"--local_worker_num={options.workers}",
        f"--master_addr={options.master}",
        f"--master_port={options.port}",
        f"--node_rank={options.node_rank}",
        f"--log_dir={options.log_dir}",
        "--join=True",
        f"--cluster_time_out={options.join_limit}",
        "--tail_worker_log=0",
        str(SCRIPT),
        *options.task.command,
    ]


def job_environment(options: Options, job: str, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment of all processes of a job.

    Args:
        options: what is started.
        job: its name; nothing else on this machine has the same.
        environ: the launcher's own.
    """
    home = str(SCRIPT.parent)
    return {
        **environ,
        "GLOG_v": environ.get("GLOG_v", "3"),
        # a rank that is killed takes what is in its buffers along
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [home, environ.get("PYTHONPATH", "")])),
        JOB: job,
        NODE_RANK: str(options.node_rank),
        DIRECTORY: str(options.heartbeats.resolve()),
    }
