"""Which file of a directory is the tokenizer, what goes into checkpoints, does it fit the model."""

import json
import shutil

import pytest

from mistral_ms.config import ModelConfig
from mistral_ms.data import TOKENIZER_CONFIG
from mistral_ms.errors import TokenizerError
from mistral_ms.tokenizer import (
    check_vocabulary,
    copy_files,
    find_tokenizer,
    load_tokenizer,
    packaged_tokenizer,
)
from mistral_ms.tokenizer.json_model import JsonTokenizer
from mistral_ms.tokenizer.load import PACKAGED
from mistral_ms.tokenizer.sentencepiece_model import SentencePieceTokenizer

PLAIN_CONFIG = {"tokenizer_config.json": TOKENIZER_CONFIG}


def put(directory, version, name):
    source = packaged_tokenizer(version).files["tokenizer.model"]
    return shutil.copyfile(source, directory / name)


def small_config(vocab_size):
    return ModelConfig(
        vocab_size=vocab_size,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )


@pytest.mark.parametrize(
    "name", ["tokenizer.model", *(f"tokenizer.model.v{n}" for n in (1, 2, 3, 7))]
)
def test_every_name_of_a_sentencepiece_model(tmp_path, name):
    path = put(tmp_path, "v3", name)
    for place in (tmp_path, path):
        tokenizer = load_tokenizer(place)
        assert isinstance(tokenizer, SentencePieceTokenizer)
        assert tokenizer.vocab_size == 32768
        assert tokenizer.files == {"tokenizer.model": path, **PLAIN_CONFIG}


def test_tokenizer_model_wins_over_its_versioned_neighbour(tmp_path):
    put(tmp_path, "v3", "tokenizer.model.v3")
    put(tmp_path, "v1", "tokenizer.model")
    assert load_tokenizer(tmp_path).vocab_size == 32000


def test_a_damaged_tokenizer_json_is_not_passed_over(tmp_path):
    put(tmp_path, "v1", "tokenizer.model")
    (tmp_path / "tokenizer.json").write_text("damaged")
    with pytest.raises(TokenizerError, match=r"damaged tokenizer: .*tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("version", ["v1"], indirect=True, scope="session")
def test_tokenizer_json_alone(hf_directory):
    for place in (hf_directory, hf_directory / "tokenizer.json"):
        tokenizer = load_tokenizer(place)
        assert isinstance(tokenizer, JsonTokenizer)
        assert tokenizer.files == {
            name: hf_directory / name
            for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
        }


def test_no_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        TokenizerError, match=r"no tokenizer: .*needs one of tokenizer.model, .*jso"
    ):
        load_tokenizer(tmp_path)


def test_no_such_directory(tmp_path):
    with pytest.raises(TokenizerError, match=r"absent: no such file or directory: needs one of"):
        load_tokenizer(tmp_path / "absent")


@pytest.mark.parametrize("content", ["{}", "[1]", "", '{"config": {"version": "v3"}}'])
def test_a_damaged_tekken(tmp_path, content):
    (tmp_path / "tekken.json").write_text(content)
    with pytest.raises(TokenizerError, match=r"damaged tokenizer: .*tekken\.json: "):
        load_tokenizer(tmp_path)


def test_damage_is_reported_with_the_path(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"x" * 100)
    with pytest.raises(
        TokenizerError, match=rf"damaged tokenizer: {tmp_path}/tokenizer.model: 100"
    ):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("version", sorted(PACKAGED))
def test_packaged(version):
    tokenizer = packaged_tokenizer(version)
    assert tokenizer.vocab_size == (32000 if version == "v1" else 32768)


def test_unknown_packaged_version():
    with pytest.raises(TokenizerError, match="unknown tokenizer: 'v9': packaged: v1, v2, v3, v7"):
        packaged_tokenizer("v9")


def test_vocabulary_fits():
    check_vocabulary(packaged_tokenizer("v1"), small_config(32000))
    check_vocabulary(packaged_tokenizer("v1"), small_config(32768))


def test_vocabulary_too_large_names_both_sizes():
    with pytest.raises(
        TokenizerError, match="32768 ids, the model's vocab_size is 32000: every id"
    ):
        check_vocabulary(packaged_tokenizer("v3"), small_config(32000))


@pytest.mark.parametrize("version", ["v1", "v3"], indirect=True, scope="session")
@pytest.mark.parametrize("use_fast", [True, False])
def test_copied_files_load_again_here_and_in_transformers(tmp_path, tokenizer, use_fast):
    """What `convert` writes for Hugging Face: the files, next to a config.json."""
    from transformers import AutoTokenizer

    names = ("tokenizer.model", "tokenizer_config.json")
    assert copy_files(tokenizer, tmp_path) == tuple(tmp_path / name for name in names)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    text = "  The tide turns at nine — 你好 🤗"
    expected = tokenizer.encode(text)
    assert load_tokenizer(tmp_path).encode(text) == expected
    theirs = AutoTokenizer.from_pretrained(tmp_path, use_fast=use_fast)
    assert theirs.encode(text) == expected
    assert theirs.decode(expected, skip_special_tokens=True).strip() == text.strip()


def test_copying_onto_itself_changes_nothing(tmp_path):
    path = put(tmp_path, "v1", "tokenizer.model")
    before = path.read_bytes()
    assert copy_files(load_tokenizer(tmp_path), tmp_path)[0] == path
    assert path.read_bytes() == before


class TestFind:
    def test_a_name_or_a_path(self, tmp_path):
        put(tmp_path, "v3", "tokenizer.model")
        assert find_tokenizer("packaged-v1").vocab_size == 32000
        assert find_tokenizer(str(tmp_path)).vocab_size == 32768

    def test_an_unknown_name(self):
        with pytest.raises(TokenizerError, match=r"unknown tokenizer: 'v9': packaged: v1, v2"):
            find_tokenizer("packaged-v9")
