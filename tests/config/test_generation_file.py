"""generation_config.json: what transformers would make of the same file."""

import json

import pytest

from mistral_ms.config import read_end_tokens, read_generation_file
from mistral_ms.errors import ConfigError


def write(tmp_path, **values):
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    return tmp_path


def test_no_file_says_nothing(tmp_path):
    file = read_generation_file(tmp_path)
    assert (file.path, file.eos_token_ids, dict(file.sampling)) == (None, None, {})
    assert read_end_tokens(tmp_path) == ()


@pytest.mark.parametrize(("eos", "expected"), [(2, (2,)), ([2, 5], (2, 5)), (None, None)])
def test_end_tokens(tmp_path, eos, expected):
    write(tmp_path, eos_token_id=eos, bos_token_id=1, pad_token_id=7)
    file = read_generation_file(tmp_path)
    assert (file.eos_token_ids, file.bos_token_id, file.pad_token_id) == (expected, 1, 7)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": [9]}))
    assert read_end_tokens(tmp_path) == (expected or (9,))


@pytest.mark.parametrize(
    "values",
    [
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0},
        {"do_sample": True, "temperature": 0.6, "repetition_penalty": 1.1},
    ],
)
def test_sampling_is_what_transformers_would_do(tmp_path, values):
    from transformers import GenerationConfig

    theirs = GenerationConfig.from_pretrained(write(tmp_path, **values))
    sampling = read_generation_file(tmp_path).sampling
    assert sampling == {key: getattr(theirs, key) for key in sampling}
    assert set(sampling) == {"temperature", "top_p", "top_k", "repetition_penalty"}


def test_without_do_sample_only_the_penalty_is_left(tmp_path):
    write(tmp_path, temperature=0.7, top_p=0.9, repetition_penalty=1.2)
    assert read_generation_file(tmp_path).sampling == {"repetition_penalty": 1.2}


def test_what_is_not_supported_is_named_and_neutral_values_are_not(tmp_path):
    from transformers import GenerationConfig

    assert not read_generation_file(write(tmp_path, **GenerationConfig().to_dict())).unsupported
    odd = {"num_beams": 4, "min_p": 0.1, "no_repeat_ngram_size": 3, "something_new": 1}
    neutral = {"num_beams": 1, "min_p": None, "length_penalty": 1.0, "transformers_version": "4"}
    assert read_generation_file(write(tmp_path, **neutral)).unsupported == {}
    assert read_generation_file(write(tmp_path, **odd)).unsupported == odd


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eos_token_id": "</s>"}, "eos_token_id: '</s>': must be a token id"),
        ({"eos_token_id": [2, -1]}, "eos_token_id: -1"),
        ({"pad_token_id": True}, "pad_token_id: True"),
        ({"temperature": "hot"}, "temperature: 'hot': must be a number"),
        ({"do_sample": 1}, "do_sample: 1: must be true or false"),
    ],
)
def test_wrong_values(tmp_path, values, message):
    with pytest.raises(ConfigError, match=rf"generation_config.json: {message}"):
        read_generation_file(write(tmp_path, **values))
