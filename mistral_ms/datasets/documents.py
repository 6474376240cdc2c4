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
from mistral_ms.errors import DataError, TokenizerError
from mistral_ms.reading import LINE_BYTES, is_dir, open_regular, unique_keys
from mistral_ms.tokenizer import check_messages

CHUNK_CHARACTERS = 1 << 20
SUFFIXES = (".txt", ".jsonl")
_ANOTHER_TURN = {"role": "user", "content": ""}

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
        messages: ``{"role": ..., "content": ...}`` each, checked.
    """

    messages: Sequence[Mapping[str, str]]


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
    file is an object with either ``text`` or ``messages``; other keys are not looked at. Blank
    lines separate, they are no documents. A file's line breaks of Windows become line feeds, and a
    byte order mark at its beginning is dropped.

    Args:
        path: the file.
        config: ``split_lines`` is looked at.
        reject: takes the errors of bad documents.
        advance: called with numbers of bytes that have been read for good.

    Raises:
        DataError: the file cannot be read, or what ``reject`` raises.
    """
    if path.suffix.lower() == ".txt" and not config.split_lines:
        yield from _whole_file(path, reject, advance)
        return
    parse = _line_of_text if path.suffix.lower() == ".txt" else _line_of_json
    for number, line in _lines(path):
        advance(len(line))
        where = f"{path}, line {number}"
        try:
            text = _decoded(line, where).rstrip("\n")
            if text.strip():
                yield parse(text, where)
        except DataError as error:
            reject(error)


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
            _bad("empty document", path, None, "a text must have at least one visible character")
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


def _line_of_text(text: str, where: str) -> Document:
    return TextDocument(iter((text,)))


def _line_of_json(line: str, where: str) -> Document:
    try:
        record = json.loads(line, object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        found = str(error)
        if isinstance(error, json.JSONDecodeError):  # its own "line 1" would only confuse
            found = f"{error.msg} at character {error.colno}"
        raise _bad("not JSON", where, found, "each line must be one JSON object") from error
    if not isinstance(record, dict):
        raise _bad("wrong type", where, _kind(record), "each line must be one JSON object")
    fields = [name for name in ("text", "messages") if name in record]
    if len(fields) != 1:
        found = f"keys {sorted(record)[:8]}"
        what = "ambiguous document" if fields else "missing field"
        raise _bad(what, where, found, "needs either text or messages")
    if fields == ["messages"]:
        return _chat(record["messages"], where)
    return _text(record["text"], where)


def _text(text: Any, where: str) -> TextDocument:
    if not isinstance(text, str):
        raise _bad("wrong type", where, f"text is {_kind(text)}", "text must be a string")
    if not text.strip():
        raise _bad(
            "empty document",
            where,
            repr(text[:20]),
            "text must have at least one visible character",
        )
    _check_unicode(text, where)
    return TextDocument(_chunks(iter(text.splitlines(keepends=True))))


def _chat(messages: Any, where: str) -> ChatDocument:
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        found = f"messages is {_kind(messages)}"
        if isinstance(messages, list):
            found = f"a message is {next(_kind(m) for m in messages if not isinstance(m, dict))}"
        raise _bad("wrong type", where, found, "messages must be a list of objects")
    if not messages:
        raise _bad("empty document", where, "[]", "there must be at least one message")
    # What the tokenizer's check wants to end with a question ends with an answer here.
    answered = messages[-1].get("role") == "assistant"
    try:
        check_messages([*messages, _ANOTHER_TURN] if answered else messages)
    except TokenizerError as error:
        found = ": ".join(str(part) for part in (error.where, error.value) if part is not None)
        raise _bad("invalid conversation", where, found, str(error.rule)) from error
    if not answered:
        found = f"the last message is the {messages[-1]['role']}'s"
        raise _bad("invalid conversation", where, found, "the assistant must have the last word")
    for message in messages:
        _check_unicode(message["content"], where)
    return ChatDocument(messages)


def _check_unicode(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"{text[error.start]!a} at character {error.start}"
        rule = "must be valid Unicode, not half of a surrogate pair"
        raise _bad("invalid Unicode", where, found, rule) from error


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
        raise _bad("line too long", where, found, rule)
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line"
        raise _bad("not UTF-8", where, found, "text must be UTF-8") from error
    return text[:-2] + "\n" if text.endswith("\r\n") else text


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


def _bad(what: str, where: object, value: object, rule: str) -> DataError:
    todo = "correct it, or pass --skip-bad to count such documents"
    return DataError(what, where=where, value=value, rule=rule, todo=todo)


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError("cannot read", where=path, value=error.strerror)
