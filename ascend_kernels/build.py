"""The command that builds the operators; the script and setup.py both end here."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ascend_kernels.build_npu import SOCS, build_npu
from ascend_kernels.build_twin import INSTALLED, TWIN_LIBRARY, build_twin
from mistral_ms.errors import MistralMsError

TARGETS = ("npu", "twin")


def parser() -> argparse.ArgumentParser:
    """The flags of the command."""
    flags = argparse.ArgumentParser(
        prog="scripts/build_kernels.sh",
        description="Builds the AscendC operators: for NPUs (needs CANN and MindSpore), or on the "
        "CPU twin (needs g++), which runs the same sources on a CPU and checks them.",
    )
    flags.add_argument("--target", choices=TARGETS, required=True)
    flags.add_argument(
        "--soc-version", help=f"npu: {' or '.join(SOCS)}; asked of npu-smi when not given"
    )
    flags.add_argument("--cann-path", type=Path, help="npu: CANN's toolkit, where it is unusual")
    flags.add_argument("--install-path", type=Path, help="npu: where to install the package")
    flags.add_argument("--output", type=Path, help="twin: the library to write")
    flags.add_argument("--strict", action="store_true", help="twin: warnings are errors")
    return flags


def main(arguments: Sequence[str] | None = None) -> int:
    """Builds; 0 done, 2 something is missing or wrong (one line on stderr says what)."""
    given = parser().parse_args(arguments)
    try:
        if given.target == "twin":
            library = build_twin(given.output or INSTALLED / TWIN_LIBRARY, strict=given.strict)
            print(f"built {library}")
        else:
            package = build_npu(
                soc_version=given.soc_version, cann=given.cann_path, install=given.install_path
            )
            print(f"installed {package}")
            print(f"before a run: source {package / 'bin' / 'set_env.bash'}")
    except MistralMsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
