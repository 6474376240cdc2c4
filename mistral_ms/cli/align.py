"""``align``: is this the same model as Hugging Face's?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mistral_ms.cli.opening import (
    DTYPES,
    Adapter,
    ComputeDType,
    FollowLinks,
    JsonResult,
    NoVerify,
    SourceFormat,
)
from mistral_ms.cli.processes import DataRanks, Execution, ExpertRanks, Stages, TensorRanks, Way

if TYPE_CHECKING:
    from rich.console import Console

    from mistral_ms.alignment import Comparison


def align(
    hf_dir: Annotated[Path, typer.Argument(help="Directory of the Hugging Face model.")],
    ckpt: Annotated[
        Path | None,
        typer.Argument(help="Checkpoint of any format to compare. Default: HF_DIR itself."),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file with one prompt a line.")] = None,
    ids: Annotated[
        Path | None,
        typer.Option(help="Text file with the token ids of one prompt a line; no tokenizer then."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=0, help="Greedy tokens to compare.")] = 64,
    tolerance: Annotated[
        float, typer.Option(min=0, help="Allowed difference, as a share of the largest logit.")
    ] = 2e-5,
    source: Annotated[
        SourceFormat | None, typer.Option("--from", help="Format to read, when CKPT holds several.")
    ] = None,
    adapter: Adapter = None,
    dtype: Annotated[
        ComputeDType,
        typer.Option(help="Compare in this; on CPU our activations stay fp32 with bf16."),
    ] = ComputeDType.FP32,
    no_verify: NoVerify = False,
    follow_links: FollowLinks = False,
    dp: DataRanks = 1,
    mp: TensorRanks = 1,
    pp: Stages = 1,
    ep: ExpertRanks = 1,
    execution: Way = Execution.AUTO,
    json: JsonResult = None,
) -> None:
    """Run the same prompts through Hugging Face (torch) and here; exit 1 when they part."""
    import mindspore as ms
    from rich.console import Console

    from mistral_ms.alignment import align as run
    from mistral_ms.cli.output import read_ids, read_lines, write_json
    from mistral_ms.cli.processes import heartbeat_of, join_processes
    from mistral_ms.config import layout_from_flags

    if ids is not None and prompts is not None:
        raise typer.BadParameter("give --prompts or --ids, not both")
    parallel_context = join_processes(layout_from_flags(dp, mp, pp, ep, execution.value))
    console = Console(highlight=False, quiet=not parallel_context.is_rank_0)
    if ms.get_context("device_target") == "CPU":
        # operator by operator, waiting for each is several times faster than a busy queue
        ms.runtime.launch_blocking()
    with heartbeat_of(parallel_context):
        result = run(
            hf_dir,
            ckpt,
            prompts=None if prompts is None else read_lines(prompts),
            ids=None if ids is None else read_ids(ids),
            new_tokens=max_new_tokens,
            tolerance=tolerance,
            kind=source,
            verify=not no_verify,
            follow_links=follow_links,
            say=console.print,
            parallel_context=parallel_context,
            adapter=adapter,
            dtype=DTYPES[dtype.value],
        )
        parallel_context.barrier()
    if result is None:  # the first process speaks
        return
    if json is not None:
        write_json(json, result.to_json())
    _report(console, result, DTYPES[dtype.value])
    if result.failures:
        raise typer.Exit(1)


def _report(console: Console, result: Comparison, dtype: str) -> None:
    from rich.table import Table

    table = Table("measure", "value", title="alignment with Hugging Face")
    for name, value in result.to_json().items():
        table.add_row(name, f"{value:.3g}" if isinstance(value, float) else str(value))
    table.add_row("max_abs_diff / largest logit", f"{result.relative:.3g}")
    if result.rounding is not None:
        own = result.rounding
        for name, value in (
            ("max_abs_diff / largest logit", own.relative),
            ("top1_agreement", own.top1_agreement),
            ("routing_agreement", own.routing_agreement),
        ):
            table.add_row(f"Hugging Face in {dtype} and float32: {name}", f"{value:.3g}")
    console.print(table)
    if not result.failures:
        console.print("aligned")
        if not result.greedy_match:  # in float32 this is a failure
            console.print(
                f"greedy_match is not judged in {dtype}: rounding decides between tokens that are "
                "nearly as likely"
            )
        return
    for failure in result.failures:
        console.print(f"not aligned: {failure}", markup=False)
    parting = result.first_parting
    if parting is not None:
        console.print(
            f"the hidden states first part at: {parting.name} (difference "
            f"{parting.difference:.3g}, {parting.relative:.3g} of the largest value there)"
        )
