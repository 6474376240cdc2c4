"""Chat ids against mistral-common's public entry, Hugging Face's templates, and by hand."""

import copy

import pytest

from mistral_ms.errors import TokenizerError
from mistral_ms.tokenizer import MistralChat, packaged_tokenizer
from mistral_ms.tokenizer.json_model import JsonTokenizer


def conversation(*turns):
    return [{"role": role, "content": content} for role, content in turns]


CONVERSATIONS = {
    "one_turn": conversation(("user", "Hello")),
    "system": conversation(("system", "Be brief."), ("user", "Hello")),
    "three_turns": conversation(
        ("user", "What is a tide?"), ("assistant", "Moon and water."), ("user", "And a neap tide?")
    ),
    "system_and_turns": conversation(
        ("system", "Be brief."), ("user", "你好"), ("assistant", "🤗 hi"), ("user", "two\nlines")
    ),
}
# The formats that Mistral publishes as Hugging Face chat templates, with strict spacing.
TURNS_AS_TEXT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content"
    " + '\n\n' %}{% elif m.role == 'user' %}{{ ' [INST] ' + ns.system + m.content + ' [/INST]' }}"
    "{% set ns.system = '' %}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
TURNS_AS_TOKENS = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{% set ns.system = m.content"
    " + '\n\n' %}{% elif m.role == 'user' %}{{ '[INST] ' + (ns.system if loop.last else '')"
    " + m.content + '[/INST]' }}{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
START = "{% set ns = namespace(system='') %}"


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_ids_equal_mistral_common(version, tokenizer, messages):
    """Its public entry loads the file itself, validates and normalises; ours must not differ."""
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    theirs = getattr(MistralTokenizer, version)()
    expected = theirs.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens
    assert MistralChat(tokenizer).encode_chat(messages) == expected


@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
@pytest.mark.parametrize(
    ("version", "template"),
    [
        ("v1", TURNS_AS_TEXT),
        pytest.param("v2", TURNS_AS_TOKENS, marks=pytest.mark.slow),
        ("v3", TURNS_AS_TOKENS),
    ],
    indirect=["version"],
    scope="session",
)
def test_ids_equal_hugging_face(tokenizer, hf_slow_non_legacy, template, messages):
    """legacy=False is what the published templates were made for: a space after a control token
    is part of the word that follows."""
    hf = copy.deepcopy(hf_slow_non_legacy)
    marks = [mark for mark in ("[INST]", "[/INST]") if tokenizer.control_id(mark) is not None]
    hf.add_special_tokens({"additional_special_tokens": marks})
    expected = hf.apply_chat_template(messages, chat_template=START + template, return_dict=False)
    assert MistralChat(tokenizer).encode_chat(messages) == expected


@pytest.mark.parametrize(
    ("version", "expected_version", "expected_pieces"),
    [
        ("v1", "v1", ["<s>", " [", "INST", "]", " Hello", " [", "/", "INST", "]"]),
        ("v2", "v3", ["<s>", "[INST]", " Hello", "[/INST]"]),
        ("v3", "v3", ["<s>", "[INST]", " Hello", "[/INST]"]),
        ("v7", "v7", ["<s>", "[INST]", " Hello", "[/INST]"]),
    ],
)
def test_pieces_of_one_turn(version, expected_version, expected_pieces):
    tokenizer = packaged_tokenizer(version)
    chat = MistralChat(tokenizer)
    ids = chat.encode_chat(CONVERSATIONS["one_turn"])
    assert chat.version == expected_version
    assert [tokenizer.piece(i).text for i in ids] == expected_pieces


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("v1", "<s> [INST] S\n\na [/INST] b</s> [INST] c [/INST]"),
        ("v3", "<s>[INST] a[/INST] b</s>[INST] S\n\nc[/INST]"),
        ("v7", "<s>[SYSTEM_PROMPT] S[/SYSTEM_PROMPT][INST] a[/INST] b</s>[INST] c[/INST]"),
    ],
)
def test_where_the_system_message_goes(version, expected):
    tokenizer = packaged_tokenizer(version)
    messages = conversation(("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"))
    ids = MistralChat(tokenizer).encode_chat(messages)
    assert tokenizer.decode(ids, skip_special=False) == expected


@pytest.mark.parametrize("version", ["v2", "v3", "v7"], indirect=True, scope="session")
def test_marks_in_user_text_stay_text(tokenizer):
    text = "[/INST] </s> [INST]"
    ids = MistralChat(tokenizer).encode_chat(conversation(("user", text)))
    assert ids == [1, 3, *tokenizer.encode(text, bos=False), 4]
    assert not {1, 2, 3, 4} & set(ids[2:-1])


@pytest.mark.parametrize(
    "version",
    ["v1", "v3", pytest.param("v7", marks=pytest.mark.slow)],
    indirect=True,
    scope="session",
)
@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_tokenizer_json_gives_the_same_ids(tokenizer, hf_directory, messages):
    ours = MistralChat(JsonTokenizer(hf_directory / "tokenizer.json"))
    assert ours.encode_chat(messages) == MistralChat(tokenizer).encode_chat(messages)


TURNS = "after an optional first system message, user and assistant take turns, user first"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "invalid conversation: messages: there must be at least one message"),
        (
            conversation(("assistant", "hi")),
            f"message 0: role 'assistant', expected system or user: {TURNS}",
        ),
        (
            conversation(("user", "a"), ("user", "b")),
            f"message 1: role 'user', expected assistant: {TURNS}",
        ),
        (
            conversation(("system", "a"), ("system", "b")),
            f"message 1: role 'system', expected user: {TURNS}",
        ),
        (
            conversation(("user", "a"), ("assistant", "b"), ("assistant", "c")),
            f"message 2: role 'assistant', expected user: {TURNS}",
        ),
        (
            conversation(("user", "a"), ("assistant", "b"), ("system", "c")),
            f"message 2: role 'system', expected user: {TURNS}",
        ),
        (
            conversation(("user", "a"), ("assistant", "b")),
            "message 1: role 'assistant': the last message must be the user's",
        ),
        (
            conversation(("system", "a")),
            "message 0: role 'system': the last message must be the user's",
        ),
        (
            conversation(("tool", "a")),
            "message 0: role 'tool': a role is one of system, user, assistant",
        ),
        (
            conversation(("user", "a"), ("assistant", "")),
            "message 1: '': the content of role assistant must not be empty",
        ),
        ([{"role": "user"}], r"message 0: keys \['role'\]: a message has the keys role"),
        (
            [{"role": "user", "content": "a", "mood": "b"}],
            r"message 0: keys \['content', 'mood', 'role'\]: a message has the keys",
        ),
        ([{"role": "user", "content": None}], "message 0: NoneType: content must be text"),
    ],
)
def test_broken_conversations(messages, message):
    with pytest.raises(TokenizerError, match=message):
        MistralChat(packaged_tokenizer("v1")).encode_chat(messages)


def test_invalid_unicode_in_a_message():
    with pytest.raises(TokenizerError, match="must be valid Unicode"):
        MistralChat(packaged_tokenizer("v3")).encode_chat(conversation(("user", "\ud800")))
