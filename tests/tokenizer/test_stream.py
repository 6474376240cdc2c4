"""Streamed text: the joined pushes are the whole text, and nothing is shown too early."""

import random

import pytest
import sentencepiece

from mistral_ms.tokenizer import StreamDecoder, packaged_tokenizer


@pytest.fixture(scope="module")
def v1():
    return packaged_tokenizer("v1")


def byte_ids(data):
    """In v1 the byte tokens are 3 to 258."""
    return [3 + byte for byte in data]


def streamed(tokenizer, ids, **options):
    stream = StreamDecoder(tokenizer, **options)
    return [*(stream.push(i) for i in ids), stream.flush()]


def random_ids(tokenizer, generator):
    """Words, single bytes, pieces of real characters, control and unknown tokens, bare spaces."""
    first_byte = 3 if tokenizer.vocab_size == 32000 else 771
    ids = []
    for _ in range(generator.randint(0, 10)):
        kind = generator.randrange(6)
        if kind == 0:
            ids.append(generator.randrange(tokenizer.vocab_size))
        elif kind == 1:
            ids.append(first_byte + generator.randrange(256))
        elif kind == 2:
            character = generator.choice("é你🤗\U0010fffd ").encode()
            ids += [first_byte + b for b in character[: generator.randint(1, 4)]]
        elif kind == 3:
            ids.append(generator.choice([0, 1, 2]))
        elif kind == 4:
            ids += tokenizer.encode(generator.choice(["", " ", "a"]), bos=False)
        else:  # leads and continuations that come close to being a character
            edge = [0x80, 0xBF, 0xC0, 0xC2, 0xE0, 0xED, 0xF0, 0xF4, 0xF5, 0xFF]
            ids += [first_byte + b for b in generator.choices(edge, k=3)]
    return ids


def test_joined_pushes_equal_sentencepiece(tokenizer):
    """The oracle decodes the whole sequence at once, in C++."""
    theirs = sentencepiece.SentencePieceProcessor(str(tokenizer.files["tokenizer.model"]))
    generator = random.Random(7)
    for _ in range(2000):
        ids = random_ids(tokenizer, generator)
        assert "".join(streamed(tokenizer, ids)) == theirs.decode(ids), ids


@pytest.mark.parametrize("skip_special", [True, False])
def test_joined_pushes_equal_decode(v1, skip_special):
    generator = random.Random(8)
    for _ in range(500):
        ids = random_ids(v1, generator)
        joined = "".join(streamed(v1, ids, skip_special=skip_special))
        assert joined == v1.decode(ids, skip_special)


def test_any_two_bytes_and_any_truncated_character(v1):
    """All pairs of bytes: every lead with every continuation, right or wrong."""
    theirs = sentencepiece.SentencePieceProcessor(str(v1.files["tokenizer.model"]))
    for first in range(0, 256):
        for second in range(0x70, 0x100, 5):
            for tail in (b"", b"\x80", b"\x80\x80", b"A"):
                ids = byte_ids(bytes([first, second]) + tail)
                assert "".join(streamed(v1, ids)) == theirs.decode(ids), ids


def test_no_replacement_character_while_an_emoji_is_unfinished(v1):
    assert streamed(v1, byte_ids("🤗".encode())) == ["", "", "", "🤗", ""]


def test_an_unfinished_character_is_given_up_when_text_follows(v1):
    ids = [*byte_ids("🤗".encode()[:2]), *v1.encode("a", bos=False)]
    assert streamed(v1, ids) == ["", "", "\ufffd\ufffd a", ""]


def test_an_unfinished_character_is_given_up_at_the_end(v1):
    assert streamed(v1, byte_ids("你".encode()[:2])) == ["", "", "\ufffd\ufffd"]


@pytest.mark.parametrize("byte", [0x80, 0xBF, 0xC0, 0xC1, 0xF5, 0xF7, 0xF8, 0xFF], ids=hex)
def test_a_byte_that_begins_no_character_is_shown_at_once(v1, byte):
    assert streamed(v1, byte_ids([byte, 0x80, 0x41])) == ["\ufffd", "\ufffd", "A", ""]


@pytest.mark.parametrize("byte", [0xC2, 0xDF, 0xE0, 0xEF, 0xF0, 0xF4], ids=hex)
def test_a_byte_that_may_begin_a_character_is_held(v1, byte):
    assert streamed(v1, byte_ids([byte])) == ["", "\ufffd"]


def test_valid_text_never_shows_a_replacement_character(tokenizer, plain_texts):
    for name, text in plain_texts.items():
        if "\ufffd" not in text:
            pushes = streamed(tokenizer, tokenizer.encode(text))
            assert not any("\ufffd" in push for push in pushes), name


def test_only_the_very_first_space_is_dropped(v1):
    ids = v1.encode("The tide turns")
    assert streamed(v1, ids) == ["", "The", " tide", " turns", ""]


@pytest.mark.parametrize("start", ["", "<s>"])
def test_a_bare_space_piece_first(v1, start):
    space, word = v1.encode(" two", bos=False)
    ids = [1] * bool(start) + [space, word]
    assert "".join(streamed(v1, ids)) == " two"


def test_text_that_continues_a_prompt_keeps_its_space(v1):
    prompt, more = v1.encode("The tide"), v1.encode("turns", bos=False)
    assert "".join(streamed(v1, more)) == "turns"
    assert "".join(streamed(v1, more, context=prompt)) == " turns"


def test_a_character_split_between_context_and_pushes(v1):
    ids = byte_ids("🤗".encode())
    assert "".join(streamed(v1, ids[2:], context=ids[:2])) == "🤗"


def test_a_push_costs_the_same_after_a_long_text(v1):
    """Counted, not timed: one look at the vocabulary for each push, and no decode of the whole."""

    class Counting:
        drops_first_space = True
        byte_level = False
        looked = 0

        def piece(self, token_id):
            self.looked += 1
            return v1.piece(token_id)

    counting = Counting()
    stream = StreamDecoder(counting)
    ids = v1.encode("the quick brown fox " * 500)
    for token_id in ids:
        stream.push(token_id)
    assert counting.looked == len(ids)
    assert len(stream._bytes) == 0
