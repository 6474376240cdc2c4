"""Names of files in checkpoint directories, and how to open them safely."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

from mistral_ms import reading
from mistral_ms.errors import CheckpointError

CONFIG = "config.json"
PARAMS = "params.json"
MANIFEST = "COMPLETE"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_MODEL = "adapter_model.safetensors"
MINDFORMERS_YAML = "mindspore_model.yaml"  # as its save_pretrained calls it
PARAM_NAME_MAP = "param_name_map.json"  # MindSpore's index of safetensors files

# Files beside the weights that every format carries along unchanged.
SIDE_FILES = (
    "tokenizer.model*",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "tekken.json",
    "vocab.json",
    "merges.txt",
)

# Weights that PEFT and mistral-finetune write beside, or without, those of their model.
ADAPTER_FILES = ("adapter_model*.safetensors", "adapter_model*.bin", "lora.safetensors")

# Everything that a checkpoint directory of a known format consists of. A directory with anything
# else in it is never replaced.
KNOWN_FILES = (
    *SIDE_FILES,
    CONFIG,
    PARAMS,
    MANIFEST,
    "state.json",
    "model*.safetensors",
    "pytorch_model*.bin",
    "consolidated*.safetensors",
    "consolidated.[0-9][0-9].pth",
    "consolidated.[0-9][0-9].pt",
    "optimizer*.safetensors",
    "*.index.json",
    "mindspore_model*.safetensors",
    "mindspore_model.ckpt",
    MINDFORMERS_YAML,
    PARAM_NAME_MAP,
)


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a file name matches one of the patterns (case counts)."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def side_files(directory: Path, follow_links: bool = False) -> tuple[Path, ...]:
    """The files of ``directory`` that are carried along, sorted by name.

    Raises:
        CheckpointError: one is a link that leads outside, and ``follow_links`` is off; copying it
            would publish a file that is no part of the checkpoint (see :func:`inside`). Or one is
            larger than any tokenizer.
    """
    found = (p for p in directory.iterdir() if matches(p.name, SIDE_FILES) and reading.is_file(p))
    files = tuple(inside(directory, p.name, directory, follow_links) for p in sorted(found))
    for path in files:
        if (size := path.stat().st_size) > reading.TOKENIZER_BYTES:
            rule = f"at most {reading.TOKENIZER_BYTES} bytes"
            raise CheckpointError("file too large", where=path, value=f"{size} bytes", rule=rule)
    return files


def adapter_files(directory: Path) -> tuple[str, ...]:
    """Names of weights in ``directory`` that would change a model and are not read, sorted."""
    return tuple(sorted(p.name for p in directory.iterdir() if matches(p.name, ADAPTER_FILES)))


def unknown_entries(directory: Path) -> tuple[str, ...]:
    """Names in ``directory`` that no checkpoint consists of, sorted."""
    entries = tuple(directory.iterdir())
    alone = not any(p.name == CONFIG for p in entries)  # an adapter that lies beside no model
    known = (*SIDE_FILES, ADAPTER_CONFIG, ADAPTER_MODEL) if alone else ()
    return tuple(
        sorted(p.name for p in entries if p.is_dir() or not matches(p.name, (*KNOWN_FILES, *known)))
    )


def read_json(path: Path, limit: int = reading.CONFIG_BYTES) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        CheckpointError: no such file, or see :func:`mistral_ms.reading.read_json`.
    """
    try:
        return reading.read_json(path, CheckpointError, limit)
    except CheckpointError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise CheckpointError("missing file", where=path) from error
        raise


def inside(directory: Path, name: object, named_by: Path, follow_links: bool = False) -> Path:
    """The file ``name`` of ``directory``, which must not lie anywhere else.

    An index is data from elsewhere: it must not make us read ``../../secret``. Symbolic links
    count as the file they lead to. They may lead anywhere below the directory; a snapshot in the
    Hugging Face hub's cache consists of links, and they may lead anywhere in the cache of the same
    repository.

    Args:
        directory: the checkpoint.
        name: what an index or a manifest calls the file.
        named_by: the index or manifest, for the message.
        follow_links: links may lead anywhere. What is named must still be a name.

    Raises:
        CheckpointError: a name with a directory in it, a link that leads outside, or no such file.
    """
    plain = isinstance(name, str) and name not in ("", ".", "..") and "/" not in name
    if not plain or "\\" in str(name) or "\0" in str(name):
        raise CheckpointError(
            "file outside the checkpoint",
            where=named_by,
            value=f"{name!r} names a path, not a file",
            rule="all files must lie in the checkpoint's own directory",
        )
    path = directory / str(name)
    if not reading.is_file(path):
        raise CheckpointError(
            "missing file",
            where=path,
            rule=f"{named_by.name} names it",
            todo="copy or download the whole checkpoint again",
        )
    real, border = path.resolve(), _border(directory)
    if not follow_links and not real.is_relative_to(border):
        raise CheckpointError(
            "file outside the checkpoint",
            where=named_by,
            value=f"{name!r} leads to {real}",
            rule=f"links are followed within {border} only",
            todo="put the file itself there; or, if the link is meant, --follow-links of the "
            "commands that open a checkpoint follows it, in a run file init_from.follow_links",
        )
    return path


def _border(directory: Path) -> Path:
    """What links of a checkpoint must not leave: its directory, or the hub's cache around it."""
    home = directory.resolve()
    for parent in home.parents:
        if parent.name == "snapshots" and reading.is_dir(parent.parent / "blobs"):
            return parent.parent
    return home
