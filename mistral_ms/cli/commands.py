"""The list of commands: module name to function; heavy imports stay inside the functions."""

from __future__ import annotations

import typer


def register(app: typer.Typer) -> None:
    """Adds every command to ``app``."""
    from mistral_ms.cli.align import align
    from mistral_ms.cli.bench import bench
    from mistral_ms.cli.convert import convert
    from mistral_ms.cli.data import data
    from mistral_ms.cli.demo import demo
    from mistral_ms.cli.dryrun import dryrun
    from mistral_ms.cli.evaluate import evaluate
    from mistral_ms.cli.experts import experts
    from mistral_ms.cli.extract import extract
    from mistral_ms.cli.generate import generate
    from mistral_ms.cli.inspect import inspect
    from mistral_ms.cli.moe_lab import moe_lab
    from mistral_ms.cli.plan import plan
    from mistral_ms.cli.serve import serve
    from mistral_ms.cli.train import train

    app.command("demo")(demo)
    app.command("convert")(convert)
    app.command("align")(align)
    app.command("generate")(generate)
    app.command("serve")(serve)
    app.command("inspect")(inspect)
    app.command("data")(data)
    app.command("train")(train)
    app.command("evaluate")(evaluate)
    app.command("experts")(experts)
    app.command("extract")(extract)
    app.command("moe-lab")(moe_lab)
    app.command("dryrun")(dryrun)
    app.command("plan")(plan)
    app.command("bench")(bench)
