"""Ids of tokenizer.json against transformers, and against tokenizer.model."""

import json
import shutil

import pytest

from mistral_ms.errors import TokenizerError
from mistral_ms.tokenizer import PieceKind, packaged_tokenizer
from mistral_ms.tokenizer.json_model import JsonTokenizer


@pytest.fixture(scope="session")
def json_tokenizer(hf_directory):
    return JsonTokenizer(hf_directory / "tokenizer.json")


@pytest.fixture
def edited(hf_directory, tmp_path):
    """A copy of the converted tokenizer with some keys of tokenizer.json changed."""

    def edit(change, config=None):
        source = json.loads((hf_directory / "tokenizer.json").read_text())
        change(source)
        (tmp_path / "tokenizer.json").write_text(json.dumps(source))
        if config is not None:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return tmp_path / "tokenizer.json"

    return edit


def test_plain_ids_equal_hugging_face(json_tokenizer, hf_fast, plain_texts):
    for name, text in plain_texts.items():
        assert json_tokenizer.encode(text) == hf_fast.encode(text), name


def test_ids_equal_those_of_the_sentencepiece_model(json_tokenizer, tokenizer, all_texts):
    """Texts with the names of control tokens included: they stay text in both."""
    for text in all_texts:
        assert json_tokenizer.encode(text) == tokenizer.encode(text), text


def test_decode_equals_hugging_face(json_tokenizer, hf_fast, plain_texts):
    for name, text in plain_texts.items():
        ids = json_tokenizer.encode(text)
        assert json_tokenizer.decode(ids) == hf_fast.decode(ids, skip_special_tokens=True), name


def test_every_piece_equals_the_sentencepiece_model(json_tokenizer, tokenizer):
    assert json_tokenizer.vocab_size == tokenizer.vocab_size
    for i in range(tokenizer.vocab_size + 2):
        assert json_tokenizer.piece(i) == tokenizer.piece(i)
    assert json_tokenizer.drops_first_space == tokenizer.drops_first_space


def test_special_ids(json_tokenizer, tokenizer):
    assert (json_tokenizer.bos_id, json_tokenizer.eos_ids) == (1, (2,))
    for name in ("<s>", "[INST]", "[SYSTEM_PROMPT]", "hello", "no such thing"):
        assert json_tokenizer.control_id(name) == tokenizer.control_id(name)


def test_a_lone_surrogate_is_an_error(json_tokenizer):
    with pytest.raises(TokenizerError, match=r"character 0: .*must be valid Unicode"):
        json_tokenizer.encode("\udfff")


def test_a_negative_id_is_an_error(json_tokenizer):
    with pytest.raises(TokenizerError, match="not a token id: -1"):
        json_tokenizer.decode([-1])


@pytest.mark.parametrize("version", ["v1"], indirect=True, scope="session")
class TestOneVersion:
    """Behaviour that does not depend on the vocabulary."""

    def test_truncation_and_padding_of_the_file_are_off(self, edited):
        def change(source):
            source["truncation"] = {
                "direction": "Right",
                "max_length": 4,
                "strategy": "LongestFirst",
                "stride": 0,
            }
            source["padding"] = {
                "strategy": {"Fixed": 64},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "<unk>",
            }

        text = "a text of more than four tokens"
        expected = packaged_tokenizer("v1").encode(text)
        assert JsonTokenizer(edited(change)).encode(text) == expected

    def test_eos_is_the_one_that_the_config_names(self, edited):
        def change(source):
            source["added_tokens"].append(
                source["added_tokens"][2] | {"id": 32000, "content": "<|im_end|>"}
            )

        path = edited(change, {"bos_token": "<s>", "eos_token": {"content": "<|im_end|>"}})
        tokenizer = JsonTokenizer(path)
        assert tokenizer.eos_ids == (32000,)
        assert tokenizer.vocab_size == 32001
        assert tokenizer.piece(32000).kind is PieceKind.CONTROL

    def test_missing_eos(self, edited):
        path = edited(lambda source: None, {"eos_token": "<|end|>"})
        with pytest.raises(TokenizerError, match=r"no '<\|end\|>' \(eos_token\): BOS and EOS must"):
            JsonTokenizer(path)

    def test_without_byte_fallback(self, edited):
        path = edited(lambda source: source["model"].update(byte_fallback=False))
        with pytest.raises(TokenizerError, match=r"unsupported tokenizer: .*must become byt"):
            JsonTokenizer(path)

    def test_a_file_that_adds_no_space_keeps_the_first_one(self, edited):
        def change(source):
            source["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
            source["decoder"]["decoders"] = source["decoder"]["decoders"][:-1]

        tokenizer = JsonTokenizer(edited(change))
        assert not tokenizer.drops_first_space
        for text in ("a b", " a b", "  a"):
            assert tokenizer.decode(tokenizer.encode(text)) == text

    def test_ids_that_no_embedding_has_rows_for(self, edited):
        """The library would ask for the memory, and end the process."""
        path = edited(lambda source: source["model"]["vocab"].update({"<0xC7>": 2**31}))
        with pytest.raises(TokenizerError, match=r"'<0xC7>' has the id 2147483648: must be 0 to"):
            JsonTokenizer(path)
        name = {"content": "<0xC7>", "id": 5}  # an added token of that name hides nothing
        path = edited(
            lambda source: (
                source["model"]["vocab"].update({"<0xC7>": 2**31})
                or source["added_tokens"].append(source["added_tokens"][0] | name)
            )
        )
        with pytest.raises(TokenizerError, match=r"'<0xC7>' has the id 2147483648: must be 0 to"):
            JsonTokenizer(path)
        path = edited(lambda source: source["added_tokens"][0].update(id=-1))
        with pytest.raises(TokenizerError, match=r"has the id -1: must be 0 to"):
            JsonTokenizer(path)

    def test_a_decoder_that_panics(self, edited):
        """A panic of the library is no Exception of Python's."""

        def change(source):
            source["decoder"]["decoders"][-1].update(stop=253)

        with pytest.raises(TokenizerError, match=r"damaged tokenizer: .*index out of bounds"):
            JsonTokenizer(edited(change))
        prefix = dict(continuing_subword_prefix="a long one")
        with pytest.raises(TokenizerError, match=r"damaged tokenizer: .*out of bounds"):
            JsonTokenizer(edited(lambda source: source["model"].update(prefix)))

    def test_damaged_config(self, hf_directory, tmp_path):
        shutil.copyfile(hf_directory / "tokenizer.json", tmp_path / "tokenizer.json")
        (tmp_path / "tokenizer_config.json").write_text("[1]")
        with pytest.raises(TokenizerError, match=r"tokenizer_config.json: list: must be an object"):
            JsonTokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("content", [b"", b"{}", b'{"model": 1'])
def test_damaged_file(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match=r"damaged tokenizer: .*tokenizer.json: .*transfor"):
        JsonTokenizer(path)


def test_missing_file(tmp_path):
    with pytest.raises(TokenizerError, match=r"cannot read: .*tokenizer.json: No such file"):
        JsonTokenizer(tmp_path / "tokenizer.json")
