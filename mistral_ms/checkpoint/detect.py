"""Says which formats a directory holds, by the names of the files in it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from mistral_ms.checkpoint.files import CONFIG, MANIFEST, read_json
from mistral_ms.errors import CheckpointError
from mistral_ms.reading import is_dir, is_file
from mistral_ms.recognition import explain

Kind = Literal["hf", "mistral", "mistral-dump", "mistral_ms"]
KINDS: tuple[str, ...] = get_args(Kind)
ALIASES = {"mindspore": "mistral_ms"}  # the command line's name for our own format
NATIVE_BLOCK = "mistral_ms"  # the key of config.json that only our checkpoints have


@dataclass(frozen=True)
class WeightFiles:
    """One set of weight files in a directory.

    Attributes:
        kind: the format.
        container: ``safetensors`` or ``pickle``.
        stem: name without endings: ``model``, ``pytorch_model`` or ``consolidated``.
        files: those found, sorted by name; the index apart.
        index: the index file, or None.
    """

    kind: str
    container: Literal["safetensors", "pickle"]
    stem: str
    files: tuple[Path, ...]
    index: Path | None

    def __str__(self) -> str:
        names = [p.name for p in self.files] or [self.index.name if self.index else "?"]
        return f"{self.kind} ({names[0]}{f' and {len(names) - 1} more' if names[1:] else ''})"


# kind, container, stem, pattern of the files, index. Within a kind the first is preferred.
_SETS: tuple[tuple[str, Literal["safetensors", "pickle"], str, str, str | None], ...] = (
    (
        "hf",
        "safetensors",
        "model",
        r"model(-\d+-of-\d+|-rank-\d+)?\.safetensors",
        "model.safetensors.index.json",
    ),
    (
        "hf",
        "pickle",
        "pytorch_model",
        r"pytorch_model(-\d+-of-\d+)?\.bin",
        "pytorch_model.bin.index.json",
    ),
    (
        "mistral",
        "safetensors",
        "consolidated",
        r"consolidated(-\d+-of-\d+)?\.safetensors",
        "consolidated.safetensors.index.json",
    ),
    ("mistral", "pickle", "consolidated", r"consolidated\.\d\d\.pth", None),
    ("mistral-dump", "pickle", "consolidated", r"consolidated\.\d\d\.pt", None),
)


def kind_of(name: str) -> str:
    """Checks a kind's name; ``mindspore`` is another word for ours.

    Raises:
        CheckpointError: an unknown kind.
    """
    name = ALIASES.get(name, name)
    if name not in KINDS:
        raise CheckpointError(
            "unknown kind of checkpoint",
            where="kind",
            value=repr(name),
            rule=f"must be one of {', '.join((*KINDS, *ALIASES))}",
        )
    return name


def find_weights(path: Path) -> tuple[WeightFiles, ...]:
    """All sets of weight files in a directory.

    Raises:
        CheckpointError: no such directory.
    """
    if not is_dir(path):
        if (error := explain(path, CheckpointError)) is not None:
            raise error
        raise CheckpointError(
            "not a directory" if is_file(path) else "no such directory",
            where=path,
            rule="a checkpoint is a directory",
        )
    entries = sorted(path.iterdir())
    found = []
    for kind, container, stem, pattern, index_name in _SETS:
        files = tuple(p for p in entries if re.fullmatch(pattern, p.name))
        index = path / index_name if index_name else None
        if index is not None and not is_file(index):
            index = None
        if files or index is not None:
            ours = kind == "hf" and container == "safetensors" and _is_native(path)
            found.append(WeightFiles("mistral_ms" if ours else kind, container, stem, files, index))
    return tuple(found)


def _is_native(path: Path) -> bool:
    """Our files carry the names of HF's; the manifest or a block in the configuration tells."""
    if (path / MANIFEST).exists():
        return True
    try:
        return NATIVE_BLOCK in read_json(path / CONFIG)
    except CheckpointError:
        return False  # whoever opens the checkpoint will say what is wrong with it


def choose_weights(path: Path, kind: str | None = None) -> WeightFiles:
    """The one set of weight files to read.

    Args:
        path: the checkpoint's directory.
        kind: which format to take when there are several; None to insist on one. One format in
            two containers is one format: the safetensors files are taken, as transformers does.

    Raises:
        CheckpointError: no weights of a known format (or of that kind); what is there instead is
            said where it is recognised. Or several formats, and nobody said which.
    """
    path = Path(path)
    wanted = None if kind is None else kind_of(kind)
    found = find_weights(path)
    if not found and (error := explain(path, CheckpointError)) is not None:
        raise error
    if wanted is not None:
        chosen = [weights for weights in found if weights.kind == wanted]
        if not chosen:
            raise CheckpointError(
                f"no {wanted} checkpoint",
                where=path,
                value=f"found {', '.join(map(str, found)) or 'no weights at all'}",
            )
        return chosen[0]
    if not found:
        raise CheckpointError(
            "not a checkpoint",
            where=path,
            value="no weight files",
            rule="known are model*.safetensors, pytorch_model*.bin, consolidated.safetensors, "
            "consolidated.NN.pth and consolidated.NN.pt",
        )
    kinds = dict.fromkeys(weights.kind for weights in found)
    if len(kinds) > 1:
        options = " or ".join(f"--from {_option(kind)}" for kind in kinds)
        raise CheckpointError(
            "two formats in one directory" if len(kinds) == 2 else "several formats",
            where=path,
            value=", ".join(map(str, found)),
            rule="it must be clear which one is meant",
            todo=f"choose with {options}; in a run file with init_from.format",
        )
    return found[0]


def _option(kind: str) -> str:
    return next((alias for alias, name in ALIASES.items() if name == kind), kind)


def detect(path: Path, kind: str | None = None) -> str:
    """The kind of a checkpoint: hf, mistral, mistral-dump or mistral_ms.

    Raises:
        CheckpointError: see :func:`choose_weights`.
    """
    return choose_weights(Path(path), kind).kind
