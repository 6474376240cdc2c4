"""Published shapes of conversations, written out beside the messages that they mean."""

import json

import pytest

from mistral_ms.config import DataConfig
from mistral_ms.datasets.documents import Rejects, read_documents
from mistral_ms.errors import DataError

ASK, ANSWER = {"role": "user", "content": "When?"}, {"role": "assistant", "content": "Nine."}
CALL = {"type": "function", "function": {"name": "tide", "arguments": {"at": 9}}}
TOOL = {"type": "function", "function": {"name": "tide", "parameters": {}}}
BRIEF = {"role": "system", "content": "Be brief."}

SAME = {
    "messages": ({"messages": [ASK, ANSWER]}, [ASK, ANSWER], None),
    "every key of a message": (
        {
            "messages": [
                ASK | {"name": "ann"},
                {"role": "assistant", "content": None, "tool_calls": [CALL]},
                {"role": "tool", "content": "9", "tool_call_id": "a", "name": "tide"},
                ANSWER | {"weight": 0, "tool_calls": None},
            ],
            "tools": [TOOL],
        },
        [
            ASK | {"name": "ann"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "9", "tool_call_id": "a", "name": "tide"},
            ANSWER | {"weight": 0},
        ],
        [TOOL],
    ),
    "content parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Wh"},
                                             {"type": "text", "text": "en?"}]},
                ANSWER,
            ]
        },
        [ASK, ANSWER],
        None,
    ),
    "tools as text": (
        {"messages": [ASK, ANSWER], "tools": json.dumps([TOOL])}, [ASK, ANSWER], [TOOL],
    ),
    "sharegpt": (
        {
            "id": 7,
            "conversations": [
                {"from": "human", "value": "When?"},
                {"from": "gpt", "value": "Nine.", "weight": 1},
            ],
        },
        [ASK, ANSWER | {"weight": 1}],
        None,
    ),
    "sharegpt with system and tools": (
        {
            "conversations": [
                {"from": "human", "value": "When?"},
                {"from": "function_call", "value": json.dumps(CALL["function"])},
                {"from": "observation", "value": "9"},
                {"from": "gpt", "value": "Nine."},
            ],
            "system": "Be brief.",
            "tools": json.dumps([TOOL]),
        },
        [
            BRIEF,
            ASK,
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "content": "9"},
            ANSWER,
        ],
        [TOOL],
    ),
    "conversations with roles": ({"conversations": [ASK, ANSWER]}, [ASK, ANSWER], None),
    "alpaca": ({"instruction": "When?", "input": "", "output": "Nine."}, [ASK, ANSWER], None),
    "alpaca with all": (
        {
            "instruction": "When?",
            "input": "In May.",
            "output": "Nine.",
            "system": "Be brief.",
            "history": [["a", "b"]],
        },
        [
            BRIEF,
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "When?\n\nIn May."},
            ANSWER,
        ],
        None,
    ),
}  # fmt: skip


def read(tmp_path, record, shape=None):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record) + "\n")
    config = DataConfig(seq_length=4, format=shape)
    return list(read_documents(path, config, Rejects(False), lambda n: None))


@pytest.mark.parametrize(("record", "messages", "tools"), SAME.values(), ids=SAME)
def test_shapes_that_mean_the_same(record, messages, tools, tmp_path):
    (document,) = read(tmp_path, record)
    assert document.messages == messages
    assert document.tools == tools
    assert document.where == f"{tmp_path}/a.jsonl, line 1"


def test_a_forced_shape_chooses_among_several(tmp_path):
    both = {"text": "x", "messages": [ASK, ANSWER]}
    (chat,) = read(tmp_path, both, "messages")
    (text,) = read(tmp_path, both, "text")
    assert (chat.messages, "".join(text.chunks)) == ([ASK, ANSWER], "x")
    with pytest.raises(DataError, match=r"missing field: .*: sharegpt needs conversations"):
        read(tmp_path, both, "sharegpt")


def messages(*turns):
    return {"messages": list(turns)}


BAD = {
    "unknown key": (messages(ASK | {"mood": 1}, ANSWER), r"message 0: keys .*'mood'.*a message"),
    "image": (
        messages({"role": "user", "content": [{"type": "image_url"}]}, ANSWER),
        "message 0: a part of type 'image_url': parts of content must be text",
    ),
    "weight": (messages(ASK, ANSWER | {"weight": 0.5}), "message 1: weight 0.5: a weight is"),
    "name": (messages(ASK | {"name": 3}, ANSWER), "message 0: name is a number"),
    "calls of a user": (messages(ASK | {"tool_calls": [CALL]}, ANSWER), "tool_calls of user"),
    "calls without a name": (
        messages(ASK, {"role": "assistant", "tool_calls": [{"function": {}}]}),
        r"message 1: .*a list of objects with function.name",
    ),
    "tools": (messages(ASK, ANSWER) | {"tools": "{"}, "tools must be JSON"),
    "from": (
        {"conversations": [{"from": "alien", "value": "x"}]}, "message 0: from 'alien': from is",
    ),
    "no value": ({"conversations": [{"from": "gpt"}]}, "message 0: null: content must be text"),
    "function_call": (
        {"conversations": [{"from": "function_call", "value": "{"}]},
        "message 0: '{': a function_call is JSON with a name",
    ),
    "no output": ({"instruction": "x", "input": "y"}, "alpaca needs output"),
    "input": ({"instruction": "x", "input": 5, "output": "y"}, "input is a number"),
    "history": ({"instruction": "x", "output": "y", "history": [1]}, "a list of pairs"),
    "ends with a question": (
        {"conversations": [{"from": "human", "value": "x"}]}, "the last message is the user's",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("record", "message"), BAD.values(), ids=BAD)
def test_what_does_not_fit_a_shape_is_named_with_its_line(record, message, tmp_path):
    with pytest.raises(DataError, match=rf"a\.jsonl, line 1: .*{message}"):
        read(tmp_path, record)
