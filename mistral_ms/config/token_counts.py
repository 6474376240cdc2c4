"""How often each token id occurs in a dataset: the file ``token_counts.json`` beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from mistral_ms.errors import ConfigError
from mistral_ms.reading import INDEX_BYTES, read_json

TOKEN_COUNTS = "token_counts.json"


def token_counts_text(counts: Mapping[int, int], vocab_size: int) -> str:
    """The content of such a file.

    Args:
        counts: of the ids that occur.
        vocab_size: how many ids there are.
    """
    held = {str(token): counts[token] for token in sorted(counts)}
    return json.dumps({"vocab_size": vocab_size, "counts": held}, separators=(",", ":")) + "\n"


def read_token_counts(path: Path, vocab_size: int) -> dict[int, int]:
    """How often each id occurs; of ids that do not occur nothing.

    Args:
        path: written by the ``data`` command, or by hand.
        vocab_size: of the model.

    Raises:
        ConfigError: it cannot be read, is another file, or of another vocabulary.
    """
    data = read_json(path, ConfigError, INDEX_BYTES)
    size, counts = data.get("vocab_size"), data.get("counts")
    if set(data) != {"vocab_size", "counts"} or not isinstance(counts, dict):
        raise _broken(path, sorted(data), "must have vocab_size and counts, an object")
    if size != vocab_size:
        raise _broken(path, f"vocab_size {size}", f"model.vocab_size is {vocab_size}")
    found = {}
    for token, count in counts.items():
        if not token.isdecimal() or int(token) >= vocab_size:
            raise _broken(path, f"id {token!r}", f"ids are 0 to {vocab_size - 1}")
        if not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise _broken(path, f"{count!r} times id {token}", "must be a whole number from 0 on")
        found[int(token)] = count
    return found


def _broken(path: Path, value: object, rule: str) -> ConfigError:
    todo = "name a token_counts.json that the data command wrote with the model's tokenizer"
    return ConfigError("no token counts", where=path, value=value, rule=rule, todo=todo)
