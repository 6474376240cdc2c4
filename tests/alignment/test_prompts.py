"""Which token ids both sides of an alignment get."""

import pytest
from support.configs import model
from support.tokenizers import SIZE, auto, write

from mistral_ms.alignment.align import DEFAULT_PROMPTS, _check_ids, _prompt_ids
from mistral_ms.cli.output import read_ids
from mistral_ms.errors import ConfigError, GenerationError, TokenizerError


def test_ids_of_a_file(tmp_path):
    path = tmp_path / "ids.txt"
    path.write_text("[1, 5, 7]\n\n3 4\n9,10\n")
    assert read_ids(path) == [[1, 5, 7], [3, 4], [9, 10]]
    path.write_text("1 2\n3 -4\n")
    with pytest.raises(ConfigError, match=r"not a token id: .*ids.txt, line 2: '-4'"):
        read_ids(path)


def test_ids_must_be_of_the_model():
    config = model(vocab_size=10)
    _check_ids([[0, 9]], config)
    for ids, message in (([[1], [10]], "prompt 1: 10: 0 to 9"), ([[]], "empty"), ([], "no promp")):
        with pytest.raises(GenerationError, match=message):
            _check_ids(ids, config)


def test_texts_get_the_ids_of_auto_tokenizer(tmp_path):
    path = write(tmp_path / "m", {"add_bos_token": False})
    found = _prompt_ids(path, model(vocab_size=SIZE), None, print)
    assert found == [auto(path)(text).input_ids for text in DEFAULT_PROMPTS]


def test_a_tokenizer_that_cannot_be_used_is_needed_for_texts_alone(tmp_path):
    """Without prompts random ids do as well, and that is said with the reason."""
    path, said = write(tmp_path / "m"), []
    config = model(vocab_size=SIZE - 1)
    found = _prompt_ids(path, config, None, said.append)
    assert [len(ids) for ids in found] == [5, 29, 13, 12]
    _check_ids(found, config)
    assert "random token ids" in said[0] and f"{SIZE} ids" in said[0]
    with pytest.raises(TokenizerError, match="the tokenizer does not fit the model"):
        _prompt_ids(path, config, ["a"], said.append)
