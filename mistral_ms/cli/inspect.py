"""``inspect``: what a checkpoint directory is, and whether it is whole."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mistral_ms.cli.opening import FollowLinks, SourceFormat

if TYPE_CHECKING:
    from rich.console import Console

    from mistral_ms.checkpoint import Inspection
    from mistral_ms.config import ModelConfig


def inspect(
    path: Annotated[
        Path, typer.Argument(help="Directory of the checkpoint, or a file of MindFormers.")
    ],
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", help="Read all files: compare checksums, count NaN and infinities."
        ),
    ] = False,
    tensors: Annotated[
        bool, typer.Option("--tensors", help="List every tensor with shape and dtype.")
    ] = False,
    source: Annotated[
        SourceFormat | None,
        typer.Option("--from", help="Format to look at, when PATH holds several."),
    ] = None,
    follow_links: FollowLinks = False,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write the findings to this file as JSON.")
    ] = None,
) -> None:
    """Say what a checkpoint is: format, model, tensors, completeness, checksums."""
    from rich.console import Console

    from mistral_ms import checkpoint
    from mistral_ms.cli.output import byte_progress, write_json

    console = Console()
    with byte_progress(console, "verifying") as progress:
        found = checkpoint.inspect(
            path, verify=verify, kind=source, follow_links=follow_links, progress=progress
        )
    _show(console, found, tensors)
    if json is not None:
        write_json(json, found.as_dict(with_tensors=tensors))
    if not found.ok:
        raise typer.Exit(1)


def _show(console: Console, found: Inspection, with_tensors: bool) -> None:
    """Prints the findings as a table."""
    from rich.table import Table
    from rich.text import Text

    from mistral_ms.checkpoint.buffers import skipped_text
    from mistral_ms.cli.output import size_text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    rows = {"path": str(found.path), "kind": found.kind or "none"}
    if found.config is not None:
        rows["model"] = _model(found.config)
    if found.ignored_keys:
        rows["ignored keys"] = ", ".join(found.ignored_keys)
    if found.tensors:
        dtypes = ", ".join(f"{dtype} {size_text(n)}" for dtype, n in found.dtypes.items())
        rows["tensors"] = f"{len(found.tensors)}, {found.parameters:,} parameters, {dtypes}"
    if found.quantization is not None:
        rows["quantised"] = found.quantization
    if found.skipped:
        rows["skipped"] = skipped_text(found.skipped)
    if found.unapplied:
        rows["not applied"] = f"the adapter {', '.join(found.unapplied)}"
    if found.not_finite:
        rows["not finite"] = "\n".join(
            f"{name}: {nans} NaN, {infinities} infinite"
            for name, (nans, infinities) in found.not_finite.items()
        )
    rows |= {"layout": found.layout, "complete": found.complete, "checksums": found.checksums}
    rows["side files"] = ", ".join(found.side_files) or "none"
    for name, value in rows.items():
        table.add_row(name, Text(value))
    console.print(table)
    if with_tensors:
        for name, info in found.tensors.items():
            line = f"{name}  {list(info.shape)}  {info.dtype}  {info.file.name}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)
    verdict = "sound" if found.ok else f"problem: {found.problem}"
    style = "green" if found.ok else "red"
    console.print(verdict, style=style, markup=False, highlight=False, soft_wrap=True)


def _model(config: ModelConfig) -> str:
    """One line that an engineer recognises the model by."""
    parts = [
        "Mistral (dense)" if config.moe is None else "Mixtral (sparse)",
        f"{config.num_hidden_layers} layers",
        f"hidden {config.hidden_size}",
        f"intermediate {config.intermediate_size}",
        f"heads {config.num_attention_heads}/{config.num_key_value_heads}",
        f"head_dim {config.head_size}",
        f"vocabulary {config.vocab_size}",
    ]
    if config.moe is not None:
        experts, chosen = config.moe.num_local_experts, config.moe.num_experts_per_tok
        gate = "" if config.moe.gate.default else f", gate {config.moe.gate.name}"
        parts.append(f"{experts} experts, top {chosen}{gate}")
        parts += [f"{key} {value}".replace("_", " ") for key, value in config.moe.added]
        if len(config.sparse_layers) != config.num_hidden_layers:
            parts.append(f"sparse layers {list(config.sparse_layers)}")
    if config.sliding_window is not None:
        layers = [i for i in range(config.num_hidden_layers) if config.window_of(i) is not None]
        some = "" if config.layer_types is None else f" in layers {layers}"
        parts.append(f"window {config.sliding_window}{some}")
    if (scaling := config.rope_scaling) is not None:
        longest = config.longest_sequence
        parts.append(f"positions scaled ({scaling.rope_type} {scaling.factor:g}) to {longest}")
    if config.tie_word_embeddings:
        parts.append("tied head")
    return ", ".join(parts)
