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
    baseline: Annotated[
        Path | None,
        typer.Option(
            help="Another checkpoint to measure on the same data, such as the one that CKPT was "
            "quantised from."
        ),
    ] = None,
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
    from mistral_ms.training.evaluate import Evaluation, evaluate, load_for_evaluation

    console = Console(highlight=False, soft_wrap=True)
    sequences = MindRecordSequences(data, 1, 0)

    def measured(path: Path, kind: SourceFormat | None, with_adapter: Path | None) -> Evaluation:
        model = load_for_evaluation(
            path,
            sequences,
            kind,
            adapter=with_adapter,
            verify=not no_verify,
            follow_links=follow_links,
            say=lambda line: console.print(line, markup=False, style="dim"),
        )
        with count_progress(console, "evaluating", "sequences") as progress:
            return evaluate(model, sequences, batch_size, progress)

    result = measured(checkpoint, source, adapter)
    console.print(
        f"perplexity {result.perplexity:.4f}  (loss {result.loss:.4f} nats a token)\n"
        f"accuracy   {100 * result.accuracy:.2f} % of {result.tokens} predicted tokens in "
        f"{result.sequences} sequences; {result.seconds:.1f} s, {result.tokens_per_s:.0f} tokens/s"
    )
    values = {"checkpoint": str(checkpoint), "data": str(data), **asdict(result)}
    if baseline is not None:
        other = measured(baseline, None, None)
        console.print(
            f"baseline   {other.perplexity:.4f}  (loss {other.loss:.4f}), accuracy "
            f"{100 * other.accuracy:.2f} %: {baseline}\n"
            f"difference {result.perplexity - other.perplexity:+.4f} in perplexity "
            f"({result.perplexity / other.perplexity - 1:+.3%}), "
            f"{result.loss - other.loss:+.5f} nats a token"
        )
        values["baseline"] = {"checkpoint": str(baseline), **asdict(other)}
    if json is not None:
        write_json(json, values)
