"""``evaluate``: how well a checkpoint predicts a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mistral_ms.cli.opening import Adapter, FollowLinks, JsonResult, NoVerify, SourceFormat


def evaluate(
    checkpoint: Annotated[
        Path, typer.Argument(metavar="CKPT", help="A checkpoint of any known format.")
    ],
    data: Annotated[Path, typer.Option(help="A dataset, written by the data command.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at a time.")] = 8,
    source: Annotated[
        SourceFormat | None, typer.Option("--from", help="Format to read, when CKPT holds several.")
    ] = None,
    adapter: Adapter = None,
    no_verify: NoVerify = False,
    follow_links: FollowLinks = False,
    json: JsonResult = None,
) -> None:
    """Measure perplexity and accuracy of a checkpoint on a dataset.

    Dropless, unless its training has routing.eval_capacity_factor.
    """
    from dataclasses import asdict

    from rich.console import Console

    from mistral_ms.cli.output import count_progress, write_json
    from mistral_ms.datasets import MindRecordSequences
    from mistral_ms.training.evaluate import evaluate, load_for_evaluation

    console = Console(highlight=False, soft_wrap=True)
    sequences = MindRecordSequences(data, 1, 0)
    model = load_for_evaluation(
        checkpoint,
        sequences,
        source,
        adapter=adapter,
        verify=not no_verify,
        follow_links=follow_links,
    )
    with count_progress(console, "evaluating", "sequences") as progress:
        result = evaluate(model, sequences, batch_size, progress)
    console.print(
        f"perplexity {result.perplexity:.4f}  (loss {result.loss:.4f} nats a token)\n"
        f"accuracy   {100 * result.accuracy:.2f} % of {result.tokens} predicted tokens in "
        f"{result.sequences} sequences; {result.seconds:.1f} s, {result.tokens_per_s:.0f} tokens/s"
    )
    if json is not None:
        write_json(json, {"checkpoint": str(checkpoint), "data": str(data), **asdict(result)})
