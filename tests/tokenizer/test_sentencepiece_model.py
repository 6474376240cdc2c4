"""Ids of tokenizer.model against Hugging Face's LlamaTokenizer on the same file."""

import pytest
import sentencepiece

from mistral_ms.errors import TokenizerError
from mistral_ms.tokenizer import PieceKind, packaged_tokenizer
from mistral_ms.tokenizer.sentencepiece_model import SentencePieceTokenizer


def reference(tokenizer):
    """sentencepiece itself."""
    path = str(tokenizer.files["tokenizer.model"])
    return sentencepiece.SentencePieceProcessor(model_file=path)


def test_plain_ids_equal_hugging_face(tokenizer, hf_slow, plain_texts):
    for name, text in plain_texts.items():
        assert tokenizer.encode(text) == hf_slow.encode(text), name


def test_ids_equal_hugging_face_without_special_tokens_in_text(tokenizer, hf_slow, all_texts):
    """split_special_tokens is HF's name for: text stays text."""
    for text in all_texts:
        assert tokenizer.encode(text) == hf_slow.encode(text, split_special_tokens=True), text


def test_ids_equal_hugging_face_non_legacy(tokenizer, hf_slow_non_legacy, plain_texts):
    for name, text in plain_texts.items():
        assert tokenizer.encode(text) == hf_slow_non_legacy.encode(text), name


def test_text_never_becomes_a_control_token(tokenizer, all_texts):
    for text in all_texts:
        kinds = {tokenizer.piece(i).kind for i in tokenizer.encode(text, bos=False)}
        assert kinds <= {PieceKind.TEXT, PieceKind.BYTE}, text


def test_bos_on_request(tokenizer):
    assert tokenizer.encode("hi") == [1, *tokenizer.encode("hi", bos=False)]
    assert tokenizer.encode("", bos=False) == []


def test_decode_equals_sentencepiece(tokenizer, all_texts):
    theirs = reference(tokenizer)
    for text in all_texts:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == theirs.decode(ids), text


def test_decode_gives_the_text_back(tokenizer, all_texts):
    for text in all_texts:
        expected = text.replace("▁", " ")  # sentencepiece cannot tell the mark from a space
        assert tokenizer.decode(tokenizer.encode(text)) == expected


def test_decode_shows_control_tokens_on_request(tokenizer):
    ids = [*tokenizer.encode("Hello world"), 2]
    assert tokenizer.decode(ids) == "Hello world"
    assert tokenizer.decode(ids, skip_special=False) == "<s> Hello world</s>"


def test_sizes_and_special_ids(version, tokenizer):
    assert tokenizer.vocab_size == (32000 if version == "v1" else 32768)
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))


def test_every_piece_equals_sentencepiece(tokenizer):
    theirs = reference(tokenizer)
    for i in range(tokenizer.vocab_size):
        piece = tokenizer.piece(i)
        expected = (
            PieceKind.BYTE
            if theirs.IsByte(i)
            else PieceKind.CONTROL
            if theirs.IsControl(i)
            else PieceKind.UNKNOWN
            if theirs.IsUnknown(i)
            else PieceKind.TEXT
        )
        assert piece.kind is expected
        if expected is PieceKind.BYTE:
            assert theirs.id_to_piece(i) == f"<0x{piece.data[0]:02X}>"
        elif expected is PieceKind.TEXT:
            assert theirs.id_to_piece(i) == piece.text.replace(" ", "▁")


@pytest.mark.parametrize(
    ("version", "name", "expected"),
    [
        ("v1", "<s>", 1),
        ("v1", "[INST]", None),
        ("v2", "[/INST]", 4),
        ("v3", "[INST]", 3),
        ("v3", "[SYSTEM_PROMPT]", None),
        ("v7", "[SYSTEM_PROMPT]", 16),
        ("v7", "hello", None),
        ("v7", "no such thing", None),
    ],
)
def test_control_ids(version, name, expected):
    assert packaged_tokenizer(version).control_id(name) == expected


def test_an_id_beyond_the_vocabulary_is_shown_not_raised():
    tokenizer = packaged_tokenizer("v1")
    assert tokenizer.decode([*tokenizer.encode("a"), 32000, 40000]) == "a ⁇  ⁇ "


def test_a_negative_id_is_an_error():
    with pytest.raises(TokenizerError, match="not a token id: -100: ids start at 0"):
        packaged_tokenizer("v1").decode([1, -100])


def test_a_lone_surrogate_is_an_error():
    with pytest.raises(TokenizerError, match=r"character 1: '\\ud83d': must be valid Unicode"):
        packaged_tokenizer("v1").encode("a\ud83d")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "damaged tokenizer: .*tokenizer.model: empty: must be a sentencepiece model"),
        (b"<html>not found</html>", "damaged tokenizer: .*must be a sentencepiece model"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer: .*git lfs pull"),
    ],
    ids=["empty", "garbage", "lfs_pointer"],
)
def test_damaged_file(tmp_path, content, message):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match=message):
        SentencePieceTokenizer(path)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.999])
def test_truncated_file(tmp_path, fraction):
    whole = packaged_tokenizer("v1").files["tokenizer.model"].read_bytes()
    path = tmp_path / "tokenizer.model"
    path.write_bytes(whole[: int(len(whole) * fraction)])
    with pytest.raises(TokenizerError, match=r"tokenizer: .*tokenizer.model: "):
        SentencePieceTokenizer(path)


def test_file_cut_between_two_entries(tmp_path):
    """Still a valid protocol buffer, but the settings at its end and some entries are gone."""
    from sentencepiece import sentencepiece_model_pb2

    whole = packaged_tokenizer("v1").files["tokenizer.model"].read_bytes()
    model = sentencepiece_model_pb2.ModelProto.FromString(whole)
    for field in ("trainer_spec", "normalizer_spec"):
        model.ClearField(field)
    del model.pieces[3:]
    model.pieces.add(piece="a", score=0.0)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(TokenizerError, match=r"must become bytes.*the file is damaged"):
        SentencePieceTokenizer(path)


def test_missing_file(tmp_path):
    with pytest.raises(TokenizerError, match=r"cannot read: .*absent.model: No such file"):
        SentencePieceTokenizer(tmp_path / "absent.model")
