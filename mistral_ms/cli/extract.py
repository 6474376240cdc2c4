"""``extract``: the model of one domain of random routed experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mistral_ms.cli.opening import FollowLinks, JsonResult, NoVerify, Overwrite


def extract(
    src: Annotated[Path, typer.Argument(help="Checkpoint whose model.moe.gate is random_routed.")],
    dst: Annotated[Path, typer.Argument(help="Directory to write; appears when it is whole.")],
    domain: Annotated[int, typer.Option(help="Which domain, from 0 on.")],
    overwrite: Overwrite = False,
    no_verify: NoVerify = False,
    follow_links: FollowLinks = False,
    json: JsonResult = None,
) -> None:
    """Extract the model of one domain; on that domain it computes what the whole one does."""
    from dataclasses import asdict

    from rich.console import Console

    from mistral_ms.checkpoint import open_checkpoint
    from mistral_ms.cli.output import byte_progress, size_text, write_json
    from mistral_ms.mixtures.domains import extract_domain

    console = Console()
    with (
        byte_progress(console, "extracting") as progress,
        open_checkpoint(src, verify=not no_verify, follow_links=follow_links) as source,
    ):
        if remark := source.remark():
            console.print(remark, markup=False, highlight=False, soft_wrap=True)
        result = extract_domain(source, dst, domain, overwrite=overwrite, progress=progress)
    kind = f"{result.experts} experts a layer" if result.experts else "dense"
    console.print(
        f"{src} -> {dst}: domain {domain}, {kind}, {size_text(result.bytes)} of "
        f"{size_text(result.source_bytes)} ({result.ratio:.1%})",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    if json is not None:
        write_json(json, {**asdict(result), "ratio": result.ratio})
