"""Rectangular parts of tensors, and the index that says which file has which: arithmetic.

A checkpoint in parts has one file per rank and set (``model-rank-00003.safetensors``) and in place
of a map from tensors to files an index with, for every tensor, its whole shape, its dtype and its
pieces: file, start and size along each axis. The pieces of a tensor tile it exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_ms.checkpoint.dtypes import WEIGHT_DTYPES
from mistral_ms.errors import CheckpointError

PARTS = "parts"
"""The key of an index that only a checkpoint in parts has."""


@dataclass(frozen=True, order=True)
class Box:
    """A rectangle of a tensor: where it begins, and how long it is, along each axis."""

    start: tuple[int, ...]
    size: tuple[int, ...]

    @classmethod
    def of(cls, tensor_slice: Sequence[slice]) -> Box:
        """The rectangle of some slices with plain bounds."""
        starts = tuple(int(each.start) for each in tensor_slice)
        return cls(starts, tuple(int(each.stop) - int(each.start) for each in tensor_slice))

    @property
    def volume(self) -> int:
        """Number of elements."""
        return math.prod(self.size)

    @property
    def stop(self) -> tuple[int, ...]:
        """The ends, exclusive."""
        return tuple(a + n for a, n in zip(self.start, self.size, strict=True))

    def meets(self, other: Box) -> bool:
        """Whether the two have an element in common."""
        sides = zip(self.start, self.stop, other.start, other.stop, strict=True)
        return all(a < d and c < b for a, b, c, d in sides)


@dataclass(frozen=True)
class Pieces:
    """One tensor of a checkpoint in parts.

    Attributes:
        shape: of the whole.
        dtype: F32, F16 or BF16.
        boxes: file name and rectangle of each piece, in the order of the rectangles.
    """

    shape: tuple[int, ...]
    dtype: str
    boxes: tuple[tuple[str, Box], ...]


def check_tiling(name: str, pieces: Pieces, where: object) -> None:
    """Checks that the pieces cover the tensor exactly once.

    Raises:
        CheckpointError: a piece that sticks out, two that overlap, or elements that are in none.
    """
    boxes = sorted((box, file) for file, box in pieces.boxes)
    for box, file in boxes:
        fits = len(box.start) == len(box.size) == len(pieces.shape)
        if (
            not fits
            or any(a < 0 or n < 1 for a, n in zip(box.start, box.size, strict=True))
            or any(end > length for end, length in zip(box.stop, pieces.shape, strict=True))
        ):
            raise _broken(name, where, f"{_text(box)} in {file} of {list(pieces.shape)}", "lie in")
    for (one, first), (two, second) in _close(boxes):
        if one.meets(two):
            value = f"{_text(one)} in {first} and {_text(two)} in {second} overlap"
            raise _broken(name, where, value, "tile")
    held = sum(box.volume for box, _ in boxes)
    if held != math.prod(pieces.shape):
        value = f"{math.prod(pieces.shape) - held} elements of {list(pieces.shape)} are in no file"
        raise _broken(name, where, value, "tile")


def _close(
    boxes: Sequence[tuple[Box, str]],
) -> Iterable[tuple[tuple[Box, str], tuple[Box, str]]]:
    """Pairs that may overlap: sorted by their first start, only neighbours along that axis can."""
    for number, one in enumerate(boxes):
        for two in boxes[number + 1 :]:
            if one[0].start and two[0].start[0] >= one[0].stop[0]:
                break
            yield one, two


def _text(box: Box) -> str:
    return "[" + ", ".join(f"{a}:{b}" for a, b in zip(box.start, box.stop, strict=True)) + "]"


def _broken(name: str, where: object, value: str, verb: str) -> CheckpointError:
    return CheckpointError(
        "parts that do not fit",
        where=f"{where}: {name}",
        value=value,
        rule=f"the parts of a tensor {verb} it exactly",
        todo="all ranks must write with the same layout",
    )


def encode_index(tensors: Mapping[str, Pieces], total_bytes: int) -> dict[str, Any]:
    """The content of the index of a checkpoint in parts."""
    parts = {
        name: {
            "shape": list(pieces.shape),
            "dtype": pieces.dtype,
            "pieces": [
                {"file": file, "start": list(box.start), "size": list(box.size)}
                for file, box in pieces.boxes
            ],
        }
        for name, pieces in tensors.items()
    }
    return {"metadata": {"total_size": total_bytes}, PARTS: parts}


def decode_index(data: Mapping[str, Any], where: Path) -> dict[str, Pieces]:
    """Reads such an index and checks that every tensor is covered exactly.

    Raises:
        CheckpointError: it is damaged, or pieces do not tile their tensor.
    """
    found = {}
    try:
        for name, entry in data[PARTS].items():
            boxes = tuple(
                (str(piece["file"]), Box(_whole(piece["start"]), _whole(piece["size"])))
                for piece in entry["pieces"]
            )
            found[str(name)] = Pieces(_whole(entry["shape"]), str(entry["dtype"]), boxes)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            "damaged index", where=where, value=repr(error), rule="must list shapes and pieces"
        ) from error
    for name, pieces in found.items():
        if pieces.dtype not in WEIGHT_DTYPES:
            raise CheckpointError("damaged index", where=f"{where}: {name}", value=pieces.dtype)
        check_tiling(name, pieces, where)
    return found


def _whole(values: object) -> tuple[int, ...]:
    if not isinstance(values, list) or any(type(each) is not int or each < 0 for each in values):
        raise ValueError(f"{values!r} is no list of whole numbers")
    return tuple(values)
