"""Files of others: what is read, what is refused, and in which words."""

import os
import sys

import pytest

from mistral_ms.errors import LONGEST_MESSAGE, ConfigError
from mistral_ms.reading import DEPTH, open_regular, parse_json, read_bytes, read_json, read_text


def refuse(message, read, *arguments):
    with pytest.raises(ConfigError, match=message):
        read(*arguments)


def test_a_file_is_read_up_to_its_limit(tmp_path):
    path = tmp_path / "a"
    path.write_bytes("é1".encode())
    assert read_bytes(path, ConfigError, 3) == b"\xc3\xa91"
    assert read_text(path, ConfigError, 3) == "é1"
    refuse(r"^file too large: .*/a: 3 bytes: at most 2 bytes", read_bytes, path, ConfigError, 2)


def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # nobody will ever write into it
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "ring").symlink_to("ring")
    for name, message in {
        "pipe": r"^not a file: .*/pipe: a pipe, a socket or a device: must be a regular file",
        "zero": r"^not a file: .*/zero: a pipe, a socket or a device",
        ".": r"^not a file: .*: a directory",
        "ring": r"^cannot read: .*/ring: Too many levels",
        "x" * 300: r"^cannot read: .*: File name too long",
        "no": r"^cannot read: .*/no: No such file",
        "a\0b": r"^cannot read: .*a\\x00b': embedded null",
        "\ud800": r"^cannot read: .*'utf-8' codec can't encode",
    }.items():
        refuse(message, open_regular, tmp_path / name, ConfigError)


def test_a_file_that_grows_after_it_was_measured_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    real = os.fstat
    monkeypatch.setattr(os, "fstat", lambda fd: os.stat_result((*real(fd)[:6], 1, *real(fd)[7:])))
    refuse("^file too large", read_bytes, path, ConfigError, 2)


GOOD = {
    '{"a": [1, 2.5, null, "\\ud83d\\ude00"]}': {"a": [1, 2.5, None, "😀"]},
    "[" * DEPTH + "]" * DEPTH: None,
    '"\\\\ud800"': "\\ud800",
}
BAD = {
    '{"a": 1, "b": 2, "a": 1}': "the key 'a' occurs twice",
    '[{"a": {"b": 1, "b": 2}}]': "the key 'b' occurs twice",
    "NaN": "NaN is not a number of JSON",
    "[-Infinity]": "-Infinity is not a number",
    "[1e999]": "the number 1e999 is too large",
    "[" * (DEPTH + 1) + "]" * (DEPTH + 1): "nested deeper than 64",
    "[" * 100_000: "nested deeper than 64",
    '["\\ud800"]': r"'\\ud800' is half of a surrogate pair",
    '{"\\udc00": 1}': "half of a surrogate pair",
    "1" * 5000: "integer string conversion",
    "[1": "Expecting",
}


@pytest.mark.parametrize(("text", "value"), GOOD.items(), ids=range(len(GOOD)))
def test_json_by_the_letter(text, value):
    assert parse_json(text) == (value if value is not None else parse_json(text))


@pytest.mark.parametrize(("text", "message"), BAD.items(), ids=range(len(BAD)))
def test_what_pythons_parser_would_let_pass(text, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_a_json_file_is_an_object_in_utf8(tmp_path):
    path = tmp_path / "a.json"
    for content, message in {
        b"[1]": r"^not JSON of the expected kind: .*a\.json: list: must be an object",
        b"{": r"^not JSON: .*a\.json: Expecting",
        b'{"a": "\xff"}': r"^not UTF-8: .*a\.json: byte 7",
    }.items():
        path.write_bytes(content)
        refuse(message, read_json, path, ConfigError)


def test_a_message_is_one_short_printable_line():
    wild = "\ud800\x1b[31m\n\0\u202e" + "z" * 5000
    error = ConfigError("what", where=f"/{wild}/end", value=wild, rule="r" * 3000, todo="é" * 3000)
    text = str(error)
    assert text.isprintable() and len(text.encode("utf-8")) <= LONGEST_MESSAGE
    assert text.startswith(r"what: /\ud800\x1b[31m \x00\u202ezz") and "/end: " in text
    assert str(ConfigError("a", where="b\tc", value="d")) == "a: b c: d"
    assert sys.getsizeof(str(ConfigError("a", value="x" * 10**7))) < 10_000
