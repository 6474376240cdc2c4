"""The command line: ``python -m benchmarks NAME``, which ``run_mixtral.py bench NAME`` starts."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from benchmarks import harness, report
from benchmarks.suite import SUITE


def main(arguments: list[str] | None = None) -> int:
    """Runs benchmarks and shows their tables.

    Returns:
        The exit code: 0 done, 1 a side failed or computes something else, 2 bad input.
    """
    about = "; ".join(f"{name}: {bench.about}" for name, bench in SUITE.items())
    parser = argparse.ArgumentParser(prog="benchmarks", description=about)
    parser.add_argument("name", choices=[*SUITE, "all"])
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--output", type=Path, help="write NAME.json for each into this directory")
    parser.add_argument("--rounds", type=int, default=harness.ROUNDS)
    parser.add_argument("--small", action="store_true", help="the smallest form: does it run?")
    options = parser.parse_args(arguments)
    if options.json is not None and not options.json.absolute().parent.is_dir():
        parser.error(f"--json {options.json}: there is no such directory")
    names = list(SUITE) if options.name == "all" else [options.name]
    if options.output is not None:
        options.output.mkdir(parents=True, exist_ok=True)
    results, failed = [], []
    for name in names:
        begun = time.monotonic()

        def say(line: str, name: str = name, begun: float = begun) -> None:
            print(f"[{name} {time.monotonic() - begun:4.0f} s] {line}", flush=True)

        try:
            measured = SUITE[name].run(say, options.rounds, options.small)
        except harness.BenchmarkError as error:
            print(f"error: {name}: {error}", file=sys.stderr, flush=True)
            failed.append(name)
            continue
        found = report.result(name, measured, time.monotonic() - begun)
        results.append(found)
        print(f"\n{found['about']}\n\n{report.table(found)}\n", flush=True)
        if options.output is not None:
            _write(options.output / f"{name}.json", found)
    if options.json is not None:
        _write(options.json, results[0] if len(names) == 1 and results else {"results": results})
    taken = ", ".join(f"{each['name']} {each['seconds']:.0f} s" for each in results)
    print(f"{taken or 'nothing'} done{'; failed: ' + ', '.join(failed) if failed else ''}")
    return 1 if failed else 0


def _write(path: Path, values: object) -> None:
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
