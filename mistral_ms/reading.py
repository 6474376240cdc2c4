"""Reading files that others wrote: regular files only, sizes before contents, JSON by its rules.

Every reader of a small file goes through here, so that a link to ``/dev/zero``, a named pipe, a
gigabyte of brackets or half a surrogate pair ends with one clear error in all of them.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from mistral_ms.errors import MistralMsError

CONFIG_BYTES = 1 << 20
"""Longest configuration; published ones have a few thousand bytes."""
INDEX_BYTES = 16 << 20
"""Longest index of a checkpoint, and longest header of a safetensors file: parsing takes up to 25
times as much memory. That of the largest published model has 2 MB."""
TOKENIZER_BYTES = 40 << 20
"""Longest tokenizer; vocabularies of 256000 ids have 33 MB."""
LINE_BYTES = 16 << 20
"""Longest line of a text."""
DEPTH = 64
"""How deep objects and lists may lie within each other."""
_LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
_LFS_BYTES = 1024  # a pointer is shorter
_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")

Fault = type[MistralMsError]


def open_regular(path: Path, fault: Fault) -> BinaryIO:
    """Opens a regular file for reading; links are followed.

    A named pipe, a terminal or a device could be read without end, or never answer.

    Raises:
        MistralMsError: of class ``fault``: it is not there, cannot be read, is something else, or
            is what Git leaves in the place of a large file that was not downloaded.
    """
    try:
        # not to wait for the other end of a pipe
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise fault("cannot read", where=path, value=error.strerror) from error
    except ValueError as error:  # a zero character or half a surrogate pair in the name
        raise fault("cannot read", where=repr(str(path)), value=error) from error
    status = os.fstat(descriptor)
    mode = status.st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        kind = "a directory" if stat.S_ISDIR(mode) else "a pipe, a socket or a device"
        raise fault("not a file", where=path, value=kind, rule="must be a regular file")
    file = os.fdopen(descriptor, "rb")
    if status.st_size < _LFS_BYTES and _is_lfs_pointer(descriptor):
        file.close()
        raise fault(
            "Git LFS pointer",
            where=path,
            value=f"{status.st_size} bytes in the place of the file",
            rule="Git keeps large files elsewhere, and this one was not downloaded",
            todo="run git lfs pull in its repository, or download the file",
        )
    return file


def _is_lfs_pointer(descriptor: int) -> bool:
    try:
        return os.pread(descriptor, len(_LFS_POINTER), 0) == _LFS_POINTER
    except OSError:
        return False  # whoever reads it will hear of it


def is_file(path: Path) -> bool:
    """Whether there is a regular file, or a link to one; a name that cannot be is not there."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def is_dir(path: Path) -> bool:
    """Whether there is a directory, or a link to one; a name that cannot be is not there."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def read_bytes(path: Path, fault: Fault, limit: int) -> bytes:
    """Reads a whole file.

    Args:
        path: a regular file.
        fault: class of the errors.
        limit: bytes that it may have.

    Raises:
        MistralMsError: of class ``fault``: as for :func:`open_regular`; or it is longer.
    """
    with open_regular(path, fault) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            data = file.read(limit + 1) if size <= limit else b""
        except OSError as error:
            raise fault("cannot read", where=path, value=error.strerror) from error
    if max(size, len(data)) > limit:
        rule = f"at most {limit} bytes"
        raise fault("file too large", where=path, value=f"{size} bytes", rule=rule)
    return data


def read_text(path: Path, fault: Fault, limit: int) -> str:
    """Reads a whole UTF-8 file; see :func:`read_bytes`.

    Raises:
        MistralMsError: of class ``fault``: also when it is not UTF-8.
    """
    try:
        return read_bytes(path, fault, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise fault("not UTF-8", where=path, value=f"byte {error.start}") from error


def read_json(path: Path, fault: Fault, limit: int = CONFIG_BYTES) -> dict[str, Any]:
    """Reads a JSON object; see :func:`read_text` and :func:`parse_json`.

    Raises:
        MistralMsError: of class ``fault``: the file cannot be read, is too long, not UTF-8, not
            JSON, or not an object at the top.
    """
    text = read_text(path, fault, limit)
    try:
        data = parse_json(text)
    except ValueError as error:
        raise fault("not JSON", where=path, value=error) from error
    if not isinstance(data, dict):
        rule = "must be an object"
        found = type(data).__name__
        raise fault("not JSON of the expected kind", where=path, value=found, rule=rule)
    return data


def parse_json(text: str) -> Any:
    """Parses JSON by the letter: what Python's parser lets pass beyond it is refused.

    That is: a key that stands twice in one object (the first would be lost), ``NaN`` and
    ``Infinity``, numbers that become infinite (``1e999``), halves of surrogate pairs; and anything
    nested deeper than ``DEPTH``.

    Raises:
        ValueError: says what and, where that is known, at which character.
    """
    try:
        data = json.loads(
            text,
            object_pairs_hook=unique_keys,
            parse_constant=_no_constant,
            parse_float=_finite,
        )
    except RecursionError as error:
        raise ValueError(f"nested deeper than {DEPTH}") from error
    _check_tree(data, strings=_HALF_PAIR.search(text) is not None)
    return data


def unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """An object of its keys and values; the ``object_pairs_hook`` of Python's parser.

    Raises:
        ValueError: a key stands twice.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        name = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {name!r} occurs twice")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"the number {digits[:40]} is too large")
    return number


def _check_tree(data: Any, strings: bool) -> None:
    """Checks the depth, level by level, and the strings where one may be broken."""
    level, depth = [data], 0
    while level:
        below: list[Any] = []
        for each in level:
            if isinstance(each, dict):
                below.extend(each.values())
                if strings:
                    below.extend(each)
            elif isinstance(each, list):
                below.extend(each)
            elif strings and isinstance(each, str):
                _check_characters(each)
        level, depth = below, depth + 1
        if depth > DEPTH:
            raise ValueError(f"nested deeper than {DEPTH}")


def _check_characters(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"{text[error.start]!a}"
        raise ValueError(f"{found} is half of a surrogate pair, not a character") from error
