"""``convert``: any known checkpoint to any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mistral_ms.cli.opening import FollowLinks, JsonResult, NoVerify, Overwrite, SourceFormat
from mistral_ms.enums import StrEnum

if TYPE_CHECKING:
    from mistral_ms.checkpoint import ConvertResult
    from mistral_ms.config import MoEArchitecture
    from mistral_ms.config.quantization import Quantization


class TargetFormat(StrEnum):
    """What can be written."""

    MINDSPORE = "mindspore"
    HF = "hf"
    MISTRAL = "mistral"
    MINDFORMERS = "mindformers"
    PEFT = "peft"
    PEFT_FUSED = "peft-fused"


class Layout(StrEnum):
    """How MindFormers' classes hold the experts."""

    FUSED = "fused"
    GMM = "gmm"
    GRAPH = "graph"


class Container(StrEnum):
    """The files of MindFormers."""

    SAFETENSORS = "safetensors"
    CKPT = "ckpt"


class DType(StrEnum):
    """What the weights are stored in."""

    KEEP = "keep"
    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"


class Quantize(StrEnum):
    """What the experts' weights are quantised to."""

    INT8 = "int8"
    INT4 = "int4"


def convert(
    src: Annotated[
        Path, typer.Argument(help="Directory of the checkpoint to read, or a file of MindFormers.")
    ],
    dst: Annotated[Path, typer.Argument(help="Directory to write; appears when it is whole.")],
    to: Annotated[
        TargetFormat | None,
        typer.Option(
            help="Format to write. Default: mindspore from the others, hf from ours; peft of "
            "adapters that a training has saved (peft-fused for transformers 5)."
        ),
    ] = None,
    source: Annotated[
        SourceFormat | None,
        typer.Option("--from", help="Format to read, when SRC holds several."),
    ] = None,
    layout: Annotated[
        Layout | None,
        typer.Option(
            help="Experts, to mindformers: fused for training (default), gmm for use_past, "
            "graph for our models there in several processes."
        ),
    ] = None,
    container: Annotated[
        Container | None,
        typer.Option(help="Files, to mindformers: safetensors (default), or one ckpt."),
    ] = None,
    strategy: Annotated[
        Path | None,
        typer.Option(help="SRC holds parts of many ranks of MindFormers: their strategy files."),
    ] = None,
    dtype: Annotated[
        DType, typer.Option(help="Store weights in this; keep leaves every bit.")
    ] = DType.KEEP,
    overwrite: Overwrite = False,
    merge: Annotated[
        Path | None,
        typer.Option(
            help="Directory of an adapter of SRC (PEFT's, or of a training here): write the "
            "weights with it."
        ),
    ] = None,
    upcycle_experts: Annotated[
        int | None,
        typer.Option(
            min=1, help="Make a dense model sparse: so many copies of each feed-forward as experts."
        ),
    ] = None,
    upcycle_top_k: Annotated[
        int | None,
        typer.Option(min=1, help="With --upcycle-experts: experts of each token. Default: 2."),
    ] = None,
    quantize: Annotated[
        Quantize | None,
        typer.Option(
            help="Store the experts' weights in int8, a scale for each output channel, or in int4, "
            "one for each group of inputs (mindspore)."
        ),
    ] = None,
    quantize_group: Annotated[
        int | None,
        typer.Option(min=2, help="With --quantize int4: inputs that share a scale. Default: 128."),
    ] = None,
    no_verify: NoVerify = False,
    follow_links: FollowLinks = False,
    run: Annotated[
        Path | None,
        typer.Option(help="Write a file for every rank of this run file's layout (mindspore)."),
    ] = None,
    json: JsonResult = None,
) -> None:
    """Convert between Hugging Face, Mistral, MindFormers and mistral_ms, in constant memory."""
    from dataclasses import asdict

    from rich.console import Console

    from mistral_ms import checkpoint
    from mistral_ms.cli.output import byte_progress, size_text, write_json

    console = Console()

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    moe = _upcycling(upcycle_experts, upcycle_top_k, run)
    quantization = _quantization(quantize, quantize_group)
    if run is not None:
        _no_choice(layout, container, strategy, merge, quantize)
        opening = {"kind": source, "verify": not no_verify, "follow_links": follow_links}
        result = _presplit(src, dst, to, dtype, overwrite, run, say, opening)
    else:
        with byte_progress(console, "converting") as progress:
            result = checkpoint.convert(
                src,
                dst,
                to,
                dtype,
                overwrite,
                kind=source,
                layout=None if layout is None else layout.value,
                container=None if container is None else container.value,
                strategy=strategy,
                merge=merge,
                upcycle=moe,
                quantize=quantization,
                verify=not no_verify,
                follow_links=follow_links,
                progress=progress,
                say=say,
            )
    rate = size_text(result.bytes / max(result.seconds, 1e-9))
    files = sorted(path.name for path in dst.iterdir())
    shown = ", ".join(files[:8]) + (f" and {len(files) - 8} more" if files[8:] else "")
    console.print(
        f"{src} ({result.source_kind}) -> {dst} ({result.target_kind}, dtype {dtype})\n"
        f"{result.tensors} tensors, {size_text(result.bytes)} in {result.seconds:.1f} s "
        f"({rate}/s), peak memory {size_text(result.peak_rss_bytes)}\n"
        f"wrote {shown}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    if (error := result.quantization_error) is not None:
        say(
            f"{quantization}: |W - read| / |W| of a matrix is {error.mean:.3%} on "
            f"average, {error.worst:.3%} at worst ({error.matrix})"
        )
    if json is not None:
        write_json(json, asdict(result))


def _upcycling(experts: int | None, top_k: int | None, run: Path | None) -> MoEArchitecture | None:
    """The sparse layers that a dense model shall get.

    Raises:
        ConfigError: more experts for each token than there are, or options that exclude each other.
    """
    from mistral_ms.config import MoEArchitecture
    from mistral_ms.config.base import validate
    from mistral_ms.errors import ConfigError

    if experts is None:
        if top_k is not None:
            rule = "it says how many of the experts of --upcycle-experts each token visits"
            raise ConfigError("option alone", where="--upcycle-top-k", value=top_k, rule=rule)
        return None
    if run is not None:
        raise ConfigError(
            "two options that exclude each other",
            where="--upcycle-experts",
            value=experts,
            rule="--run cuts a checkpoint up as it is",
            todo="convert with --upcycle-experts first, then with --run",
        )
    chosen = min(2, experts) if top_k is None else top_k
    values = {"num_local_experts": experts, "num_experts_per_tok": chosen}
    return validate(MoEArchitecture, values, "--upcycle-experts")


def _quantization(weights: Quantize | None, group: int | None) -> Quantization | None:
    """How the experts are quantised.

    Raises:
        ConfigError: a group that is none, or alone.
    """
    from mistral_ms.config.base import validate
    from mistral_ms.config.quantization import GROUP_SIZE, Quantization
    from mistral_ms.errors import ConfigError

    if weights is None:
        if group is not None:
            rule = "it says how many inputs share a scale with --quantize int4"
            raise ConfigError("option alone", where="--quantize-group", value=group, rule=rule)
        return None
    if weights == Quantize.INT4 and group is None:
        group = GROUP_SIZE
    values = {"weights": weights.value, "group_size": group}
    return validate(Quantization, values, "--quantize")


def _no_choice(
    layout: Layout | None,
    container: Container | None,
    strategy: Path | None,
    merge: Path | None,
    quantize: Quantize | None,
) -> None:
    """What is cut up for ranks is ours.

    Raises:
        ConfigError: an option of another format.
    """
    from mistral_ms.errors import ConfigError

    for option, value in (("--layout", layout), ("--container", container)):
        if value is not None:
            rule = "only --to mindformers has one, and --run writes our own format"
            raise ConfigError(f"no choice of {option[2:]}", where=option, value=value, rule=rule)
    for option, path in (("--strategy", strategy), ("--merge", merge)):
        if path is not None:
            raise ConfigError(
                "two options that exclude each other",
                where=option,
                value=path,
                rule="--run cuts a checkpoint up as it is",
                todo=f"convert with {option} first, then with --run",
            )
    if quantize is not None:
        rule = "a run's parts are for training, which needs the weights"
        raise ConfigError(
            "two options that exclude each other", where="--quantize", value=quantize, rule=rule
        )


def _presplit(
    src: Path,
    dst: Path,
    to: TargetFormat | None,
    dtype: DType,
    overwrite: bool,
    run_file: Path,
    say: Callable[[str], None],
    opening: dict[str, Any],
) -> ConvertResult:
    """Cuts a checkpoint up for a run's layout.

    Raises:
        ConfigError: another target format, or a layout that does not divide the model.
    """
    from mistral_ms.checkpoint import open_checkpoint, presplit
    from mistral_ms.config import load_run_config
    from mistral_ms.errors import ConfigError
    from mistral_ms.parallel.pipeline import held_specs, stages_of
    from mistral_ms.parallel.topology import Topology, written_parts
    from mistral_ms.weights import specs

    if to not in (None, TargetFormat.MINDSPORE):
        raise ConfigError(
            "only our own format has parts",
            where="--to",
            value=to,
            rule="--run cuts a checkpoint up for the ranks of a run",
            todo="leave --to out",
        )
    parallel = load_run_config(run_file).parallel
    with open_checkpoint(src, **opening) as opened:
        model = opened.config
    parallel.check(model)
    topology, weights = Topology.of(parallel), specs(model)
    parts = stages_of(model, parallel.pp * parallel.pp_interleave_num)
    held = [
        [spec for part in parts[stage :: parallel.pp] for spec in held_specs(part, weights)]
        for stage in range(parallel.pp)
    ]
    ranks = [
        written_parts(held[coords.pp], topology, coords.rank) for coords in topology.all_coords
    ]
    layout = str(parallel.sizes)
    return presplit(src, dst, ranks, layout, dtype, overwrite, say=say, **opening)
