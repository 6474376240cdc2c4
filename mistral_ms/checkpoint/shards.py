"""Opens a set of weight files: checks the index against the files, and their dtypes."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mistral_ms.checkpoint.boxes import PARTS, decode_index
from mistral_ms.checkpoint.buffers import is_no_weight
from mistral_ms.checkpoint.ckpt_file import CkptStore
from mistral_ms.checkpoint.detect import WeightFiles
from mistral_ms.checkpoint.dtypes import TO_CONFIG, WEIGHT_DTYPES
from mistral_ms.checkpoint.files import PARAM_NAME_MAP, inside, read_json
from mistral_ms.checkpoint.parts_store import PartsStore
from mistral_ms.checkpoint.pickle_file import PickleStore
from mistral_ms.checkpoint.safetensors_file import SafetensorsStore, TensorInfo, read_header
from mistral_ms.checkpoint.stream import Store
from mistral_ms.errors import CheckpointError
from mistral_ms.reading import INDEX_BYTES

# Integers and tiny floats: what quantised weights (and packed ones) are stored as.
_QUANTISED = ("I8", "U8", "I32", "U32", "F8_", "F6_", "F4")
_QUANTISED_NAMES = (".qweight", ".qzeros", ".scales", ".weight_scale", ".quant_state", ".absmax")


def open_weights(
    directory: Path, weights: WeightFiles, follow_links: bool = False, quantized: bool = False
) -> Store:
    """Opens all files of one format.

    Args:
        directory: the checkpoint.
        weights: its files.
        follow_links: see :func:`~mistral_ms.checkpoint.files.inside`.
        quantized: some weights are quantised, and whoever opens them knows how; then
            :func:`check_dtypes` is left to them.

    Raises:
        CheckpointError: missing, damaged or stray files, an index that does not agree with them,
            or quantised weights.
        MissingExtraError: pickles, and torch is not installed.
    """
    index = None if weights.index is None else read_json(weights.index, INDEX_BYTES)
    if index is not None and PARTS in index:
        return _open_parts(directory, weights, index, follow_links)
    weight_map = None if weights.index is None else _weight_map(weights.index, index or {})
    if weight_map is None:
        files = _without_index(directory, weights, follow_links)
    else:
        assert weights.index is not None
        names = dict.fromkeys(weight_map.values())
        files = [inside(directory, name, weights.index, follow_links) for name in names]
        _check_stray(weights, files)
    store: Store
    if weights.container == "safetensors":
        headers = {path: read_header(path) for path in files}
        if weights.kind == "mindformers" and weight_map is None:
            _check_one_step(directory, {path: set(each.tensors) for path, each in headers.items()})
        store = SafetensorsStore(headers)
    elif weights.container == "ckpt":
        store = CkptStore(files)
    else:
        store = PickleStore(files)
    try:
        if weight_map is not None and weights.index is not None:
            _check_index(weights.index, weight_map, store.tensors)
        if not quantized:
            check_dtypes(weights.kind, store)
    except BaseException:
        store.close()
        raise
    return store


def _open_parts(
    directory: Path, weights: WeightFiles, index: Mapping[str, Any], follow_links: bool
) -> Store:
    """A checkpoint that many ranks have written, each its part."""
    assert weights.index is not None
    if weights.kind != "mistral_ms":
        raise CheckpointError(
            "incomplete checkpoint",
            where=directory,
            rule="one in parts has a manifest and a configuration of ours",
            todo="copy it again",
        )
    tensors = decode_index(index, weights.index)
    store = PartsStore(directory, weights.index, tensors, follow_links)
    try:
        _check_stray(weights, [directory / name for name in store.files])
    except BaseException:
        store.close()
        raise
    return store


def _weight_map(path: Path, index: Mapping[str, Any]) -> dict[str, str]:
    # MindSpore before 2.5 wrote the names without a heading
    default = index if path.name == PARAM_NAME_MAP else None
    weight_map = index.get("weight_map", default)
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(
            "damaged index", where=path, rule="weight_map must map tensor names to file names"
        )
    return weight_map


def _without_index(directory: Path, weights: WeightFiles, follow_links: bool) -> list[Path]:
    """The files of a set that has no index: one file, Mistral's numbered ones, or what lies in a
    directory of MindFormers, which reads all of it.
    """
    files = list(weights.files)
    for path in files:
        inside(directory, path.name, directory, follow_links)
    numbered = any(re.search(r"-\d+-of-\d+\.", path.name) for path in files)
    if numbered and weights.kind != "mindformers":
        raise CheckpointError(
            "missing index",
            where=directory,
            value=files[0].name,
            rule="shards need their .index.json, which says what is complete",
            todo="copy or download it as well",
        )
    if weights.container == "ckpt" and len(files) > 1:
        raise _several_steps(directory, files)
    for number, path in enumerate(files):
        found = re.fullmatch(r"consolidated\.(\d\d)\.\w+", path.name)
        if found and int(found.group(1)) != number:
            missing = f"consolidated.{number:02d}{path.suffix}"
            raise CheckpointError(
                "missing shard",
                where=directory / missing,
                rule=f"files are numbered from 00 without gaps, and {path.name} is there",
                todo="copy or download it as well",
            )
    return files


def _check_one_step(directory: Path, names: Mapping[Path, set[str]]) -> None:
    """A training leaves the files of several steps side by side, each with all weights."""
    seen: dict[str, Path] = {}
    for path, tensors in names.items():
        for name in tensors:
            if (other := seen.setdefault(name, path)) != path:
                raise _several_steps(directory, [other, path])


def _several_steps(directory: Path, files: Sequence[Path]) -> CheckpointError:
    """Says that one of several files must be given."""
    return CheckpointError(
        "several checkpoints in one directory",
        where=directory,
        value=", ".join(path.name for path in files),
        rule="each of them holds the same tensors",
        todo=f"give one of the files, such as {files[-1]}",
    )


def _check_stray(weights: WeightFiles, named: list[Path]) -> None:
    """A shard that the index does not name is a leftover of another checkpoint."""
    stray = [path for path in weights.files if path not in named]
    if stray:
        raise CheckpointError(
            "extra shard",
            where=stray[0],
            rule=f"{weights.index.name if weights.index else 'the index'} does not name it",
            todo="remove it if it belongs to another checkpoint",
        )


def _check_index(
    index: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo]
) -> None:
    """The index and the shards must agree on every tensor, in both directions."""
    promised: dict[str, list[str]] = defaultdict(list)
    for name, file in weight_map.items():
        found = tensors.get(name)
        if found is None or found.file.name != file:
            promised[file].append(name)
    if promised:
        file, names = next(iter(promised.items()))
        raise CheckpointError(
            "missing tensor",
            where=index.parent / file,
            value=", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else ""),
            rule=f"{index.name} says it is in this file",
            todo="copy or download the file again",
        )
    unlisted = [name for name in tensors if name not in weight_map]
    if unlisted:
        raise CheckpointError(
            "extra tensor",
            where=tensors[unlisted[0]].file,
            value=unlisted[0],
            rule=f"{index.name} does not list it",
        )


def check_dtypes(kind: str, store: Store) -> None:
    """Raises if a weight is stored as what no weight can be.

    Args:
        kind: the format.
        store: its files.

    Raises:
        CheckpointError: quantised weights, or another dtype.
    """
    for name, info in store.tensors.items():
        known = info.dtype in WEIGHT_DTYPES and not name.endswith(_QUANTISED_NAMES)
        if known or is_no_weight(kind, name):
            continue
        quantised = info.dtype.startswith(_QUANTISED) or name.endswith(_QUANTISED_NAMES)
        raise CheckpointError(
            "quantised weights" if quantised else "unsupported dtype",
            where=f"{info.file}: {name}",
            value=info.dtype,
            rule=f"weights must be {', '.join(TO_CONFIG.values())}",
            todo="use the model's unquantised repository" if quantised else None,
        )
