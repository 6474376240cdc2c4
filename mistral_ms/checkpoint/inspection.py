"""What a directory is: its format, model, tensors, and whether it is whole."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mistral_ms.checkpoint.adapters import PEFT, open_peft_tensors, read_adapter_config
from mistral_ms.checkpoint.config_file import read_config
from mistral_ms.checkpoint.detect import WeightFiles, choose_weights, find_weights
from mistral_ms.checkpoint.dtypes import WEIGHT_DTYPES, count_not_finite, itemsize
from mistral_ms.checkpoint.files import ADAPTER_CONFIG, side_files
from mistral_ms.checkpoint.manifest import FileRecord, read_manifest
from mistral_ms.checkpoint.safetensors_file import TensorInfo
from mistral_ms.checkpoint.source import Source, open_checkpoint
from mistral_ms.checkpoint.stream import CHUNK_BYTES
from mistral_ms.checkpoint.verification import Verification
from mistral_ms.config import ModelConfig
from mistral_ms.errors import CheckpointError, MissingExtraError, MistralMsError
from mistral_ms.reading import is_file
from mistral_ms.weights import EMBEDDING


@dataclass(frozen=True)
class Inspection:
    """The findings.

    Attributes:
        path: the directory.
        kind: the format; None when it is none or not clear which.
        problem: what is wrong; None when the checkpoint is sound.
        config: the model; None when its configuration cannot be read.
        ignored_keys: keys of the configuration file that have no meaning here.
        tensors: shape, dtype and file of every tensor under the format's own name.
        layout: how the weights are spread over files.
        complete: what is known about completeness.
        skipped: names of what is in the files and no weight.
        not_finite: of each tensor with NaNs or infinities their numbers, after ``verify``.
        checksums: ``verified``, ``not verified``, ``none recorded``, or which files differ.
        side_files: names of the tokenizer and generation files.
        unapplied: names of adapters beside the weights, which are not read.
        parameters: number of elements of all weights.
        quantization: how some of them are quantised; None: they are not.
    """

    path: Path
    kind: str | None = None
    problem: str | None = None
    config: ModelConfig | None = None
    ignored_keys: tuple[str, ...] = ()
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    not_finite: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    layout: str = "unknown"
    complete: str = "unknown"
    checksums: str = "none recorded"
    side_files: tuple[str, ...] = ()
    unapplied: tuple[str, ...] = ()
    parameters: int = 0
    quantization: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the checkpoint is sound."""
        return self.problem is None

    @property
    def dtypes(self) -> dict[str, int]:
        """Bytes per dtype."""
        found: dict[str, int] = {}
        for info in self.tensors.values():
            found[info.dtype] = found.get(info.dtype, 0) + info.nbytes
        return found

    def as_dict(self, with_tensors: bool = False) -> dict[str, Any]:
        """The findings as plain data, for JSON."""
        data: dict[str, Any] = {
            "path": str(self.path),
            "kind": self.kind,
            "ok": self.ok,
            "problem": self.problem,
            "config": None if self.config is None else self.config.model_dump(mode="json"),
            "ignored_keys": list(self.ignored_keys),
            "skipped": list(self.skipped),
            "not_finite": {n: {"nan": a, "inf": b} for n, (a, b) in self.not_finite.items()},
            "tensors": len(self.tensors),
            "parameters": self.parameters,
            "bytes": sum(self.dtypes.values()),
            "dtypes": self.dtypes,
            "quantization": self.quantization,
            "layout": self.layout,
            "complete": self.complete,
            "checksums": self.checksums,
            "side_files": list(self.side_files),
            "unapplied": list(self.unapplied),
        }
        if with_tensors:
            data["tensor_list"] = [
                {"name": n, "shape": list(i.shape), "dtype": i.dtype, "file": i.file.name}
                for n, i in self.tensors.items()
            ]
        return data


def inspect(
    path: Path,
    *,
    verify: bool = False,
    kind: str | None = None,
    follow_links: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Looks at a directory; damage is a finding, not an exception.

    Args:
        path: the directory, or a file of MindFormers.
        verify: read every tensor and count what is not a finite number; of a checkpoint of ours
            compare the digests of all files as well.
        kind: which format to look at when there are several.
        follow_links: links may lead out of the directory; see :func:`open_checkpoint`.
        progress: called with the bytes verified and their total.

    Raises:
        CheckpointError: there is no such directory, or no such kind.
        MissingExtraError: the files are pickles, and torch is not installed.
    """
    path = Path(path)
    # a path that is not there is a mistake, not a damaged checkpoint
    if not find_weights(path) and is_file(path / ADAPTER_CONFIG):
        return _adapter(path, follow_links)
    try:
        weights = choose_weights(path, kind)
    except CheckpointError as error:
        return Inspection(path, problem=str(error))
    layout = _describe(weights)
    try:
        wanted = kind or weights.kind  # which may say a layout as well
        with open_checkpoint(
            path, wanted, verify=False, follow_links=follow_links, adapters=True
        ) as source:
            records = read_manifest(path, follow_links) if source.kind == "mistral_ms" else {}
            return _sound(source, records, layout, verify, progress)
    except MissingExtraError:
        raise
    except MistralMsError as error:
        directory = path.parent if is_file(path) else path
        config, ignored = _readable_config(directory, weights.kind)
        return Inspection(
            path,
            kind=weights.kind,
            problem=str(error),
            config=config,
            ignored_keys=ignored,
            layout=layout,
            complete="no",
        )


def _adapter(path: Path, follow_links: bool) -> Inspection:
    """The findings on an adapter of PEFT; whether it fits, only its base model could tell."""
    try:
        lora = read_adapter_config(path)
        with contextlib.closing(open_peft_tensors(path, follow_links)) as store:
            return Inspection(
                path,
                kind=PEFT,
                tensors=dict(store.tensors),
                parameters=sum(info.size for info in store.tensors.values()),
                layout=f"adapters alone: {lora}",
                complete="not known without the base model",
                side_files=tuple(each.name for each in side_files(path, follow_links)),
            )
    except MistralMsError as error:
        return Inspection(path, kind=PEFT, problem=str(error))


def _sound(
    source: Source,
    records: Mapping[str, FileRecord],
    layout: str,
    verify: bool,
    progress: Callable[[int, int], None] | None,
) -> Inspection:
    """The findings on a checkpoint that could be opened."""
    complete, checksums = "every tensor is there", "none recorded"
    not_finite: dict[str, tuple[int, int]] = {}
    problems = []
    if records:
        complete = f"COMPLETE lists {len(records)} files, all there with their sizes"
        checksums = "not verified"
    if verify:
        watch = Verification(source.path, records)
        source.store.observe(watch.see)
        total = sum(record.size for record in records.values())
        total = total or sum(info.nbytes for info in source.tensors.values())
        not_finite = _not_finite(source, total, progress)
        if records:
            different = watch.differing()
            checksums = f"differ: {', '.join(different)}" if different else "verified"
            problems += [_wrong_checksum(source.path, different)] if different else []
        if progress is not None:
            progress(total, total)
    if not_finite:
        problems.append(_broken_numbers(source, not_finite))
    problem = "; ".join(str(each) for each in problems) or None
    return Inspection(
        path=source.path,
        kind=source.kind,
        problem=problem,
        config=source.config,
        ignored_keys=source.ignored_keys,
        tensors=source.stored_tensors(),
        parameters=sum(info.size for info in source.tensors.values()),
        quantization=None if source.quantization is None else str(source.quantization),
        skipped=source.skipped,
        not_finite=not_finite,
        layout=f"{layout}, {_experts(source)}",
        complete=complete,
        checksums=checksums,
        side_files=tuple(path.name for path in source.side_files),
        unapplied=source.unapplied,
    )


def _not_finite(
    source: Source, total: int, progress: Callable[[int, int], None] | None
) -> dict[str, tuple[int, int]]:
    """Reads all tensors in the order of the files; NaNs and infinities of those that have any."""
    counts: dict[str, tuple[int, int]] = {}
    done = 0
    for name, info in source.tensors.items():
        nans = infinities = 0
        step = CHUNK_BYTES // itemsize(info.dtype)
        buffer = np.empty(min(step, info.size), WEIGHT_DTYPES[info.dtype])
        for start in range(0, info.size, step):
            chunk = buffer[: min(step, info.size - start)]
            source.store.read_into(name, start, chunk)
            found = count_not_finite(chunk, info.dtype)
            nans, infinities = nans + found[0], infinities + found[1]
        if nans or infinities:
            counts[name] = (nans, infinities)
        done += info.nbytes
        if progress is not None:
            progress(done, total)
    return counts


def _wrong_checksum(path: Path, names: list[str]) -> CheckpointError:
    return CheckpointError(
        "wrong checksum",
        where=path,
        value=", ".join(names),
        rule="differs from COMPLETE",
        todo="copy the checkpoint again",
    )


def _broken_numbers(source: Source, counts: Mapping[str, tuple[int, int]]) -> CheckpointError:
    name, (nans, infinities) = next(iter(counts.items()))
    others = f", and {len(counts) - 1} more tensors" if len(counts) > 1 else ""
    return CheckpointError(
        "numbers that are not finite",
        where=f"{source.tensors[name].file}: {name}",
        value=f"{nans} NaN and {infinities} infinite of {source.tensors[name].size}{others}",
        rule="every weight is a finite number",
        todo="copy or download the checkpoint again; if it is the same then, it was published so",
    )


def _readable_config(path: Path, kind: str) -> tuple[ModelConfig | None, tuple[str, ...]]:
    try:
        return read_config(path, kind)
    except MistralMsError:
        return None, ()


def _describe(weights: WeightFiles) -> str:
    count = len(weights.files)
    if count and all("-rank-" in path.name for path in weights.files):
        return f"parts of {count} rank{'s' if count != 1 else ''}"
    return f"{count} {weights.container} file{'s' if count != 1 else ''}"


def _experts(source: Source) -> str:
    """How the experts are laid out; of adapters, what they are."""
    if source.config.lora is not None:
        return f"adapters alone: {source.config.lora}"
    if source.config.moe is None:
        return "no experts"
    if any(name.endswith(".gate_up_proj") for name in source.tensors):
        return "experts stacked, gate and up projection fused"
    if source.kind == "mindformers":
        layouts = {place.layout for block, place in source.layout.places.items() if block.expert}
        on_its_side = "transposed" in layouts
        if on_its_side and EMBEDDING in source.tensors:
            return "experts stacked along the rows (graph: w1 and w3 transposed)"
        return f"experts stacked ({'gmm: each transposed' if on_its_side else 'fused'})"
    return {
        "hf": "one tensor per expert",
        "mistral": "one tensor per expert",
        "mistral-dump": "experts stacked along the rows, w2 transposed",
        "mistral_ms": "experts stacked",
    }[source.kind]
