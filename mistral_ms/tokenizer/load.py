"""Finds the tokenizer of a model directory, and the one that is packaged."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

from mistral_ms.config import PACKAGED_TOKENIZER
from mistral_ms.data import TOKENIZER_CONFIG
from mistral_ms.errors import TokenizerError
from mistral_ms.reading import is_dir, is_file
from mistral_ms.tokenizer.agreement import compare_files
from mistral_ms.tokenizer.backend import BackendTokenizer
from mistral_ms.tokenizer.base import Tokenizer
from mistral_ms.tokenizer.convert import to_backend
from mistral_ms.tokenizer.json_model import JsonTokenizer, read_backend
from mistral_ms.tokenizer.sentencepiece_model import (
    SentencePieceTokenizer,
    is_plain,
    read_sentencepiece,
)
from mistral_ms.tokenizer.settings import TokenizerSettings, read_settings
from mistral_ms.tokenizer.tekken import TekkenTokenizer

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

    In a directory it is the one that transformers' AutoTokenizer would load: ``tokenizer.json``
    where there is one (converted anew from ``tokenizer.model`` where the configuration asks for
    ``add_prefix_space``), else a sentencepiece model with the added tokens of the files beside it,
    else tekken.

    Args:
        path: a directory in Hugging Face's, Mistral's or our format, or a tokenizer file.

    Raises:
        TokenizerError: no tokenizer there, a damaged one, one of an unknown kind, or files that
            contradict each other.
    """
    path = Path(path)
    if is_file(path):
        if "tekken" in path.name:
            return TekkenTokenizer(path, _companions(path))
        if path.suffix == ".json":
            return JsonTokenizer(path, _companions(path))
        return _load_sentencepiece(path, read_settings(path.parent))
    model = next((path / name for name in MODEL_NAMES if is_file(path / name)), None)
    if is_file(path / JSON_NAME):
        return _load_json(path / JSON_NAME, model)
    if model is not None:
        return _load_sentencepiece(model, read_settings(path))
    if is_dir(path) and (tekken := sorted(path.glob("*tekken*.json"))):
        return TekkenTokenizer(tekken[0], _companions(tekken[0]))
    raise TokenizerError(
        "no tokenizer",
        where=path,
        value=None if is_dir(path) else "no such file or directory",
        rule=f"needs one of {', '.join((*MODEL_NAMES, JSON_NAME, 'tekken.json'))}",
        todo="copy the tokenizer files from where the model was published",
    )


def has_tokenizer(directory: Path) -> bool:
    """Whether there is one for :func:`load_tokenizer` in a directory, good or bad."""
    names = (*MODEL_NAMES, JSON_NAME)
    return any(is_file(directory / name) for name in names) or any(directory.glob("*tekken*.json"))


def _companions(path: Path) -> dict[str, Path]:
    beside = {name: path.with_name(name) for name in COMPANION_NAMES}
    return {name: file for name, file in beside.items() if is_file(file) and file != path}


def _load_json(path: Path, model: Path | None) -> Tokenizer:
    """``tokenizer.json``, compared with the sentencepiece model beside it if there is one."""
    if model is None:
        return JsonTokenizer(path, _companions(path))
    tokenizer = JsonTokenizer(path, {**_companions(path), "tokenizer.model": model})
    pieces = read_sentencepiece(model)
    notes = compare_files(tokenizer, pieces, model)
    settings = replace(tokenizer.settings, notes=tokenizer.notes + notes)
    if not (settings.llama and settings.add_prefix_space is not None):
        tokenizer.notes = settings.notes
        return tokenizer
    if not settings.lists_added:
        settings = replace(settings, added=read_backend(path).get_added_tokens_decoder())
    return BackendTokenizer(to_backend(pieces, settings), model, settings, tokenizer.files)


def _load_sentencepiece(path: Path, settings: TokenizerSettings) -> Tokenizer:
    files = _PLAIN_CONFIG | _companions(path)
    if not settings.llama:  # the class of a tokenizer.json that is not there
        settings = replace(settings, llama=True)
    model = read_sentencepiece(path)
    if is_plain(model, settings):
        return SentencePieceTokenizer(path, files, settings)
    return BackendTokenizer(
        to_backend(model, settings), path, settings, {"tokenizer.model": path, **files}
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
