"""Accepts mistral_ms on a machine with NPUs; `--small` does the same in small on any machine.

Six steps, all of them commands of this repository: the logits of Hugging Face, experts on all
cards, hierarchical all-to-all, the optimizer in host memory, the auto-parallel graph, the first
steps of the 32-card run.
Each says what is run and what must be seen, and ends in PASS or FAIL with its numbers; see
docs/acceptance.md.

Exit code: 0 all passed, 1 some did not, 2 bad input.
"""

from __future__ import annotations

import argparse
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from acceptance_steps import CARDS, NAMES, ROOT, Options, Run, Step, Verdict, chosen, make_steps

TOLERANCE = 1e-5
"""Sums of float32 in another order; 1e-7 was measured between CPU processes, on an NPU nothing."""


def parse(arguments: Sequence[str] | None) -> tuple[Options, list[str], bool]:
    """The options, the names of the wanted steps, and whether to print commands only."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--small", action="store_true", help="small models that it trains itself, on any machine")
    add("--print", action="store_true", dest="print_only", help="show the commands and end")
    add("--only", action="append", default=[], choices=NAMES, help="this step; may be repeated")
    add("--hf", type=Path, metavar="DIR", help="align: a Hugging Face model that fits one card")
    add("--data", type=Path, metavar="DIR", help="cards32: what `data --seq-length 4096` wrote")
    add("--master", metavar="A", help="cards32: address of machine 0")
    add("--node-rank", type=int, default=0, choices=range(4), metavar="R", help="cards32: 0 to 3")
    add("--workers", type=int, choices=(2, 4, 8), help="processes here (8; 4 when small)")
    add("--output", type=Path, default=Path("runs/acceptance"), metavar="DIR", help="%(default)s")
    add("--port", type=int, metavar="P", help="of the schedulers (8118; a free one when small)")
    add("--tolerance", type=float, default=TOLERANCE, metavar="T", help="of losses (%(default)s)")
    add("--align-tolerance", type=float, metavar="T", help="of logits (that of `align`)")
    found = vars(parser.parse_args(arguments))
    names, print_only = found.pop("only"), found.pop("print_only")
    wanted = set(names or NAMES)
    if not found["small"]:
        for step, flags in {"align": ("hf",), "cards32": ("data", "master")}.items():
            for flag in flags:
                if step in wanted and found[flag] is None:
                    parser.error(f"step {step} needs --{flag}: give it, or choose others (--only)")
        if found["node_rank"] > 0 and wanted != {"cards32"}:
            parser.error("--node-rank is for --only cards32: the other steps are of machine 0")
        if wanted & {"cards32"} and found["workers"] not in (None, CARDS):
            parser.error(f"step cards32 has {CARDS} cards on each machine: leave --workers out")
    workers = found.pop("workers") or (4 if found["small"] else CARDS)
    if found["port"] is None:
        found["port"] = free_port() if found["small"] else 8118
    for path in ("output", "hf", "data"):
        if found[path] is not None:
            found[path] = found[path].absolute()
    return Options(**found, workers=workers), names, print_only


def free_port() -> int:
    """Of this machine, for now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Runner:
    """Runs every command once, whatever steps want it."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self._codes: dict[str, int] = {}

    def log(self, run: Run) -> Path:
        """Everything that it says."""
        machine = f"-machine{self.options.node_rank}" if self.options.node_rank else ""
        return self.options.output / f"{run.name}{machine}.log"

    def accept(self, step: Step, npu: bool) -> Verdict:
        """Runs what is missing, and judges."""
        from mistral_ms.errors import MistralMsError

        for run in step.runs:
            if run.name not in self._codes:
                self._codes[run.name] = self._execute(run)
            if code := self._codes[run.name]:
                return Verdict(False, f"{run.name} ended with exit code {code}: {self.log(run)}")
        try:
            return step.judge(npu)
        except (MistralMsError, OSError, ValueError, KeyError) as error:
            return Verdict(False, f"{type(error).__name__}: {error}")

    def _execute(self, run: Run) -> int:
        print(f"  $ {shlex.join(run.line)}", flush=True)
        begun = time.monotonic()
        with self.log(run).open("wb") as log:
            code = subprocess.run(
                run.line, env=self._environment(), stdout=log, stderr=subprocess.STDOUT, check=False
            ).returncode
        print(f"    exit code {code} after {time.monotonic() - begun:.0f} s: {self.log(run)}")
        if code:
            text = self.log(run).read_text(encoding="utf-8", errors="replace")
            print("".join(f"    | {line}\n" for line in text.splitlines()[-15:]), end="")
        return code

    def _environment(self) -> dict[str, str]:
        """This Python, this package; reductions in one order, and on a CPU no more threads than
        the small form has work for.
        """
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        return {
            "GLOG_v": "3",
            "HCCL_DETERMINISTIC": "true",
            **({"OMP_NUM_THREADS": "1"} if self.options.small else {}),
            **os.environ,
            "PYTHON": sys.executable,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        }


def has_npu() -> bool:
    """Is there one?"""
    os.environ.setdefault("GLOG_v", "3")  # that there is none is no warning here
    import mindspore as ms

    return bool(ms.device_context.ascend.is_available())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the steps; see the module."""
    options, names, print_only = parse(arguments)
    steps = chosen(make_steps(options), names)
    if print_only:
        show(steps)
        return 0
    runner = Runner(options)
    for run in (run for step in steps for run in step.runs):
        # what other machines have begun already is not in the way
        used = [runner.log(run), *([] if options.node_rank else [options.output / run.name])]
        if any(path.exists() for path in used):
            text = f"error: {options.output} has a run {run.name}: choose another --output"
            print(text, file=sys.stderr)
            return 2
    options.output.mkdir(parents=True, exist_ok=True)
    npu = has_npu()
    device = "on an NPU" if npu else "on a CPU; no NPU took part"
    verdicts: dict[str, Verdict] = {}
    for step in steps:
        print(f"{step.name}: {step.what}\n  must be seen: {step.must}", flush=True)
        verdicts[step.name] = runner.accept(step, npu)
        print(f"  {sentence(verdicts[step.name])}\n", flush=True)
    for name, verdict in verdicts.items():
        print(f"{name:12} {sentence(verdict)}")
    passed = sum(verdict.passed for verdict in verdicts.values())
    print(f"{passed} of {len(verdicts)} steps passed {device}; logs: {options.output}")
    return 0 if passed == len(verdicts) else 1


def show(steps: Sequence[Step]) -> None:
    """The commands, each once."""
    seen: set[str] = set()
    for step in steps:
        print(f"# {step.name}: {step.what}\n# must be seen: {step.must}")
        for run in step.runs:
            print(f"# {run.name}: as above" if run.name in seen else shlex.join(run.line))
            seen.add(run.name)


def sentence(verdict: Verdict) -> str:
    """PASS or FAIL, and why."""
    return f"{'PASS' if verdict.passed else 'FAIL'} {verdict.found}"


if __name__ == "__main__":
    sys.exit(main())
