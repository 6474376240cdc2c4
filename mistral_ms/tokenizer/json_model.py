"""``tokenizer.json``: the format of Hugging Face's tokenizers library."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from mistral_ms.config.moe import MOST_ROWS
from mistral_ms.errors import TokenizerError
from mistral_ms.reading import TOKENIZER_BYTES, parse_json, read_text
from mistral_ms.tokenizer.backend import BackendTokenizer, is_panic
from mistral_ms.tokenizer.settings import damaged, read_settings


class JsonTokenizer(BackendTokenizer):
    """A ``tokenizer.json``; a :class:`mistral_ms.tokenizer.Tokenizer`.

    Special and added tokens come from the file and from those beside it, see
    :mod:`mistral_ms.tokenizer.settings`; BOS and EOS are ``<s>`` and ``</s>`` unless they say
    otherwise.

    Args:
        path: the file.
        companions: files beside it that a checkpoint should carry too (name -> path).

    Raises:
        TokenizerError: the file is missing, damaged, contradicts those beside it, is without BOS
            or EOS, or of an unknown kind.
    """

    def __init__(self, path: Path, companions: Mapping[str, Path] | None = None) -> None:
        path = Path(path)
        files = {"tokenizer.json": path, **(companions or {})}
        super().__init__(read_backend(path), path, read_settings(path.parent), files)


def read_backend(path: Path) -> Backend:
    """The library's tokenizer in a file.

    Raises:
        TokenizerError: the file is missing or damaged.
    """
    text = read_text(path, TokenizerError, TOKENIZER_BYTES)
    try:
        content = parse_json(text)
        if not isinstance(content.get("model"), dict):
            raise ValueError("model must be an object")
        _check_ids(content)
        return Backend.from_str(text)
    except BaseException as error:
        if isinstance(error, Exception) or is_panic(error):  # the library has no narrower class
            raise damaged(path, " ".join(str(error).split())) from error
        raise


def _check_ids(content: Mapping[str, Any]) -> None:
    """The library ends the process where an id asks for more memory than there is."""
    vocabulary, added = content["model"].get("vocab"), content.get("added_tokens")
    named = list(vocabulary.items()) if isinstance(vocabulary, dict) else []
    for token in added if isinstance(added, list) else []:
        if isinstance(token, dict):
            named.append((token.get("content"), token.get("id")))
    for name, number in named:
        if isinstance(number, int) and not 0 <= number < MOST_ROWS:
            raise ValueError(f"{name!r} has the id {number}: must be 0 to {MOST_ROWS - 1}")
