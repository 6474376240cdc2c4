"""``python -m fuzz``: many cases with a seed that is printed; exit 1 when one failed."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from fuzz.server import Fuzzer, Result
from fuzz.targets import TARGETS


def main() -> int:
    parser = argparse.ArgumentParser("python -m fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, metavar="N")
    parser.add_argument("--seed", type=int, default=int(time.time()), metavar="S")
    parser.add_argument("--case", type=int, metavar="I", help="one case alone, with all it says")
    parser.add_argument("--only", action="append", default=[], choices=sorted(TARGETS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="fuzz-") as root:
        fuzzer = Fuzzer(options.seed, Path(root), options.only)
        if options.case is not None:
            (result,) = fuzzer.run([options.case])
            print(result.target, result.mutation, result.outcome, result.detail, sep="\n")
            return int(result.failed)
        print(f"{options.cases} cases with --seed {options.seed}", flush=True)
        return report(fuzzer, options.seed, options.cases, options.only)


def report(fuzzer: Fuzzer, seed: int, cases: int, only: list[str]) -> int:
    """Runs all cases; shows each failure once per place, and how to repeat it."""
    counts: Counter[str] = Counter()
    places: Counter[str] = Counter()
    for result in fuzzer.run(range(cases)):
        counts[result.outcome] += 1
        if result.failed:
            place = where(result)
            places[place] += 1
            if places[place] == 1:
                again = " ".join(f"--only {name}" for name in only)
                print(f"\n== {place}\n{result.mutation}\n{result.detail.strip()[-1500:]}")
                print(f"again: python -m fuzz --seed {seed} --case {result.number} {again}")
                sys.stdout.flush()
        if (done := sum(counts.values())) % 1000 == 0:
            print(f"{done} cases: {dict(counts)}", flush=True)
    for place, count in places.most_common():
        print(f"{count:6} {place}")
    print(f"{sum(counts.values())} cases: {dict(counts)}")
    return int(bool(places))


def where(result: Result) -> str:
    """The place in the code, or the reader, that a failure belongs to."""
    lines = [x.strip() for x in result.detail.splitlines() if x.strip().startswith("File ")]
    inner = [x for x in lines if "/mistral_ms/" in x and "/tests/" not in x]
    last = result.detail.strip().splitlines()[-1][:100] if lines else result.target
    return f"{result.outcome}: {(inner or lines or [''])[-1]} {last}"


if __name__ == "__main__":
    sys.exit(main())
