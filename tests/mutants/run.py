"""Plants each defect of ``table.py`` in a copy of the package and runs the tests that must notice.

    python tests/mutants/run.py [WORD ...]     only mutants whose name has one of the words

One process imports what all need and forks for each mutant, so that a mutant costs its tests only.
A mutant counts as killed when a test fails; an error before any test has run does not count.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))

from table import MUTANTS, Mutant  # noqa: E402

LIMIT = 300
"""Seconds for the tests of one mutant."""
KILLED, SURVIVED = 1, 0
"""pytest's exit codes for failed tests and for none."""


def copy_of_the_project(target: Path) -> None:
    """What git knows and what lies beside it unignored."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.decode().split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)


def plant(mutant: Mutant, project: Path) -> tuple[Path, str]:
    """Makes the replacement; the file, and what it held before."""
    path = project / "mistral_ms" / mutant.file
    before = path.read_text()
    if before.count(mutant.old) != 1:
        sys.exit(f"error: {mutant.name}: {mutant.old!r} must occur once in {mutant.file}")
    path.write_text(before.replace(mutant.old, mutant.new))
    return path, before


def run_tests(project: Path, tests: list[str], log: Path) -> int:
    """pytest's exit code, in a fork of this process; -1 when it did not end."""
    child = os.fork()
    if child == 0:
        with log.open("w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        os.chdir(project)
        sys.path[:0] = [str(project), str(project / "tests")]
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])
        sys.dont_write_bytecode = True
        import pytest

        flags = ["-q", "-x", "--fast", "-p", "no:cacheprovider"]
        code = pytest.main([*flags, *(f"tests/{name}" for name in tests)])
        os._exit(int(code))
    until = time.monotonic() + LIMIT
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return -1


def main() -> int:
    """0 when every mutant is killed, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("words", nargs="*", metavar="WORD", help="of the names of mutants")
    words = parser.parse_args().words
    chosen = [m for m in MUTANTS if not words or any(word in m.name for word in words)]
    os.environ.setdefault("GLOG_v", "3")
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    import mindspore  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    begun, alive = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="mistral_ms-mutants-") as folder:
        project, log = Path(folder) / "project", Path(folder) / "log.txt"
        copy_of_the_project(project)
        untouched = sorted({test for mutant in chosen for test in mutant.tests})
        if run_tests(project, untouched, log) != SURVIVED:
            print(log.read_text()[-3000:])
            sys.exit("error: the tests fail without any mutant")
        for number, mutant in enumerate(chosen, 1):
            path, before = plant(mutant, project)
            at = time.monotonic()
            code = run_tests(project, list(mutant.tests), log)
            path.write_text(before)
            said = {KILLED: "killed", SURVIVED: "ALIVE"}.get(code, f"NO VERDICT (exit code {code})")
            if code != KILLED:
                alive.append(mutant)
            seconds = time.monotonic() - at
            print(
                f"{number:3} of {len(chosen)}  {said:8} {seconds:5.1f} s  "
                f"{mutant.file}: {mutant.name}",
                flush=True,
            )
            if code not in (KILLED, SURVIVED):
                print(log.read_text()[-2000:])
    killed = len(chosen) - len(alive)
    print(f"{killed} of {len(chosen)} mutants killed in {time.monotonic() - begun:.0f} s")
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
