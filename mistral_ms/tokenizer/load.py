"""Finds the tokenizer of a model directory, and the one that is packaged."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from mistral_ms.config import PACKAGED_TOKENIZER
from mistral_ms.data import TOKENIZER_CONFIG
from mistral_ms.errors import TokenizerError
from mistral_ms.reading import is_dir, is_file
from mistral_ms.tokenizer.base import Tokenizer
from mistral_ms.tokenizer.json_model import JsonTokenizer
from mistral_ms.tokenizer.sentencepiece_model import SentencePieceTokenizer

# tokenizer.model comes first because transformers reads that one.
MODEL_NAMES = ("tokenizer.model", *(f"tokenizer.model.v{version}" for version in (7, 3, 2, 1)))
JSON_NAME = "tokenizer.json"
COMPANION_NAMES = (
    JSON_NAME,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
PACKAGED = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
}
# Without a tokenizer_config.json transformers 4.57 reads a lone tokenizer.model through
# mistral-common, if that is installed, and then ends every text with EOS.
_PLAIN_CONFIG = {TOKENIZER_CONFIG.name: TOKENIZER_CONFIG}


def find_tokenizer(name: str) -> Tokenizer:
    """A packaged tokenizer by its name (``packaged-v1``), or the one at a path.

    Raises:
        TokenizerError: see :func:`packaged_tokenizer` and :func:`load_tokenizer`.
    """
    if name.startswith(PACKAGED_TOKENIZER):
        return packaged_tokenizer(name.removeprefix(PACKAGED_TOKENIZER))
    return load_tokenizer(Path(name))


def load_tokenizer(path: Path) -> Tokenizer:
    """Loads the tokenizer of a model directory, or one tokenizer file.

    A sentencepiece model wins over ``tokenizer.json``: both hold the same vocabulary, and the
    former is what the model was trained with.

    Args:
        path: a directory in Hugging Face's, Mistral's or our format, or a tokenizer file.

    Raises:
        TokenizerError: no tokenizer there, a damaged one, or an unsupported one (tekken).
    """
    path = Path(path)
    if is_file(path):
        return _load_file(path)
    for name in (*MODEL_NAMES, JSON_NAME):
        if is_file(path / name):
            return _load_file(path / name)
    if is_dir(path) and (tekken := sorted(path.glob("*tekken*.json"))):
        raise _tekken(tekken[0])
    raise TokenizerError(
        "no tokenizer",
        where=path,
        value=None if is_dir(path) else "no such file or directory",
        rule=f"needs one of {', '.join((*MODEL_NAMES, JSON_NAME))}",
        todo="copy the tokenizer files from where the model was published",
    )


def _load_file(path: Path) -> Tokenizer:
    if "tekken" in path.name:
        raise _tekken(path)
    beside = {name: path.with_name(name) for name in COMPANION_NAMES}
    companions = {name: file for name, file in beside.items() if is_file(file) and file != path}
    if path.suffix == ".json":
        return JsonTokenizer(path, companions)
    return SentencePieceTokenizer(path, _PLAIN_CONFIG | companions)


def _tekken(path: Path) -> TokenizerError:
    return TokenizerError(
        "unsupported tokenizer",
        where=path,
        value="tekken",
        rule="Mistral's sentencepiece tokenizers v1, v2, v3 and v7 are supported",
    )


def packaged_tokenizer(version: str = "v1") -> Tokenizer:
    """One of the real tokenizers that the mistral-common package carries; needs no download.

    Args:
        version: ``v1`` (32000 ids: Mistral 7B v0.1 and v0.2, Mixtral 8x7B), ``v2``, ``v3`` or
            ``v7`` (32768 ids).

    Raises:
        TokenizerError: an unknown version, or mistral-common is not installed.
    """
    if version not in PACKAGED:
        raise TokenizerError(
            "unknown tokenizer", value=repr(version), rule=f"packaged: {', '.join(PACKAGED)}"
        )
    package = find_spec("mistral_common")
    if package is None or package.origin is None:
        raise TokenizerError(
            "no tokenizer",
            where="mistral_common",
            rule="the packaged tokenizers are part of it",
            todo='pip install "mistral-common"',
        )
    path = Path(package.origin).parent / "data" / PACKAGED[version]
    return SentencePieceTokenizer(path, _PLAIN_CONFIG)
