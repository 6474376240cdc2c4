"""The shapes in which conversations are published, as a table; each becomes the same messages.

==========  ====================================  ============================================
shape       recognised by                         becomes
==========  ====================================  ============================================
text        ``text``                              a text, not a conversation
messages    ``messages`` (and ``tools``)          the messages as they are
sharegpt    ``conversations`` (``system``,        ``from`` and ``value`` are role and content;
            ``tools``)                            human and gpt are user and assistant
alpaca      ``instruction``, ``output`` (and      instruction, an empty line and input are the
            ``input``, ``system``, ``history``)   user's, output is the assistant's
==========  ====================================  ============================================

A message has ``role`` and ``content``, and may have ``name``, ``weight`` (0: an answer that is not
learned), ``tool_calls`` and ``tool_call_id``. Content may be a list of parts; those of text are
joined, others refused. Further keys of a record are not looked at, those of a message are refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
_KEYS = {"role", "content", "name", "weight", "tool_calls", "tool_call_id"}


class ShapeError(Exception):
    """A record that does not have its shape.

    Args:
        what: the kind of the error, in two or three words.
        value: what was found.
        rule: the rule that it breaks.
    """

    def __init__(self, what: str, value: str | None, rule: str) -> None:
        super().__init__(what)
        self.what, self.value, self.rule = what, value, rule


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages that end with the assistant's, and the tools it may call."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None


def shape_of(record: Mapping[str, Any], forced: str | None = None) -> str:
    """The shape of a record, by the key that only this shape has.

    Args:
        record: one line of a jsonl file.
        forced: the shape that it must have.

    Raises:
        ShapeError: no shape or several; or not the forced one.
    """
    found = [name for name, key in KEYS.items() if key in record]
    if forced is not None:
        if forced in found:
            return forced
        raise ShapeError("missing field", _keys(record), f"{forced} needs {KEYS[forced]}")
    if len(found) == 1:
        return found[0]
    rule = f"needs one of {', '.join(KEYS.values())}"
    if found:
        raise ShapeError("ambiguous document", _keys(record), f"{rule}; --format says which")
    raise ShapeError("missing field", _keys(record), rule)


def conversation(record: Mapping[str, Any], shape: str) -> Conversation:
    """The conversation of a record of some shape but ``text``.

    Raises:
        ShapeError: a rule that it breaks, with the number of the message (from 0).
    """
    found = _READERS[shape](record)
    _check(found.messages)
    return found


def _messages(record: Mapping[str, Any]) -> Conversation:
    turns = _list_of_objects(record["messages"], "messages")
    return Conversation([_message(n, turn) for n, turn in enumerate(turns)], _tools(record))


def _sharegpt(record: Mapping[str, Any]) -> Conversation:
    turns = _list_of_objects(record["conversations"], "conversations")
    messages = _system(record)
    for number, turn in enumerate(turns):
        if "from" not in turn:  # some files have the keys of messages under this name
            messages.append(_message(number, turn))
            continue
        role = turn["from"]
        if not isinstance(role, str) or role not in SHAREGPT_ROLES:
            known = ", ".join(SHAREGPT_ROLES)
            raise _invalid(number, f"from {role!r}", f"from is one of {known}")
        rest = {k: v for k, v in turn.items() if k not in ("from", "value")}
        message = {"role": SHAREGPT_ROLES[role], "content": turn.get("value"), **rest}
        if role == "function_call":
            message |= {"content": "", "tool_calls": [_call(number, turn.get("value"))]}
        messages.append(_message(number, message))
    return Conversation(messages, _tools(record))


def _alpaca(record: Mapping[str, Any]) -> Conversation:
    messages = _system(record)
    history = record.get("history") or []
    if not isinstance(history, list) or not all(
        isinstance(pair, list) and len(pair) == 2 for pair in history
    ):
        raise ShapeError("wrong type", "history", "history must be a list of pairs")
    for question, answer in history:
        messages += [_message(len(messages), {"role": "user", "content": question})]
        messages += [_message(len(messages), {"role": "assistant", "content": answer})]
    question, extra = record["instruction"], record.get("input") or ""
    for name, value in (("instruction", question), ("input", extra)):
        if not isinstance(value, str):
            raise ShapeError("wrong type", f"{name} is {kind(value)}", f"{name} must be a string")
    if "output" not in record:
        raise ShapeError("missing field", _keys(record), "alpaca needs output")
    text = f"{question}\n\n{extra}" if extra else question
    messages.append(_message(len(messages), {"role": "user", "content": text}))
    answer = {"role": "assistant", "content": record["output"]}
    return Conversation([*messages, _message(len(messages), answer)])


def _system(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    system = record.get("system")
    if system is None or system == "":
        return []
    return [_message(0, {"role": "system", "content": system})]


def _message(number: int, given: Mapping[str, Any]) -> dict[str, Any]:
    """A message with text as its content."""
    unknown = sorted(set(given) - _KEYS)
    if unknown or "role" not in given or not {"content", "tool_calls"} & set(given):
        further = ", ".join(sorted(_KEYS - {"role", "content"}))
        rule = f"a message has role and content, and perhaps {further}"
        raise _invalid(number, f"keys {sorted(given)}", rule)
    message = {key: value for key, value in given.items() if value is not None}
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise _invalid(number, f"role {role!r}", f"a role is one of {', '.join(ROLES)}")
    calls = message.get("tool_calls")
    if calls is not None and (role != "assistant" or not _are_calls(calls)):
        rule = "tool_calls are the assistant's: a list of objects with function.name"
        raise _invalid(number, f"tool_calls of {role}", rule)
    if not calls:
        message.pop("tool_calls", None)
    message["content"] = _content(number, message.get("content"), bool(calls))
    for key in ("name", "tool_call_id"):
        if not isinstance(message.get(key, ""), str):
            raise _invalid(number, f"{key} is {kind(message[key])}", f"{key} must be a string")
    weight = message.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise _invalid(number, f"weight {weight!r}", "a weight is 0 or 1")
    if not message["content"] and not calls and role in ("system", "assistant"):
        raise _invalid(number, "''", f"the content of role {role} must not be empty")
    return message


def _content(number: int, content: Any, may_be_missing: bool) -> str:
    if isinstance(content, list):
        for part in content:
            is_text = isinstance(part, dict) and part.get("type") == "text"
            if not is_text or not isinstance(part.get("text"), str):
                found = part.get("type") if isinstance(part, dict) else kind(part)
                raise _invalid(number, f"a part of type {found!r}", "parts of content must be text")
        return "".join(part["text"] for part in content)
    if content is None and may_be_missing:
        return ""
    if not isinstance(content, str):
        raise _invalid(number, kind(content), "content must be text")
    return content


def _are_calls(calls: Any) -> bool:
    return isinstance(calls, list) and all(
        isinstance(call, dict)
        and isinstance(call.get("function"), dict)
        and isinstance(call["function"].get("name"), str)
        for call in calls
    )


def _call(number: int, value: Any) -> dict[str, Any]:
    """The function call that ShareGPT writes as JSON in a text."""
    try:
        function = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        function = None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _invalid(number, f"{value!r}"[:60], "a function_call is JSON with a name")
    return {"type": "function", "function": function}


def _tools(record: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Tools as a list, or as the JSON text that columns of data sets need."""
    tools = record.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise ShapeError("wrong type", "tools", "tools must be JSON") from error
    if not tools:
        return None
    return _list_of_objects(tools, "tools")


def _list_of_objects(value: Any, name: str) -> list[dict[str, Any]]:
    if isinstance(value, list) and all(isinstance(one, dict) for one in value):
        return value
    found = f"{name} is {kind(value)}"
    if isinstance(value, list):
        odd = next(kind(one) for one in value if not isinstance(one, dict))
        found = f"{'a message' if name != 'tools' else 'a tool'} is {odd}"
    raise ShapeError("wrong type", found, f"{name} must be a list of objects")


def _check(messages: list[dict[str, Any]]) -> None:
    if not messages:
        raise ShapeError("empty document", "[]", "there must be at least one message")
    if (role := messages[-1]["role"]) != "assistant":
        found = f"the last message is the {role}'s"
        raise ShapeError("invalid conversation", found, "the assistant must have the last word")


def _invalid(number: int, value: str, rule: str) -> ShapeError:
    return ShapeError("invalid conversation", f"message {number}: {value}", rule)


def _keys(record: Mapping[str, Any]) -> str:
    return f"keys {sorted(record)[:8]}"


def kind(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


KEYS = {
    "text": "text",
    "messages": "messages",
    "sharegpt": "conversations",
    "alpaca": "instruction",
}
"""The shapes, and the key that each is recognised by."""
_READERS: dict[str, Callable[[Mapping[str, Any]], Conversation]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _alpaca,
}
