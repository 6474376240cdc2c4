"""Tokens of texts equal one call of the tokenizer; masks of conversations, token by token."""

import functools
import random

import pytest

from mistral_ms.config import DataConfig
from mistral_ms.datasets import DocumentEncoder, vocabulary_digest
from mistral_ms.datasets.documents import ChatDocument, TextDocument
from mistral_ms.datasets.encoding import newline_stands_alone
from mistral_ms.tokenizer import MistralChat, Piece, PieceKind, packaged_tokenizer

VERSIONS = ["v1", "v2", "v3", "v7"]
packaged = functools.cache(packaged_tokenizer)


def conversation(*contents, system=None):
    roles = ["user", "assistant"] * len(contents)
    turns = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return [{"role": "system", "content": system}, *turns] if system else turns


CONVERSATIONS = {
    "one": conversation("Hello", "Good day."),
    "two": conversation("What is a tide?", "Moon and water. ", "", "🤗 hi\nthere"),
    "system": conversation("Hi", "Yo", "And?", "No.", "Why", "So", system="Be brief."),
}


def encode(document, tokenizer, **config):
    encoder = DocumentEncoder(tokenizer, DataConfig(seq_length=4, **config))
    return encode_with(encoder, document)


def encode_with(encoder, document):
    runs = list(encoder.runs(document))
    assert [run.starts for run in runs] == [True] + [False] * (len(runs) - 1)
    ids = [i for run in runs for i in run.ids_T.tolist()]
    return ids, [c for run in runs for c in run.counted_T.tolist()]


@pytest.mark.parametrize("bos", [True, False])
@pytest.mark.parametrize("eos", [True, False])
def test_bos_and_eos(bos, eos, tokenizer):
    ids, counted = encode(TextDocument(iter(["A tide"])), tokenizer, add_bos=bos, add_eos=eos)
    assert ids == [1] * bos + tokenizer.encode("A tide", bos=False) + [2] * eos
    assert counted == [True] * len(ids)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_text_cut_at_line_breaks_has_the_same_tokens(version):
    tokenizer, rng = packaged(version), random.Random(0)
    encoder = DocumentEncoder(tokenizer, DataConfig(seq_length=4, add_eos=False))
    for _ in range(200):
        text = "".join(rng.choices("ab \n\n\t▁é🤗\r<s>", k=rng.randint(1, 25)))
        cuts = [i for i, c in enumerate(text) if i and c == "\n" and rng.random() < 0.6]
        chunks = [text[a:b] for a, b in zip([0, *cuts], [*cuts, None], strict=True)]
        ids, _ = encode_with(encoder, TextDocument(iter(chunks)))
        assert ids == tokenizer.encode(text), chunks


class WithNewlines:
    """A vocabulary in which a line break may be part of a longer token."""

    vocab_size, bos_id, eos_ids, files, adds_bos = 3, 0, (0,), {}, True

    def encode(self, text, bos=True):
        return [0] * bos + [1 if text == "\n" else 2]

    def piece(self, token_id):
        return Piece(PieceKind.TEXT, ["<s>", "\n", "a\nb"][token_id])


def test_a_text_is_never_cut_for_a_tokenizer_that_would_notice(tokenizer):
    assert newline_stands_alone(tokenizer)
    assert not newline_stands_alone(WithNewlines())
    document = TextDocument(iter(["a", "\nb", "\nc"]))
    assert encode(document, WithNewlines())[0] == [0, 2, 0]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_conversations_equal_mistral_common(version, messages):
    """Its own encoding of a conversation that goes on to the end, made for finetuning."""
    from mistral_common.protocol.instruct.request import ChatCompletionRequest
    from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

    theirs = getattr(MistralTokenizer, version)()
    request = ChatCompletionRequest(messages=messages)
    normalised = theirs._instruct_request_normalizer.from_chat_completion_request(request)
    expected = theirs.instruct_tokenizer.encode_instruct(normalised).tokens
    dialogue = MistralChat(packaged(version)).encode_dialogue(messages)
    ids, counted = dialogue.ids, dialogue.counted
    assert ids == expected
    assert len(counted) == len(ids)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("messages", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_exactly_the_answers_and_their_eos_count(version, messages):
    tokenizer = packaged(version)
    dialogue = MistralChat(tokenizer).encode_dialogue(messages)
    ids, counted = dialogue.ids, dialogue.counted
    expected = []
    for message in messages:
        if message["role"] == "assistant":
            content = message["content"] if version == "v1" else message["content"].rstrip(" ")
            expected += [*tokenizer.encode(content, bos=False), tokenizer.eos_ids[0]]
    assert [i for i, c in zip(ids, counted, strict=True) if c] == expected


T, F = True, False
BY_HAND = {
    "v1": (
        "<s>| [|INST|]| Be| brief|.|<0x0A>|<0x0A>|Hi| [|/|INST|]| Y|o|</s>"
        "| [|INST|]| And|?| [|/|INST|]| No|</s>",
        [F] * 14 + [T] * 3 + [F] * 9 + [T] * 2,
    ),
    "v3": (
        "<s>|[INST]| Hi|[/INST]| Y|o|</s>|[INST]| Be| brief|.|<0x0A>|<0x0A>|And|?|[/INST]| No|</s>",
        [F] * 4 + [T] * 3 + [F] * 9 + [T] * 2,
    ),
    "v7": (
        "<s>|[SYSTEM_PROMPT]| Be| brief|.|[/SYSTEM_PROMPT]|[INST]| Hi|[/INST]| Y|o|</s>"
        "|[INST]| And|?|[/INST]| No|</s>",
        [F] * 9 + [T] * 3 + [F] * 4 + [T] * 2,
    ),
}


@pytest.mark.parametrize("version", BY_HAND)
def test_masks_by_hand(version):
    tokenizer = packaged(version)
    messages = conversation("Hi", "Yo", "And?", "No", system="Be brief.")
    ids, counted = encode(ChatDocument(messages, None, "a.jsonl, line 1"), tokenizer)
    pieces = [tokenizer.piece(i) for i in ids]
    shown = [f"<0x{p.data[0]:02X}>" if p.kind is PieceKind.BYTE else p.text for p in pieces]
    assert "|".join(shown) == BY_HAND[version][0]
    assert counted == BY_HAND[version][1]


def test_digest_tells_vocabularies_apart():
    digests = {version: vocabulary_digest(packaged(version)) for version in VERSIONS}
    assert len(set(digests.values())) == 4
    assert vocabulary_digest(packaged_tokenizer("v1")) == digests["v1"]


def test_digest_notices_two_ids_that_changed_places():
    class Swapped(WithNewlines):
        def piece(self, token_id):
            return super().piece([0, 2, 1][token_id])

    assert vocabulary_digest(Swapped()) != vocabulary_digest(WithNewlines())
