"""Reads documents out of txt and jsonl files, one at a time, and says exactly what is wrong.

Everything that can be wrong with a document is found here, before a token of it is packed: a
document is either whole in the dataset or not at all. Memory holds a line at a time, or a
mebibyte of shorter lines.
"""

from __future__ import annotations

import codecs
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mistral_ms.config import DataConfig
from mistral_ms.datasets.shapes import ShapeError, conversation, kind, shape_of
from mistral_ms.errors import DataError
from mistral_ms.reading import LINE_BYTES, is_dir, open_regular, unique_keys

CHUNK_CHARACTERS = 1 << 20
SUFFIXES = (".txt", ".jsonl")

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class TextDocument:
    """A text.

    Attributes:
        chunks: its characters; each chunk but the first begins with a line break.
    """

    chunks: Iterator[str]


@dataclass(frozen=True, slots=True)
class ChatDocument:
    """A conversation that ends with the assistant's answer.

    Attributes:
        messages: ``role`` and ``content`` each and what else :mod:`mistral_ms.datasets.shapes`
            lets through; whether the model's chat format takes them is not known yet.
        tools: functions that the assistant may call.
        where: file and line.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None
    where: str


Document = TextDocument | ChatDocument


class Rejects:
    """What becomes of bad documents: the first one is raised, or all are counted.

    Args:
        skip: count them.

    Attributes:
        counts: how many were skipped for each reason.
        first: the first error of each reason.
    """

    def __init__(self, skip: bool) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, DataError] = {}
        self._skip = skip

    def __call__(self, error: DataError) -> None:
        """Takes the error of one document.

        Raises:
            DataError: the error itself, unless bad documents are skipped.
        """
        if not self._skip:
            raise error
        self.counts[error.what] += 1
        self.first.setdefault(error.what, error)


def check_inputs(paths: Sequence[Path]) -> int:
    """Checks that all inputs can be opened and are of a known kind.

    Returns:
        Their size in bytes.

    Raises:
        DataError: no input at all, one that cannot be read, or a suffix that is not known.
    """
    if not paths:
        raise DataError("no input", rule="name at least one txt or jsonl file")
    total = 0
    for path in paths:
        if is_dir(path):
            raise DataError(
                "not a file", where=path, rule="inputs are files", todo=f"{path}/*.txt names all"
            )
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(
                "unknown kind of input",
                where=path,
                value=repr(path.suffix),
                rule=f"the name must end in {' or '.join(SUFFIXES)}",
            )
        try:
            with open_regular(path, DataError):
                total += path.stat().st_size
        except OSError as error:
            raise _unreadable(path, error) from error
    return total


def read_documents(
    path: Path, config: DataConfig, reject: Rejects, advance: Advance
) -> Iterator[Document]:
    """The good documents of one file, in order.

    A txt file is one document; with ``split_lines`` each of its lines is one. Each line of a jsonl
    file is an object of one of the shapes of :mod:`mistral_ms.datasets.shapes`. Blank lines
    separate, they are no documents. A file's line breaks of Windows become line feeds, and a
    byte order mark at its beginning is dropped.

    Args:
        path: the file.
        config: ``split_lines`` and ``format`` are looked at.
        reject: takes the errors of bad documents.
        advance: called with numbers of bytes that have been read for good.

    Raises:
        DataError: the file cannot be read, or what ``reject`` raises.
    """
    if path.suffix.lower() == ".txt" and not config.split_lines:
        yield from _whole_file(path, reject, advance)
        return
    text_file, shape = path.suffix.lower() == ".txt", config.format
    for number, line in _lines(path):
        advance(len(line))
        where = f"{path}, line {number}"
        try:
            text = _decoded(line, where).rstrip("\n")
            if text.strip():
                yield _line_of_text(text) if text_file else _line_of_json(text, where, shape)
        except DataError as error:
            reject(error)


def read_objects(path: Path, reject: Rejects) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a jsonl file, one a line, with file and line of each.

    Args:
        path: the file.
        reject: takes the errors of lines that are not JSON objects.

    Raises:
        DataError: the file cannot be read, or what ``reject`` raises.
    """
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        try:
            text = _decoded(line, where)
            record = _json_object(text, where) if text.strip() else None
        except DataError as error:
            reject(error)
            continue
        if record is not None:
            yield where, record


def _whole_file(path: Path, reject: Rejects, advance: Advance) -> Iterator[Document]:
    """Reads the file twice: its first half must not be packed when the second is not UTF-8."""
    blank, size = True, 0
    for number, line in _lines(path):
        size += len(line)
        try:
            blank = not _decoded(line, f"{path}, line {number}").strip() and blank
        except DataError as error:
            reject(error)
            advance(path.stat().st_size)
            return
    if blank:
        reject(
            bad_document(
                "empty document", path, None, "a text must have at least one visible character"
            )
        )
        advance(size)
        return
    yield TextDocument(_chunks(_decoded_lines(path, advance)))


def _decoded_lines(path: Path, advance: Advance) -> Iterator[str]:
    for number, line in _lines(path):
        advance(len(line))
        yield _decoded(line, f"{path}, line {number}")


def _chunks(lines: Iterator[str]) -> Iterator[str]:
    """Joins lines to chunks. The last line break of a chunk moves to the beginning of the next."""
    held: list[str] = []
    size = 0
    for line in lines:
        held.append(line)
        size += len(line)
        if size >= CHUNK_CHARACTERS and line.endswith("\n"):
            yield "".join(held)[:-1]
            held, size = ["\n"], 1
    yield "".join(held)


def _line_of_text(text: str) -> Document:
    return TextDocument(iter((text,)))


def _json_object(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        found = str(error)
        if isinstance(error, json.JSONDecodeError):  # its own "line 1" would only confuse
            found = f"{error.msg} at character {error.colno}"
        raise bad_document("not JSON", where, found, "each line must be one JSON object") from error
    if not isinstance(record, dict):
        raise bad_document("wrong type", where, kind(record), "each line must be one JSON object")
    return record


def _line_of_json(line: str, where: str, forced: str | None) -> Document:
    record = _json_object(line, where)
    try:
        shape = shape_of(record, forced)
        if shape == "text":
            return _text(record["text"], where)
        chat = conversation(record, shape)
    except ShapeError as error:
        raise bad_document(error.what, where, error.value, error.rule) from error
    for value in (chat.messages, chat.tools):
        check_unicode(json.dumps(value, ensure_ascii=False), where)
    return ChatDocument(chat.messages, chat.tools, where)


def _text(text: Any, where: str) -> TextDocument:
    if not isinstance(text, str):
        raise bad_document("wrong type", where, f"text is {kind(text)}", "text must be a string")
    if not text.strip():
        raise bad_document(
            "empty document",
            where,
            repr(text[:20]),
            "text must have at least one visible character",
        )
    check_unicode(text, where)
    return TextDocument(_chunks(iter(text.splitlines(keepends=True))))


def check_unicode(text: str, where: str) -> None:
    """Raises a DataError that names ``where`` when a text is half of a surrogate pair."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"{text[error.start]!a} at character {error.start}"
        rule = "must be valid Unicode, not half of a surrogate pair"
        raise bad_document("invalid Unicode", where, found, rule) from error


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbers from 1 and raw lines: a line feed is never part of another UTF-8 character.

    Of a line that is too long only the beginning is held.
    """
    try:
        with open_regular(path, DataError) as file:
            number = 0
            while line := file.readline(LINE_BYTES + 1):
                number += 1
                yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                while len(line) > LINE_BYTES and not line.endswith(b"\n"):
                    line = file.readline(LINE_BYTES + 1)  # it has been rejected by its length
    except OSError as error:
        raise _unreadable(path, error) from error


def _decoded(line: bytes, where: str) -> str:
    if len(line) > LINE_BYTES:
        found, rule = f"more than {LINE_BYTES} bytes", "a line is held in memory as a whole"
        raise bad_document("line too long", where, found, rule)
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line"
        raise bad_document("not UTF-8", where, found, "text must be UTF-8") from error
    return text[:-2] + "\n" if text.endswith("\r\n") else text


def bad_document(what: str, where: object, value: object, rule: str) -> DataError:
    """The error of one document, which may be skipped."""
    todo = (
        "correct it, or leave such documents out: --skip-bad of data, in a run "
        "data.packing.skip_bad=true"
    )
    return DataError(what, where=where, value=value, rule=rule, todo=todo)


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError("cannot read", where=path, value=error.strerror)
