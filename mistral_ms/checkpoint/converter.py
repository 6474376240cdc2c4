"""Any known checkpoint to any other, in constant memory."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from mistral_ms.checkpoint import keys
from mistral_ms.checkpoint.adapters import PEFT, PEFT_FUSED, write_peft
from mistral_ms.checkpoint.config_file import encode_config
from mistral_ms.checkpoint.detect import ALIASES, LAYOUTS, MindFormersLayout, kind_of
from mistral_ms.checkpoint.dtypes import FROM_OPTION, TO_CONFIG
from mistral_ms.checkpoint.files import ADAPTER_MODEL, MINDFORMERS_YAML, PARAM_NAME_MAP
from mistral_ms.checkpoint.layout import format_layout
from mistral_ms.checkpoint.merge_ranks import merged_ranks
from mistral_ms.checkpoint.merged import open_merged
from mistral_ms.checkpoint.mindformers_layout import TABLES
from mistral_ms.checkpoint.plan import make_plan, target_dtype
from mistral_ms.checkpoint.quantizing import QuantizationError, Quantizer
from mistral_ms.checkpoint.safetensors_file import read_header
from mistral_ms.checkpoint.source import Source, open_checkpoint
from mistral_ms.checkpoint.target import TargetDirectory, check_target
from mistral_ms.checkpoint.upcycle import upcycled_config, upcycled_entries
from mistral_ms.checkpoint.writer import (
    MAX_SHARD_BYTES,
    Entry,
    Progress,
    write_ckpt,
    write_tensors,
)
from mistral_ms.config import ModelConfig, MoEArchitecture, encode_yaml
from mistral_ms.config.quantization import Quantization
from mistral_ms.errors import CheckpointError
from mistral_ms.weights import specs


@dataclass(frozen=True)
class ConvertResult:
    """What a conversion did.

    Attributes:
        source_kind: the format that was read.
        target_kind: the format that was written.
        tensors: tensors written.
        skipped: what is in the source's files and no weight.
        bytes: bytes of those tensors.
        seconds: wall time, until everything was on the disk.
        peak_rss_bytes: the process's largest resident size, mapped file pages included.
        quantization_error: of the experts, where they were quantised.
    """

    source_kind: str
    target_kind: str
    tensors: int
    bytes: int
    seconds: float
    peak_rss_bytes: int
    skipped: tuple[str, ...] = ()
    quantization_error: QuantizationError | None = None


@dataclass(frozen=True)
class _Format:
    """How a format is written."""

    table: keys.KeyTable
    stem: str
    single: str | None
    metadata: dict[str, str]
    sharded: bool = True
    index: str | None = None


_FORMATS = {
    "hf": _Format(keys.HF, "model", "model.safetensors", {"format": "pt"}),
    "mistral": _Format(keys.MISTRAL, "consolidated", "consolidated.safetensors", {}, sharded=False),
    "mistral_ms": _Format(keys.OURS, "model", None, {"format": "ms"}),
    "mindformers": _Format(
        keys.MINDFORMERS,
        "mindspore_model",
        "mindspore_model.safetensors",
        {"format": "ms"},
        index=PARAM_NAME_MAP,
    ),
}


def convert(
    src: Path,
    dst: Path,
    to: str | None = None,
    dtype: str = "keep",
    overwrite: bool = False,
    *,
    kind: str | None = None,
    layout: MindFormersLayout | None = None,
    container: Literal["safetensors", "ckpt"] | None = None,
    strategy: Path | None = None,
    verify: bool = True,
    follow_links: bool = False,
    merge: Path | None = None,
    upcycle: MoEArchitecture | None = None,
    seed: int = 0,
    quantize: Quantization | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Progress | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> ConvertResult:
    """Converts a checkpoint.

    Args:
        src: the checkpoint's directory.
        dst: the new checkpoint's directory; it appears when it is whole.
        to: ``mistral_ms`` (or ``mindspore``), ``hf``, ``mistral`` or ``mindformers``; None: ours
            from a foreign format and with ``quantize``, hf from ours. Adapters that a training here
            has saved: ``peft``, or ``peft-fused`` for transformers 5, without other options.
        dtype: ``keep`` leaves every bit, and gives what is quantised the dtype of its
            configuration; ``fp32``, ``fp16`` and ``bf16`` round to nearest even.
        overwrite: replace a checkpoint that is at ``dst``.
        kind: the source's format, when its directory holds several.
        layout: of the experts, to mindformers: ``fused`` (the default) for training and for
            inference without a cache, ``gmm`` for inference with one; ``graph`` for our models in
            several processes under MindFormers' trainer.
        container: of the files, to mindformers: ``safetensors`` (the default) or ``ckpt``.
        strategy: the strategy files of the run of MindFormers whose ranks' parts ``src`` holds; see
            :func:`~mistral_ms.checkpoint.merge_ranks.merged_ranks`.
        verify: compare a source of ours with its digests while it is read.
        follow_links: links may lead out of the source; see :func:`open_merged`.
        merge: the directory of an adapter of the source, of PEFT or of a training here, which the
            weights that are written contain; rounded once, from float32.
        upcycle: sparse layers that a dense model gets, computing the same: see
            :mod:`mistral_ms.checkpoint.upcycle`.
        seed: of what is drawn for them.
        quantize: how the experts' weights are stored, in our own format alone.
        max_shard_bytes: how large a file of weights may grow (mistral and ckpt are always one).
        progress: called with the bytes written and their total.
        say: told what of the source's configuration is not carried over.

    Returns:
        What was done.

    Raises:
        CheckpointError: a bad source or target, a full disk, or values that ``dtype`` cannot hold.
            Nothing is left of the target then, and an old one is as it was; if the very last
            step (sync or rename) made that impossible, the message says what stands.
        ConfigError: the target's format cannot express the model; or ``upcycle`` on a sparse one,
            or with layers that would not compute the same.
    """
    start = time.perf_counter()
    src, dst = Path(src), Path(dst)
    check_target(dst, overwrite)
    if os.path.realpath(src) == os.path.realpath(dst):
        raise CheckpointError("source is the target", where=src, todo="choose another target")
    if to in (PEFT, PEFT_FUSED):
        options: dict[str, object] = {
            "layout": layout,
            "container": container,
            "strategy": strategy,
            "merge": merge,
            "upcycle": upcycle,
            "quantize": quantize,
            "dtype": None if dtype == "keep" else dtype,
        }
        return _adapters_alone(src, dst, to, overwrite, verify, follow_links, options, start)
    with contextlib.ExitStack() as opened:
        if strategy is not None:
            src = opened.enter_context(merged_ranks(src, Path(strategy), dst))
        source = opened.enter_context(
            open_merged(src, kind, adapter=merge, verify=verify, follow_links=follow_links)
        )
        if remark := source.remark():
            say(remark)
        target_kind = _target_kind(source.kind, to, quantize)
        form = _format(target_kind, layout, container)
        config = source.config
        if upcycle is not None:
            if quantize is not None:
                raise CheckpointError(
                    "two options that exclude each other",
                    where="quantize",
                    value=quantize,
                    rule="copies of feed-forwards are written as they are",
                    todo="convert with upcycle first, then with quantize",
                )
            config = upcycled_config(config, upcycle)
        if (chosen := source.dtype_option(dtype)) != dtype:
            say(f"dtype {chosen}, which the configuration names: quantised weights have none")
            dtype = chosen
        if dtype in FROM_OPTION:
            config = config.model_copy(update={"torch_dtype": TO_CONFIG[FROM_OPTION[dtype]]})
        name, values = encode_config(config, target_kind, layout, quantize)
        table = keys.hf_table(values["model_type"]) if target_kind == "hf" else form.table
        quantizer = None if quantize is None else Quantizer(source, quantize, config)
        if upcycle is None:
            entries = _entries(source, config, table, dtype, quantizer)
        else:
            entries = upcycled_entries(source, config, table, dtype, seed)
        ours = target_kind == "mistral_ms"
        with TargetDirectory(dst, overwrite=overwrite, manifest=ours) as target:
            if name == MINDFORMERS_YAML:
                target.write(name, encode_yaml(values))
            else:
                target.write_json(name, values)
            for file in source.side_files:
                target.copy(file)
            if container == "ckpt":
                write_ckpt(target, f"{form.stem}.ckpt", entries, progress)
            else:
                write_tensors(
                    target,
                    entries,
                    stem=form.stem,
                    single=form.single,
                    metadata=form.metadata,
                    index=form.index,
                    max_shard_bytes=max_shard_bytes if form.sharded else 1 << 63,
                    progress=progress,
                )
            source.verify()  # before the target gets its name
        return ConvertResult(
            source_kind=source.kind,
            target_kind=target_kind,
            tensors=len(entries),
            bytes=sum(entry.nbytes for entry in entries),
            seconds=time.perf_counter() - start,
            peak_rss_bytes=peak_rss_bytes(),
            skipped=source.skipped,
            quantization_error=None if quantizer is None else quantizer.error(),
        )


def _adapters_alone(
    src: Path,
    dst: Path,
    to: str,
    overwrite: bool,
    verify: bool,
    follow_links: bool,
    options: Mapping[str, object],
    start: float,
) -> ConvertResult:
    """The adapters that a training has saved, as PEFT writes them."""
    for option, value in options.items():
        if value is not None:
            raise CheckpointError(
                "option of another conversion",
                where=option,
                value=value,
                rule="to peft adapters are written as they are",
            )
    with open_checkpoint(
        src, "mistral_ms", verify=verify, follow_links=follow_links, adapters=True
    ) as source:
        if source.config.lora is None:
            raise CheckpointError(
                "a whole model, not an adapter",
                where=src,
                rule="to peft goes what a training with lora has saved",
            )
        write_peft(source, dst, None, overwrite=overwrite, fused=to == PEFT_FUSED)
        written = read_header(dst / ADAPTER_MODEL).tensors.values()
        size = sum(info.nbytes for info in written)
        seconds = time.perf_counter() - start
        return ConvertResult(source.kind, to, len(written), size, seconds, peak_rss_bytes())


def _target_kind(source_kind: str, to: str | None, quantize: Quantization | None) -> str:
    if quantize is not None:
        if to is not None and kind_of(to) != "mistral_ms":
            raise CheckpointError(
                "no quantised experts in this format",
                where="to",
                value=repr(to),
                rule="they are stored in our own format alone",
                todo="leave it out",
            )
        return "mistral_ms"
    if to is None:
        return "hf" if source_kind == "mistral_ms" else "mistral_ms"
    kind = kind_of(to)
    if kind not in _FORMATS or to in LAYOUTS:  # of a target the layout is said by itself
        raise CheckpointError(
            "format cannot be written",
            where="to",
            value=repr(to),
            rule=f"must be one of {', '.join((*_FORMATS, *ALIASES))}",
        )
    return kind


def _format(kind: str, layout: MindFormersLayout | None, container: str | None) -> _Format:
    """How the target is written.

    Raises:
        CheckpointError: a layout or a container for a format that has but one.
    """
    for option, value in (("layout", layout), ("container", container)):
        if value is not None and kind != "mindformers":
            raise CheckpointError(
                f"no choice of {option}",
                where=option,
                value=repr(value),
                rule=f"only mindformers has one, and the target is {kind}",
                todo="leave it out, or convert to mindformers",
            )
    form = _FORMATS[kind]
    return form if layout is None else replace(form, table=TABLES[layout])


def _entries(
    source: Source,
    config: ModelConfig,
    table: keys.KeyTable,
    dtype: str,
    quantizer: Quantizer | None,
) -> list[Entry]:
    """The tensors to write, checked before the first byte."""
    entries: list[Entry] = []
    buffers = {spec.name for spec in specs(config) if spec.kind == "buffer"}
    for assembly in make_plan(source.layout, format_layout(config, table)):
        if quantizer is not None and assembly.name in quantizer.names:
            entries += quantizer.entries(assembly)
            continue
        # the state of gates (a bias, a table of numbers) keeps its bits, as weights need not
        option = "keep" if assembly.pieces[0].block.name in buffers else dtype
        stored = target_dtype(assembly, source.tensors, option)
        chunks = partial(source.stream, assembly, stored)
        entries.append(Entry(assembly.name, assembly.shape, stored, chunks))
    return entries


def peak_rss_bytes() -> int:
    """The largest resident size of this process so far.

    ``ru_maxrss`` would include what the parent had resident when it forked; the kernel's own
    high-water mark of this address space does not.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return next(
            int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:")
        )
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
