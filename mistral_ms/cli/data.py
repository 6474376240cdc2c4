"""``data``: texts and conversations to packed MindRecord."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mistral_ms.enums import StrEnum


class Shape(StrEnum):
    """The shapes of :mod:`mistral_ms.datasets.shapes`."""

    TEXT = "text"
    MESSAGES = "messages"
    SHAREGPT = "sharegpt"
    ALPACA = "alpaca"


class Boundaries(StrEnum):
    """What happens in a sequence where one document ends and the next begins."""

    LOSS = "loss"
    ATTENTION = "attention"
    IGNORE = "ignore"


def data(
    inputs: Annotated[
        list[Path],
        typer.Argument(
            metavar="INPUT...",
            help="txt files, one document each, and jsonl files, a text or conversation a line.",
            show_default=False,
        ),
    ],
    tokenizer: Annotated[
        str,
        typer.Option(
            help="A tokenizer file, the directory of a model or checkpoint, or packaged-v1, -v2, "
            "-v3 or -v7: Mistral's own, installed with mistral_ms."
        ),
    ],
    seq_length: Annotated[int, typer.Option(help="Tokens that the model sees at a time.")],
    output: Annotated[Path, typer.Option(help="Directory to write; appears when it is whole.")],
    boundaries: Annotated[
        Boundaries,
        typer.Option(
            help="Where documents meet: loss does not count the first prediction across, attention "
            "also restarts positions and numbers the documents, ignore does nothing."
        ),
    ] = Boundaries.LOSS,
    split_lines: Annotated[
        bool, typer.Option("--split-lines", help="Each line of a txt file is a document.")
    ] = False,
    bos: Annotated[
        bool | None,
        typer.Option("--bos/--no-bos", help="Begin each text with BOS. Default: as trained."),
    ] = None,
    eos: Annotated[bool, typer.Option(help="End each text with EOS.")] = True,
    shape: Annotated[
        Shape | None,
        typer.Option(
            "--format", help="What each line of a jsonl file must be. Default: seen by its keys."
        ),
    ] = None,
    chat_template: Annotated[
        str | None,
        typer.Option(
            help="Conversations by this Jinja file, or mistral for Mistral's own formats. "
            "Default: the tokenizer's template.",
            show_default=False,
        ),
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Count bad documents instead of stopping.")
    ] = False,
    drop_last: Annotated[
        bool, typer.Option("--drop-last", help="Drop the last sequence if not full; else pad it.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a dataset that is at OUTPUT.")
    ] = False,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write the result to this file as JSON.")
    ] = None,
) -> None:
    """Pack txt and jsonl into MindRecord for training; of conversations, only answers count."""
    import time

    from rich.console import Console

    from mistral_ms.cli.output import byte_progress, size_text, write_json
    from mistral_ms.config import DataConfig
    from mistral_ms.config.base import validate
    from mistral_ms.datasets import build_dataset
    from mistral_ms.tokenizer import find_tokenizer

    values = {
        "seq_length": seq_length,
        "boundaries": boundaries.value,
        "add_bos": bos,
        "add_eos": eos,
        "split_lines": split_lines,
        "skip_bad": skip_bad,
        "drop_last": drop_last,
        "format": None if shape is None else shape.value,
        "chat_template": chat_template,
    }
    config = validate(DataConfig, values, "data")
    console = Console()
    start = time.monotonic()
    with byte_progress(console, "packing") as progress:
        result = build_dataset(
            inputs,
            find_tokenizer(tokenizer),
            config,
            output,
            overwrite=overwrite,
            progress=progress,
        )
    seconds = time.monotonic() - start
    counts, files = result.info.counts, result.info.files
    nbytes = sum(file.size for file in files)
    end = f"{counts.dropped} tokens dropped" if drop_last else f"{counts.padded} places padded"
    lines = [f"note: {note}" for note in result.notes]
    lines += [
        f"{counts.documents} documents, {counts.tokens} tokens -> "
        f"{counts.sequences} sequences of {seq_length} in {output}",
        f"{counts.predicted} tokens are predicted; last sequence: {end}",
    ]
    if counts.silent_sequences:
        lines.append(f"left out {counts.silent_sequences} sequences in which nothing is predicted")
    for reason, number in counts.skipped.items():
        first = result.first_errors[reason]
        lines.append(f"skipped {number} documents, {reason}; the first: {first.where}")
    lines.append(
        f"vocabulary of {result.info.vocabulary.vocab_size}, boundaries by {config.boundaries}, "
        f"{size_text(nbytes)} in {seconds:.1f} s"
    )
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)
    if json is not None:
        write_json(
            json,
            {
                "output": str(output),
                **counts.model_dump(),
                "seq_length": seq_length,
                "boundaries": config.boundaries,
                "vocab_size": result.info.vocabulary.vocab_size,
                "tokenizer_sha256": result.info.vocabulary.sha256,
                "files": len(files),
                "bytes": nbytes,
                "seconds": seconds,
            },
        )
