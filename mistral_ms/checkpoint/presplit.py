"""Any known checkpoint to one of ours in parts, a file for every rank of a layout."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from mistral_ms.checkpoint.converter import ConvertResult, peak_rss_bytes
from mistral_ms.checkpoint.dtypes import FROM_OPTION, TO_CONFIG
from mistral_ms.checkpoint.parts_writer import (
    WEIGHTS,
    Part,
    Stamp,
    begin_parts,
    join_parts,
    write_part,
)
from mistral_ms.checkpoint.source import Source, open_checkpoint
from mistral_ms.checkpoint.target import check_target
from mistral_ms.errors import CheckpointError

TensorSlices = Mapping[str, tuple[slice, ...]]


def presplit(
    src: Path,
    dst: Path,
    ranks: Sequence[TensorSlices],
    layout: str,
    dtype: str = "keep",
    overwrite: bool = False,
    *,
    kind: str | None = None,
    verify: bool = True,
    follow_links: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> ConvertResult:
    """Writes a checkpoint as the ranks of a layout would have written it, one after the other.

    Memory: the largest part of a tensor, in the source's dtype and in the new one.

    Args:
        src: a checkpoint of any known format.
        dst: the new one's directory; it appears when it is whole.
        ranks: for each rank the weights that it writes, one slice for each axis.
        layout: how to call the layout.
        dtype: ``keep``, ``fp32``, ``fp16`` or ``bf16``.
        overwrite: replace a checkpoint that is at ``dst``.
        kind: the source's format, when its directory holds several.
        verify: compare a source of ours with its digests while it is read.
        follow_links: links may lead out of the source; see :func:`open_checkpoint`.
        say: told what of the source's configuration is not carried over.

    Raises:
        BusyError: another process writes to the same target.
        CheckpointError: a bad source or target, a full disk, values that ``dtype`` cannot hold, or
            parts that do not tile the model. Nothing is left of the target then.
    """
    begun = time.perf_counter()
    check_target(dst, overwrite)
    if Path(src).resolve() == Path(dst).resolve():
        raise CheckpointError("source is the target", where=src, todo="choose another target")
    stamp = Stamp(len(ranks), layout, 0)
    with open_checkpoint(src, kind, verify=verify, follow_links=follow_links) as source:
        if remark := source.remark():
            say(remark)
        config, dtype = source.config, source.dtype_option(dtype)
        if dtype in FROM_OPTION:
            config = config.model_copy(update={"torch_dtype": TO_CONFIG[FROM_OPTION[dtype]]})
        files = {path.name: path.read_bytes() for path in source.side_files}
        tensors: dict[str, int] = {}
        with begin_parts(dst, overwrite) as target:
            for rank, tensor_slices in enumerate(ranks):
                parts = list(_parts(source, tensor_slices, dtype))
                write_part(target.directory, rank, stamp, {WEIGHTS: parts})
                for part in parts:
                    tensors[part.name] = tensors.get(part.name, 0) + part.entry().nbytes
            source.verify()  # before the target gets its name
            join_parts(target, stamp, config, files)
        return ConvertResult(
            source_kind=source.kind,
            target_kind="mistral_ms",
            tensors=len(tensors),
            bytes=sum(tensors.values()),
            seconds=time.perf_counter() - begun,
            peak_rss_bytes=peak_rss_bytes(),
            skipped=source.skipped,
        )


def _parts(source: Source, tensor_slices: TensorSlices, dtype: str) -> Iterable[Part]:
    for name, tensor_slice in tensor_slices.items():
        stored = TO_CONFIG[FROM_OPTION[dtype]] if dtype in FROM_OPTION else source.dtype(name)
        read = partial(source.read_slice, name, tensor_slice, stored)
        yield Part(name, source.shape(name), tensor_slice, stored, read)
