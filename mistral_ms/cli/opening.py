"""Options of all commands that open a checkpoint, or write one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mistral_ms.enums import StrEnum


class SourceFormat(StrEnum):
    """What can be read."""

    MINDSPORE = "mindspore"
    HF = "hf"
    MISTRAL = "mistral"
    MISTRAL_DUMP = "mistral-dump"
    MINDFORMERS = "mindformers"
    MINDFORMERS_FUSED = "mindformers-fused"
    MINDFORMERS_GMM = "mindformers-gmm"


class ComputeDType(StrEnum):
    """What weights and activations are computed in."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


DTYPES: Mapping[str, Literal["float32", "float16", "bfloat16"]] = {
    "fp32": "float32", "fp16": "float16", "bf16": "bfloat16",
}  # fmt: skip
ComputeIn = Annotated[
    ComputeDType,
    typer.Option(
        help="Compute in this. On a CPU bf16 rounds the weights alone; activations stay fp32."
    ),
]
ChatTemplate = Annotated[
    str | None,
    typer.Option(
        help="Chat by this Jinja file, or mistral for Mistral's own formats. Default: the "
        "checkpoint's template.",
        show_default=False,
    ),
]
NoVerify = Annotated[
    bool, typer.Option("--no-verify", help="Do not compare a checkpoint of ours with its digests.")
]
FollowLinks = Annotated[
    bool, typer.Option("--follow-links", help="Follow links that lead out of the checkpoint.")
]
Adapter = Annotated[
    Path | None,
    typer.Option(help="Directory of an adapter of the checkpoint, of PEFT or of a training here."),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace a checkpoint that is at DST.")
]
JsonResult = Annotated[
    Path | None, typer.Option("--json", help="Write the result to this file as JSON.")
]


def of_checkpoint(options: Mapping[str, Any]) -> dict[str, Any]:
    """Of an engine's options those with which its checkpoint is opened."""
    return {key: options[key] for key in ("kind", "verify", "follow_links")}
