"""What is read, and what every kind of bad document says."""

import json

import pytest

from mistral_ms.config import DataConfig
from mistral_ms.datasets import documents
from mistral_ms.datasets.documents import (
    ChatDocument,
    Rejects,
    TextDocument,
    check_inputs,
    read_documents,
)
from mistral_ms.errors import DataError

ASK = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello."}


def read(path, skip=False, **config):
    reject, done = Rejects(skip), []
    config = DataConfig(seq_length=4, **config)
    found = []
    for document in read_documents(path, config, reject, done.append):
        if isinstance(document, TextDocument):
            found.append("".join(document.chunks))
        else:
            assert isinstance(document, ChatDocument)
            found.append(document.messages)
    return found, reject, sum(done)


def test_a_txt_file_is_one_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\n\r\n two\xc3\xa9\n")
    assert read(path)[0] == ["one\n\n twoé\n"]


def test_each_line_is_a_document(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\n\n  \n two \nthree\xe2\x80\xa8still three")
    found, _, done = read(path, split_lines=True)
    assert found == ["one", " two ", "three\u2028still three"]
    assert done == path.stat().st_size


def test_jsonl_of_texts_and_conversations(jsonl):
    path = jsonl({"text": "a\r\nb", "id": 7}, b"", {"messages": [ASK, ANSWER]})
    found, _, done = read(path)
    assert found == ["a\r\nb", [ASK, ANSWER]]
    assert done == path.stat().st_size


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_long_texts_come_in_chunks_that_begin_with_line_breaks(kind, tmp_path, jsonl, monkeypatch):
    monkeypatch.setattr(documents, "CHUNK_CHARACTERS", 10)
    text = "\n\nfirst line\nsecond\n\n\nx\u2028y\n" + "z" * 30 + "\nend\n"
    path = tmp_path / "a.txt"
    path.write_text(text)
    path = jsonl({"text": text}) if kind == "jsonl" else path
    reject = Rejects(False)
    (document,) = read_documents(path, DataConfig(seq_length=4), reject, lambda n: None)
    chunks = list(document.chunks)
    assert "".join(chunks) == text
    assert len(chunks) >= 4
    assert all(chunk.startswith("\n") for chunk in chunks[1:])


BAD = {
    "utf8": (b'{"text": "ok \xff"}', "not UTF-8", "byte 0xff at byte 14 of the line"),
    "json": (b'{"text": "a"', "not JSON", "Expecting ',' delimiter at character 13:"),
    "deep_json": (b"[" * 100_000, "not JSON", "recursion"),
    "not_an_object": ([1], "wrong type", "a list: each line must be one JSON object"),
    "missing": (
        {"body": "a"},
        "missing field",
        r"keys \['body'\]: needs one of text, me",
    ),
    "both": (
        {"text": "a", "messages": []},
        "ambiguous document",
        ".*--format says",
    ),
    "number": ({"text": 5}, "wrong type", "text is a number: text must be a string"),
    "null": ({"text": None}, "wrong type", "text is null"),
    "boolean": ({"text": True}, "wrong type", "text is a boolean"),
    "empty": ({"text": ""}, "empty document", "at least one visible character"),
    "blank": ({"text": " \n\t"}, "empty document", "at least one visible character"),
    "surrogate": (b'{"text": "a\\ud800"}', "invalid Unicode", r"'\\ud800' at character 1"),
    "messages_type": ({"messages": "a"}, "wrong type", "messages is a string"),
    "message_type": ({"messages": [ASK, 5]}, "wrong type", "a message is a number"),
    "no_messages": ({"messages": []}, "empty document", "at least one message"),
    "role": (
        {"messages": [ASK, {"role": "bot", "content": "x"}]},
        "invalid conversation",
        "message 1: role 'bot': a role is one of system, user, assistant, tool",
    ),
    "keys": (
        {"messages": [{"role": "user"}, ANSWER]},
        "invalid conversation",
        "has role and cont",
    ),
    "content": (
        {"messages": [ASK, {"role": "assistant", "content": None}]},
        "invalid conversation",
        "content must be text",
    ),
    "silence": (
        {"messages": [ASK, {"role": "assistant", "content": ""}]},
        "invalid conversation",
        "must not be empty",
    ),
    "unanswered": (
        {"messages": [ASK, ANSWER, ASK]},
        "invalid conversation",
        "the last message is the user's: the assistant must have the last word",
    ),
    "list_role": ({"messages": [{"role": ["user"], "content": "a"}]}, "invalid conv", "a role is"),
    "chat_surrogate": (
        json.dumps({"messages": [ASK, ANSWER | {"content": "\ud83d"}]}).encode(),
        "invalid Unicode",
        "surrogate pair",
    ),
}


@pytest.mark.parametrize(("line", "what", "reason"), BAD.values(), ids=BAD)
def test_a_bad_line_stops_with_file_line_and_reason(line, what, reason, jsonl):
    path = jsonl({"text": "good"}, b"", line, {"text": "never read"})
    with pytest.raises(DataError, match=rf"^{what}.*: {path}, line 3: .*{reason}.*--skip-bad"):
        read(path)


def test_bad_lines_are_counted_by_reason(jsonl):
    path = jsonl({"text": "first"}, *(line for line, _, _ in BAD.values()), {"text": "last"})
    found, reject, done = read(path, skip=True)
    assert found == ["first", "last"]
    assert reject.counts == {
        "not UTF-8": 1,
        "not JSON": 2,
        "wrong type": 6,
        "missing field": 1,
        "ambiguous document": 1,
        "empty document": 3,
        "invalid Unicode": 2,
        "invalid conversation": 6,
    }
    assert f"{path}, line 3" in str(reject.first["not JSON"])
    assert done == path.stat().st_size


BAD_FILES = {
    "utf8": (b"fine\nfine\nbad \xc3(\n", "not UTF-8: {}, line 3: byte 0xc3 at byte 5", "not UTF-8"),
    "utf16": ("text".encode("utf-16"), "not UTF-8: {}, line 1: byte 0xff", "not UTF-8"),
    "empty": (b"", "empty document: {}: a text must have", "empty document"),
    "blank": (b" \n\n\t\n", "empty document: {}: a text must have", "empty document"),
}


@pytest.mark.parametrize(("content", "message", "reason"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_txt_file(content, message, reason, tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message.format(path)):
        read(path)
    found, reject, _ = read(path, skip=True)
    assert (found, reject.counts) == ([], {reason: 1})


def test_of_a_line_that_is_too_long_only_its_beginning_is_read(tmp_path, jsonl, monkeypatch):
    monkeypatch.setattr(documents, "LINE_BYTES", 20)
    good = [json.dumps({"text": text}) for text in ("123456789", "last")]  # 21 bytes: one too many
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([good[1], good[0], "x" * 95, good[1]]))
    found, reject, _ = read(path, skip=True)
    assert found == ["last", "last"]
    assert dict(reject.counts) == {"line too long": 2}
    with pytest.raises(DataError, match=r"line too long: .*a\.jsonl, line 2: more than 20 bytes"):
        read(path)


def test_inputs_are_checked_first(tmp_path):
    good = tmp_path / "a.TXT"
    good.write_text("12345")
    assert check_inputs([good, good]) == 10
    (tmp_path / "a.csv").touch()
    for bad, message in (
        (tmp_path / "none.txt", "cannot read: .*none.txt: No such file"),
        (tmp_path / "a.csv", "unknown kind of input: .*: '.csv': .*must end in .txt or .jsonl"),
        (tmp_path, "not a file: .*: inputs are files"),
    ):
        with pytest.raises(DataError, match=message):
            check_inputs([good, bad])
    with pytest.raises(DataError, match="no input"):
        check_inputs([])
