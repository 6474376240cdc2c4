"""``bench``: how fast this is, beside others in the same run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

NAMES = (
    "moe", "train", "prefill", "decode", "convert", "alltoall", "offload", "startup", "operators",
    "layouts", "all",
)  # fmt: skip


def bench(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(NAMES)}.")],
    json: Annotated[
        Path | None, typer.Option("--json", help="Write the result to this file as JSON.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Write NAME.json for each benchmark into this directory.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often every side is measured.")] = 5,
    small: Annotated[
        bool, typer.Option("--small", help="The smallest form: does it run here?")
    ] = False,
) -> None:
    """Measure speed against other programs, which run in turns; outputs are compared first."""
    import os
    import subprocess
    import sys

    import mistral_ms
    from mistral_ms.errors import ConfigError

    root = Path(mistral_ms.__file__).parents[1]
    if not (root / "benchmarks" / "__main__.py").is_file():
        raise ConfigError(
            "no benchmarks here",
            where="bench",
            value=root,
            rule="they are not part of the installed package",
            todo="run python run_mixtral.py bench in a checkout of the repository, with the "
            'extras "align" and "mindformers" installed',
        )
    command = [sys.executable, "-m", "benchmarks", name, "--rounds", str(rounds)]
    for option, path in (("--json", json), ("--output", output)):
        command += [] if path is None else [option, str(path)]
    command += ["--small"] if small else []
    paths = filter(None, (str(root), os.environ.get("PYTHONPATH")))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    raise typer.Exit(subprocess.run(command, env=environment, check=False).returncode)
