"""PEFT's files of adapters beside the classes of transformers 5: read as those of version 4, and
written.

The adapters of all E experts are one: A [E r, I] is theirs one after the other, and in B [O, r E]
the expert's number runs fastest. An adapter of ``gate_up_proj`` has A in common for ``w1`` and
``w3``; its B has the rows of ``w1``, then those of ``w3``. Two adapters of one module's parameters
are nested, so that the first, ``gate_up_proj``, is called ``base_layer``. Source: ``ParamWrapper``
of PEFT 0.21, and what it writes.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mistral_ms.checkpoint import keys
from mistral_ms.checkpoint.dtypes import WEIGHT_DTYPES
from mistral_ms.checkpoint.layout import format_layout
from mistral_ms.checkpoint.plan import check_tensors, make_plan, target_dtype
from mistral_ms.checkpoint.safetensors_file import Observer, TensorInfo
from mistral_ms.checkpoint.source import Source
from mistral_ms.checkpoint.stream import Store, Workspace
from mistral_ms.checkpoint.writer import Entry
from mistral_ms.config.peft_fused import Fused, fused_keys
from mistral_ms.weights import A, B

_NAME = re.compile(
    r"(?P<block>.*)\.block_sparse_moe\."
    r"(?:experts\.(?P<expert>\d+)\.(?P<matrix>w[123])|gate)\.(?P<factor>lora_[AB]\.weight)"
)


@dataclass(frozen=True)
class _Part:
    """What of a tensor in the file is one of version 4.

    Attributes:
        name: of the tensor in the file.
        shape: of the tensor in the file.
        is_a: it is an A, not a B.
        rank: of the adapter in the file.
        expert: whose.
        rows: of B: the first, and the one behind the last.
    """

    name: str
    shape: tuple[int, ...]
    is_a: bool
    rank: int
    expert: int = 0
    rows: tuple[int, int] = (0, 0)

    def of(self, whole: np.ndarray) -> np.ndarray:
        """The rows of A, or the columns of B, of one expert."""
        if self.is_a:
            return whole[self.expert * self.rank : (self.expert + 1) * self.rank]
        first, last = self.rows
        return whole[first:last].reshape(last - first, self.rank, -1)[:, :, self.expert]


class FusedStore:
    """The tensors of transformers 4's names in a file with those of version 5.

    An adapter whose rank is below the configuration's has zeros for the rest.

    Args:
        file: the file.
        shapes: of the tensors that are asked for, by their names in version 4.
        fused: what the configuration says of the file.
        where: the adapter's directory, for messages.

    Raises:
        CheckpointError: a tensor of version 5 that is missing or has another shape, or one that
            belongs to no matrix.
    """

    def __init__(
        self, file: Store, shapes: Mapping[str, tuple[int, ...]], fused: Fused, where: Path
    ) -> None:
        self._file = file
        self._parts = _parts(shapes, fused)
        asked = {part.name: part.shape for part in self._parts.values()}
        check_tensors(file.tensors, asked, where)
        self.tensors: dict[str, TensorInfo] = {
            name: replace(file.tensors[part.name], shape=shapes[name])
            for name, part in self._parts.items()
        }

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """Fills ``out`` with elements from ``start`` on, in memory order."""
        out[...] = self.flat(name, start, start + out.size)

    def flat(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements ``start`` to ``stop`` in memory order."""
        part, info = self._parts[name], self._file.tensors[self._parts[name].name]
        found = part.of(self._file.flat(part.name, 0, info.size).reshape(info.shape))
        values = np.zeros(self.tensors[name].shape, WEIGHT_DTYPES[info.dtype])
        values[: found.shape[0], : found.shape[1]] = found
        return values.reshape(-1)[start:stop]

    def observe(self, observer: Observer) -> None:
        """Has an observer told of the bytes that are read in order: none, all are regrouped."""

    def close(self) -> None:
        """Lets the file go."""
        self._file.close()


def _parts(shapes: Mapping[str, tuple[int, ...]], fused: Fused) -> dict[str, _Part]:
    """Where each tensor of version 4 is."""
    found = {name: _NAME.fullmatch(name) for name in shapes}
    matrices = {(m["block"], m["matrix"]) for m in found.values() if m is not None}
    experts = 1 + max((int(m["expert"] or 0) for m in found.values() if m is not None), default=0)
    parts = {}
    for name, match in found.items():
        is_a = name.endswith("lora_A.weight")
        rank, columns, rows = fused.rank, shapes[name][1], shapes[name][0]
        if match is None or match["expert"] is None:
            theirs = name.replace(".block_sparse_moe.", ".mlp.")
            shape = (rank, columns) if is_a else (rows, rank)
            parts[name] = _Part(theirs, shape, is_a, rank, rows=(0, rows))
            continue
        block, matrix, expert = match["block"], match["matrix"], int(match["expert"])
        both = matrix != "w2"
        inner = "base_layer." if both and (block, "w2") in matrices else ""
        theirs = f"{block}.mlp.experts.{inner}{match['factor']}"
        if both:
            rank = fused.gate_up_rank
        shape = (experts * rank, columns) if is_a else (rows * (1 + both), rank * experts)
        first = rows if matrix == "w3" else 0
        parts[name] = _Part(theirs, shape, is_a, rank, expert, (first, first + rows))
    return parts


def fused_form(adapter: Source) -> tuple[dict[str, Any], list[Entry]]:
    """How an adapter is written for PEFT beside the classes of transformers 5.

    Adapters of ``w1`` and ``w3`` with equal A are one of ``gate_up_proj``. Others are one of twice
    the rank: A has the rows of both, and B is zero where the other's rows are.

    Args:
        adapter: see :func:`~mistral_ms.checkpoint.adapters.open_adapter`.

    Returns:
        The keys of ``adapter_config.json`` that differ from version 4's, and the tensors.

    Raises:
        ConfigError: PEFT does not decompose stacked weights.
    """
    config, entries, modules = adapter.config, [], []
    assert config.lora is not None
    for assembly in make_plan(adapter.layout, format_layout(config, keys.PEFT)):
        name = assembly.name.replace(".block_sparse_moe.", ".mlp.")
        if ".experts." not in name:
            stored = target_dtype(assembly, adapter.tensors, "keep")
            chunks = partial(adapter.stream, assembly, stored)
            entries.append(Entry(name, assembly.shape, stored, chunks))
            if name.endswith("lora_A.weight"):
                modules.append(name.removeprefix("base_model.model.").removesuffix(f".{A}.weight"))
    parameters = [f"{name}.weight" for name in modules if name.endswith(".gate")]
    modules = [name for name in modules if not name.endswith(".gate")]
    experts: dict[str, dict[str, str]] = defaultdict(dict)  # of each block the paths, by matrix
    for name in adapter.names():
        block, found, rest = name.partition(".moe.experts.")
        if found and rest.endswith(A):
            experts[block][rest[:2]] = name.removesuffix(A)
    doubled = any(
        not np.array_equal(adapter.read(f"{held['w1']}{A}"), adapter.read(f"{held['w3']}{A}"))
        for held in experts.values()
        if {"w1", "w3"} <= set(held)
    )
    for block, held in experts.items():
        theirs = f"model.{block}.mlp.experts"
        both = tuple(held.get(w) for w in ("w1", "w3"))
        inner = ""
        if any(both):
            parameters.append(f"{theirs}.gate_up_proj")
            inner = ".base_layer" if "w2" in held else ""
            joined = partial(_joined, adapter, both, doubled)
            entries += _stacked(f"{theirs}{inner}", joined)
        if "w2" in held:
            parameters.append(f"{theirs}.down_proj")
            entries += _stacked(theirs, partial(_factors, adapter, held["w2"]))
    return fused_keys(config.lora, modules, parameters, doubled, config.num_hidden_layers), entries


def _factors(adapter: Source, path: str) -> tuple[np.ndarray, np.ndarray]:
    """A [E, r, I] and B [E, O, r]."""
    return adapter.read(f"{path}{A}", "keep"), adapter.read(f"{path}{B}", "keep")


def _joined(
    adapter: Source, paths: tuple[str | None, ...], doubled: bool
) -> tuple[np.ndarray, np.ndarray]:
    """A and B of ``gate_up_proj``; a half without an adapter has zeros."""
    w1, w3 = (path or next(filter(None, paths)) for path in paths)
    (a1, b1), (a3, b3) = _factors(adapter, w1), _factors(adapter, w3)
    nothing = np.zeros_like(b1)
    b1, b3 = (b if path else nothing for b, path in zip((b1, b3), paths, strict=True))
    if not doubled:
        return a1, np.concatenate([b1, b3], 1)
    halves = [np.concatenate(each, 2) for each in ((b1, nothing), (nothing, b3))]
    return np.concatenate([a1, a3], 1), np.concatenate(halves, 1)


def _stacked(module: str, factors: Callable[[], tuple[np.ndarray, np.ndarray]]) -> Iterator[Entry]:
    """The tensors of the adapters of all experts, [E r, I] and [O, r E]."""
    a_ErI, b_EOr = factors()
    E, O, r = b_EOr.shape  # noqa: E741
    stored = next(name for name, dtype in WEIGHT_DTYPES.items() if dtype == b_EOr.dtype)

    def a(workspace: Workspace) -> Iterator[np.ndarray]:
        yield factors()[0].reshape(-1)

    def b(workspace: Workspace) -> Iterator[np.ndarray]:
        yield factors()[1].transpose(1, 2, 0).reshape(-1)

    name = f"base_model.model.{module}"
    yield Entry(f"{name}.{A}.weight", (E * r, a_ErI.shape[2]), stored, a)
    yield Entry(f"{name}.{B}.weight", (O, r * E), stored, b)
