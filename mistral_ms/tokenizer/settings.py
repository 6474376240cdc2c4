"""What the files beside a tokenizer say about it, read by the rules of transformers 4.57.

``tokenizer_config.json`` names the special tokens, lists added tokens by id, and says whether BOS
and EOS are put around a text. ``special_tokens_map.json`` and ``added_tokens.json`` are the older
way to say the same: they count only where the configuration has no ``added_tokens_decoder``.
Chat templates stand in ``chat_template.jinja``, which wins, or in the configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from mistral_ms.errors import TokenizerError
from mistral_ms.reading import CONFIG_BYTES, INDEX_BYTES, read_json, read_text

CONFIG = "tokenizer_config.json"
SPECIAL_MAP = "special_tokens_map.json"
ADDED = "added_tokens.json"
TEMPLATE = "chat_template.jinja"
NAMED = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
EXTRA = "additional_special_tokens"
LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer")
_LLAMA_NAMES = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class TokenizerSettings:
    """The settings of one tokenizer.

    Attributes:
        llama: whether transformers would load one of its Llama classes, which put BOS and EOS
            around a text by ``add_bos`` and ``add_eos``; others do what tokenizer.json says.
        names: the special tokens by their role, such as ``eos_token``.
        special: further special tokens.
        added: added tokens by id.
        lists_added: whether the configuration itself lists them; then no other file counts.
        add_bos: whether a text begins with BOS (Llama classes).
        add_eos: whether a text ends with EOS (Llama classes).
        add_prefix_space: whether a space goes before a text; None when nothing is said.
        legacy: whether it goes before each part between two special tokens too.
        templates: sources of chat templates by name; the usual one is ``default``.
        template_path: where they were read.
        notes: contradictions that do not stop anybody, in words.
    """

    llama: bool = True
    names: Mapping[str, str] = field(default_factory=lambda: dict(_LLAMA_NAMES))
    special: tuple[str, ...] = ()
    added: Mapping[int, AddedToken] = field(default_factory=dict)
    lists_added: bool = False
    add_bos: bool = True
    add_eos: bool = False
    add_prefix_space: bool | None = None
    legacy: bool = True
    templates: Mapping[str, str] = field(default_factory=dict)
    template_path: Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def all_special(self) -> tuple[str, ...]:
        """All special tokens, by role or not."""
        named = (self.names[key] for key in NAMED if key in self.names)
        return tuple(dict.fromkeys((*named, *self.special)))


def read_settings(directory: Path) -> TokenizerSettings:
    """Reads the files beside a tokenizer; those that are not there say nothing.

    Raises:
        TokenizerError: a file that cannot be read, or a value of the wrong type.
    """
    path = directory / CONFIG
    config = read_object(path)
    llama = config.get("tokenizer_class") in (None, *LLAMA_CLASSES)
    listed = config.get("added_tokens_decoder")
    values, notes = dict(config), []
    if listed is None:
        older = read_object(directory / SPECIAL_MAP)
        for key in NAMED:
            there, here = _name(older, key, directory / SPECIAL_MAP), _name(config, key, path)
            if there is not None and here is not None and there != here:
                notes.append(f"{SPECIAL_MAP} calls {key} {there!r}, {CONFIG} {here!r}")
        values |= {key: value for key, value in older.items() if value is not None}
    names = dict(_LLAMA_NAMES) if llama else {}
    for key in NAMED:
        if key in values:
            names.pop(key, None)
        if (name := _name(values, key, path)) is not None:
            names[key] = name
    special = tuple(_token_name(t, EXTRA, path) for t in _list(values, EXTRA, path))
    if listed is None:
        added = _older_added(directory / ADDED, {*names.values(), *special})
    else:
        added = _listed(listed, path)
    templates, template_path = _templates(config, path)
    return TokenizerSettings(
        llama=llama,
        names=names,
        special=special,
        added=added,
        lists_added=listed is not None,
        add_bos=_flag(config, "add_bos_token", True, path),
        add_eos=_flag(config, "add_eos_token", False, path),
        add_prefix_space=_flag(config, "add_prefix_space", None, path),
        legacy=_flag(config, "legacy", True, path),
        templates=templates,
        template_path=template_path,
        notes=tuple(notes),
    )


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; an empty one without the file.

    Raises:
        TokenizerError: the file cannot be read or holds something else.
    """
    return read_json(path, TokenizerError, INDEX_BYTES) if path.exists() else {}


def damaged(path: Path, reason: str) -> TokenizerError:
    """The error of a file that is not what its name says."""
    return TokenizerError(
        "damaged tokenizer",
        where=path,
        value=reason[:300],
        rule=f"must be a {path.name} as transformers writes it",
        todo="download the file again",
    )


def _older_added(path: Path, special: set[str]) -> dict[int, AddedToken]:
    """``added_tokens.json``: name -> id."""
    found = {}
    for name, number in read_object(path).items():
        if not isinstance(number, int) or isinstance(number, bool) or number < 0:
            raise damaged(path, f"{name!r} has the id {number!r}")
        is_special = name in special
        found[number] = AddedToken(name, special=is_special, normalized=not is_special)
    return found


def _listed(listed: Any, path: Path) -> dict[int, AddedToken]:
    """``added_tokens_decoder``: id -> content and flags."""
    if not isinstance(listed, dict):
        raise damaged(path, f"added_tokens_decoder is {type(listed).__name__}")
    found = {}
    for number, token in listed.items():
        where = f"added_tokens_decoder.{number}"
        if not (number.isdecimal() and len(number) < 10):
            raise damaged(path, f"{where}: not an id")
        if not isinstance(token, dict) or not isinstance(token.get("content"), str):
            raise damaged(path, f"{where}: must have a content")
        flags = {key: token[key] for key in _TOKEN_FLAGS if key in token}
        if not all(isinstance(flag, bool) for flag in flags.values()):
            raise damaged(path, f"{where}: {flags} must be true or false")
        found[int(number)] = AddedToken(token["content"], **flags)
    return found


def _templates(config: Mapping[str, Any], path: Path) -> tuple[dict[str, str], Path | None]:
    file = path.with_name(TEMPLATE)
    if file.exists():
        return {"default": read_text(file, TokenizerError, CONFIG_BYTES)}, file
    given = config.get("chat_template")
    if given is None:
        return {}, None
    if isinstance(given, str):
        return {"default": given}, path
    if isinstance(given, list) and all(
        isinstance(one, dict) and isinstance(one.get("template"), str) and "name" in one
        for one in given
    ):
        return {str(one["name"]): one["template"] for one in given}, path
    raise damaged(path, "chat_template must be a text, or a list of names and templates")


def _name(values: Mapping[str, Any], key: str, path: Path) -> str | None:
    value = values.get(key)
    return None if value is None else _token_name(value, key, path)


def _token_name(value: Any, key: str, path: Path) -> str:
    name = value.get("content") if isinstance(value, dict) else value
    if not isinstance(name, str):
        raise damaged(path, f"{key}: {value!r} must be a token's text")
    return name


def _list(values: Mapping[str, Any], key: str, path: Path) -> list[Any]:
    value = values.get(key) or []
    if isinstance(value, dict):  # as some versions wrote them: role -> token
        value = list(value.values())
    if not isinstance(value, list):
        raise damaged(path, f"{key} must be a list")
    return value


def _flag(values: Mapping[str, Any], key: str, default: Any, path: Path) -> Any:
    value = values.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise damaged(path, f"{key}: {value!r} must be true or false")
    return value
