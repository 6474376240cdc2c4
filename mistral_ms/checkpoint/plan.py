"""A conversion as data: which piece of which source tensor goes where in which target tensor.

A plan is made from two layouts of the same model, block by block, and then checked without
trusting how it was made: the pieces must cover every source tensor and every target tensor
exactly once. Only then is the first byte written.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mistral_ms.checkpoint.dtypes import FROM_OPTION, TO_CONFIG
from mistral_ms.checkpoint.keys import Layout
from mistral_ms.checkpoint.layout import Block, FormatLayout
from mistral_ms.checkpoint.safetensors_file import TensorInfo
from mistral_ms.errors import CheckpointError


@dataclass(frozen=True)
class Piece:
    """One block on its way: contiguous in the source, contiguous in the target.

    Attributes:
        source: name of the source tensor.
        source_start: first element there.
        source_layout: how the source lays the block out.
        target_start: first element in the target tensor.
        target_layout: how the target lays it out.
        block: what it is.
    """

    source: str
    source_start: int
    source_layout: Layout
    target_start: int
    target_layout: Layout
    block: Block


@dataclass(frozen=True)
class Assembly:
    """One target tensor and the pieces it is assembled of, in its order."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def make_plan(source: FormatLayout, target: FormatLayout) -> tuple[Assembly, ...]:
    """Joins two layouts of one model over their blocks.

    Args:
        source: the format that is read.
        target: the format that is written.

    Returns:
        One assembly for each target tensor, in the target's order.

    Raises:
        CheckpointError: the pieces do not cover both sides exactly once (a wrong key table).
    """
    pieces: dict[str, list[Piece]] = defaultdict(list)
    for block, there in target.places.items():
        here = source.places[block]
        pieces[there.name].append(
            Piece(here.name, here.start, here.layout, there.start, there.layout, block)
        )
    plan = tuple(
        Assembly(name, shape, tuple(sorted(pieces[name], key=lambda piece: piece.target_start)))
        for name, shape in target.shapes.items()
    )
    check_coverage(plan, source.shapes)
    return plan


def check_coverage(plan: Sequence[Assembly], source_shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Checks that each source and each target element occurs in exactly one piece.

    Raises:
        CheckpointError: names the tensor and the first element that is left over or used twice.
    """
    sources: dict[str, list[tuple[int, int]]] = {name: [] for name in source_shapes}
    for assembly in plan:
        spans = []
        for piece in assembly.pieces:
            size = piece.block.size
            spans.append((piece.target_start, piece.target_start + size))
            if piece.source not in sources:
                raise CheckpointError("broken plan", where=piece.source, rule="no such tensor")
            sources[piece.source].append((piece.source_start, piece.source_start + size))
        _check_tiling("target", assembly.name, spans, assembly.size)
    for name, spans in sources.items():
        _check_tiling("source", name, spans, math.prod(source_shapes[name]))


def _check_tiling(side: str, name: str, spans: Iterable[tuple[int, int]], size: int) -> None:
    position = 0
    for begin, end in [*sorted(spans), (size, size)]:
        if begin != position:
            raise CheckpointError(
                "broken plan",
                where=f"{side} {name}",
                value=f"element {min(begin, position)}",
                rule="must be used exactly once",
            )
        position = end


def target_dtype(assembly: Assembly, tensors: Mapping[str, TensorInfo], option: str) -> str:
    """The dtype that a target tensor is written in.

    Args:
        assembly: the target tensor.
        tensors: what the source's files say of their tensors.
        option: ``keep``, ``fp32``, ``fp16`` or ``bf16``.

    Raises:
        CheckpointError: ``keep``, and the pieces differ in dtype; or an unknown option.
    """
    if option != "keep":
        if option not in FROM_OPTION:
            raise CheckpointError(
                "unknown dtype",
                where="dtype",
                value=repr(option),
                rule=f"must be one of keep, {', '.join(FROM_OPTION)}",
            )
        return FROM_OPTION[option]
    found = {tensors[piece.source].dtype: piece.source for piece in assembly.pieces}
    if len(found) > 1:
        (first, one), (second, two), *_ = found.items()
        raise CheckpointError(
            "mixed dtypes",
            where=assembly.name,
            value=f"{one} is {first}, {two} is {second}",
            rule="one tensor has one dtype",
            todo="choose one with --dtype",
        )
    return next(iter(found))


def main_dtype(tensors: Mapping[str, TensorInfo]) -> str:
    """What configurations call the dtype of most elements."""
    sizes: dict[str, int] = defaultdict(int)
    for info in tensors.values():
        sizes[info.dtype] += info.size
    return TO_CONFIG[max(sizes, key=lambda dtype: sizes[dtype])]


def check_tensors(
    tensors: Mapping[str, TensorInfo],
    expected: Mapping[str, tuple[int, ...]],
    where: object,
) -> None:
    """Compares the tensors in a checkpoint's files with what its configuration asks for.

    Raises:
        CheckpointError: missing or extra tensors (a few are named, all are counted), or a wrong
            shape.
    """
    files = {name: info.file for name, info in tensors.items()}
    check_shapes({name: info.shape for name, info in tensors.items()}, expected, where, files)


def check_shapes(
    shapes: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    where: object,
    files: Mapping[str, object] | None = None,
) -> None:
    """The same for bare shapes; ``files`` says where each tensor is, for the message."""
    files = files or {}
    missing = [name for name in expected if name not in shapes]
    extra = [name for name in shapes if name not in expected]
    todo = "the files and the configuration must be of the same model"
    if missing:
        raise CheckpointError(
            "missing tensor",
            where=where,
            value=_some(missing),
            rule=f"the configuration asks for {len(expected)} tensors, {len(missing)} are not there"
            + (f" and {len(extra)} unknown ones are ({_some(extra)})" if extra else ""),
            todo=todo,
        )
    if extra:
        raise CheckpointError(
            "extra tensor",
            where=files.get(extra[0], where),
            value=_some(extra),
            rule=f"the configuration asks for {len(expected)} tensors, {len(extra)} more are there",
            todo=todo,
        )
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise CheckpointError(
                "wrong shape",
                where=f"{files.get(name, where)}: {name}",
                value=list(shapes[name]),
                rule=f"the configuration asks for {list(shape)}",
                todo=todo,
            )


def _some(names: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
