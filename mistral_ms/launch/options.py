"""What the launcher is asked to do."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_ms.launch.tasks import ReadTask, Task, TrainTask

DESCRIPTIONS = {
    "train": "Trains a run file with several processes on one or more machines, under msrun.",
    "generate": "Generates, or aligns, with several processes on one or more machines.",
}
EPILOGS = {
    "train": """
what stands after -- goes to `train`: key.path=value overrides, --resume DIR, --json FILE.
On several machines run the same command on each, with its own --node-rank; --log-dir and the
run's output should lie on a file system that all of them see.""",
    "generate": """
what stands after -- goes to `generate`: CKPT --prompt T [--max-new-tokens N] [--json FILE] ...,
or to `align`: HF_DIR [CKPT] ...
On several machines run the same command on each, with its own --node-rank; all of them must see
the checkpoint, and --log-dir should lie on a file system that all see.""",
}
_SHELL_SAFE = re.compile(r"(?!-)[\w./@%+=:,-]+")


@dataclass(frozen=True)
class Options:
    """The launcher's flags.

    Attributes:
        task: what the processes do.
        workers: processes on each machine.
        nodes: machines.
        node_rank: number of this machine.
        master: address of machine 0.
        port: of the scheduler there.
        log_dir: one log per rank.
        print_only: show msrun's command and end.
        step_limit: seconds that a step may take; None: ten times the longest so far, at least 30.
        slow_limit: seconds that anything else may take: compiling, the first step, saving.
        join_limit: seconds in which all processes must have found each other.
    """

    task: Task
    workers: int
    nodes: int = 1
    node_rank: int = 0
    master: str = "127.0.0.1"
    port: int = 8118
    log_dir: Path = Path("runs/logs")
    print_only: bool = False
    step_limit: float | None = None
    slow_limit: float = 1800.0
    join_limit: int = 600

    @property
    def world(self) -> int:
        """Processes on all machines."""
        return self.workers * self.nodes

    @property
    def local_ranks(self) -> range:
        """The ranks of this machine."""
        first = self.node_rank * self.workers
        return range(first, first + self.workers)

    def log(self, rank: int) -> Path:
        """The log of a rank; msrun chooses the name."""
        return self.log_dir / f"worker_{rank}.log"

    @property
    def heartbeats(self) -> Path:
        """Where the ranks write their signs of life."""
        return self.log_dir / "heartbeat"


def parse(arguments: Sequence[str], kind: str) -> Options:
    """Reads the command line; exits with 2 and a message when it is wrong.

    Args:
        arguments: without the program's name.
        kind: ``train`` or ``generate``, of which each has a script.
    """
    parser = argparse.ArgumentParser(
        f"scripts/msrun_{kind}.sh",
        description=DESCRIPTIONS[kind],
        epilog=EPILOGS[kind],
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    if kind == "train":
        add("--config", type=Path, required=True, metavar="F", help="run file, as in configs/run")
    else:
        add("--align", action="store_true", help="compare with Hugging Face instead")
        add("--dp", type=int, default=1, metavar="N", help="ranks that share the prompts")
        add("--mp", type=int, default=1, metavar="N", help="shards of every matrix")
        add("--pp", type=int, default=1, metavar="N", help="pipeline stages")
        add("--ep", type=int, default=1, metavar="N", help="ranks that share the experts")
    add("--workers", type=int, required=True, metavar="N", help="processes on each machine")
    add("--nodes", type=int, default=1, metavar="M", help="machines (default 1)")
    add("--node-rank", type=int, default=0, metavar="R", help="number of this one (default 0)")
    add("--master", metavar="A", help="address of machine 0 (default 127.0.0.1)")
    add("--port", type=int, default=8118, metavar="P", help="of its scheduler (default 8118)")
    add("--log-dir", type=Path, default=Path("runs/logs"), metavar="D", help="default runs/logs")
    add("--print", action="store_true", dest="print_only", help="show msrun's command and end")
    add(
        "--step-limit",
        type=float,
        metavar="S",
        help="seconds after which a step counts as stuck (default: ten times the longest so far, "
        "at least 30)",
    )
    add(
        "--slow-limit",
        type=float,
        default=1800.0,
        metavar="S",
        help="the same for start, compilation, first step and saving (default 1800)",
    )
    add(
        "--join-limit",
        type=int,
        default=600,
        metavar="S",
        help="seconds in which all processes must have found each other (default 600)",
    )
    add("arguments", nargs="*", metavar="-- ARGUMENT", help="see below")
    found = vars(parser.parse_args(arguments))
    for name in ("workers", "nodes"):
        if found[name] < 1:
            parser.error(f"--{name} must be at least 1")
    if not _SHELL_SAFE.fullmatch(str(found["log_dir"])):
        parser.error(
            f"--log-dir {str(found['log_dir'])!a} must consist of letters, digits and ./_@%+=:,- "
            "and not begin with -: msrun hands it to a shell when a job fails"
        )
    if not 0 <= found["node_rank"] < found["nodes"]:
        parser.error(f"--node-rank must be 0 to {found['nodes'] - 1}")
    if found["nodes"] > 1 and found["master"] is None:
        parser.error("--nodes needs --master, the address of machine 0")
    master = found.pop("master") or "127.0.0.1"
    return Options(task=_task(kind, found), master=master, **found)


def _task(kind: str, found: dict[str, Any]) -> Task:
    """Takes out of the flags what belongs to the task."""
    arguments = tuple(found.pop("arguments"))
    if kind == "train":
        return TrainTask(found.pop("config"), arguments)
    dp, mp, pp, ep = (found.pop(name) for name in ("dp", "mp", "pp", "ep"))
    return ReadTask("align" if found.pop("align") else "generate", (dp, mp, pp, ep), arguments)
