"""``python -m mistral_ms.launch train|generate``: checks, then starts and watches.

Exit codes as everywhere.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence

from mistral_ms import signals

KINDS = "train", "generate"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the launcher; the exit code: 0 done, 1 a rank failed, 2 bad input, 128 + a signal."""
    # not before the signals are caught
    from mistral_ms.config import when_unknown
    from mistral_ms.launch.checks import check_all, check_run
    from mistral_ms.launch.command import msrun_command
    from mistral_ms.launch.options import parse
    from mistral_ms.launch.supervise import Supervisor
    from mistral_ms.shipped import import_shipped

    when_unknown(import_shipped)
    kind, *flags = (sys.argv[1:] if arguments is None else arguments) or [""]
    if kind not in KINDS:
        print(f"error: {kind!r} is not one of {', '.join(KINDS)}", file=sys.stderr)
        return 2
    options = parse(flags, kind)
    findings = list(check_run(options)) if options.print_only else check_all(options, os.environ)
    for finding in findings:
        print(f"{'error' if finding.fatal else 'note'}: {finding.message}", file=sys.stderr)
    if any(finding.fatal for finding in findings):
        return 2
    if options.print_only:
        print(shlex.join(msrun_command(options)))
        return 0
    return Supervisor(options, dict(os.environ)).run()


if __name__ == "__main__":
    signals.run(lambda: sys.exit(main()))
