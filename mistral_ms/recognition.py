"""Says what a path is that was given for a checkpoint and is none, and what to do about it.

Judged by names and first bytes alone: nothing of what is recognised here is ever read further.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from mistral_ms.errors import CheckpointError, MistralMsError
from mistral_ms.reading import (
    CONFIG_BYTES,
    Fault,
    is_dir,
    is_file,
    open_regular,
    read_json,
    read_text,
)

_WEIGHTS = (".safetensors", ".bin", ".pth", ".pt")
_REVISION = re.compile(r"[\w.-]+")
_STEP = re.compile(r"step-\d{8,}")
_REVISION_BYTES = 200
_SOURCE_FILES = "the Hugging Face or Mistral files that it was made from"


def explain(path: Path, fault: Fault) -> MistralMsError | None:
    """The error that says what is at ``path`` in the place of a checkpoint.

    Args:
        path: what the user named.
        fault: class of the error.

    Returns:
        It, to be raised; None when nothing is recognised.
    """
    path = Path(path)
    if is_file(path):
        return _explain_file(path, fault)
    try:
        entries = sorted(path.iterdir())
    except (OSError, ValueError):
        return None
    look: Callable[[Path, list[Path], Fault], MistralMsError | None]
    for look in (_hub, _adapter, _gguf, _ckpt, _training):
        if (found := look(path, entries, fault)) is not None:
            return found
    return None


def _explain_file(path: Path, fault: Fault) -> MistralMsError | None:
    try:
        with open_regular(path, fault) as file:
            head = file.read(4)
    except MistralMsError as error:  # a pointer of Git LFS says so itself
        return error
    except OSError:
        return None
    if head == b"GGUF" or path.suffix == ".gguf":
        return _of_gguf(path, path.name, fault)
    if path.suffix == ".ckpt":
        return _of_ckpt(path, path, fault)
    if path.suffix in _WEIGHTS:
        return fault(
            "a file of weights, not a checkpoint",
            where=path,
            rule="a checkpoint is the directory with weights and configuration",
            todo=f"give {path.parent}",
        )
    return None


def _hub(path: Path, entries: list[Path], fault: Fault) -> MistralMsError | None:
    """The cache of a hub: one repository, its folder of snapshots, or many repositories."""
    if path.name == "snapshots" and is_dir(path.parent / "blobs"):
        return _of_repository(path, path.parent, fault)
    if is_dir(path / "snapshots") and (is_dir(path / "blobs") or path.name.startswith("models--")):
        return _of_repository(path, path, fault)
    models = [each for each in entries if each.name.startswith("models--") and is_dir(each)]
    if not models:
        return None
    names = ", ".join(each.name for each in models[:4])
    return fault(
        "the cache of a hub, not a checkpoint",
        where=path,
        value=names + (f" and {len(models) - 4} more" if models[4:] else ""),
        rule="the files of a model lie in models--OWNER--NAME/snapshots/REVISION",
        todo=_give(models[0]) if len(models) == 1 else "give that directory of one of them",
    )


def _of_repository(path: Path, root: Path, fault: Fault) -> MistralMsError:
    return fault(
        "the cache of a model, not a checkpoint",
        where=path,
        rule="the files of a revision lie in snapshots/REVISION",
        todo=_give(root),
    )


def _give(root: Path) -> str:
    """What to give instead of a repository of a hub's cache."""
    snapshots = root / "snapshots"
    try:
        found = [each.name for each in sorted(snapshots.iterdir()) if is_dir(each)]
    except OSError:
        found = []
    main = None
    if len(found) > 1:
        try:
            main = read_text(root / "refs" / "main", MistralMsError, _REVISION_BYTES).strip()
        except MistralMsError:
            main = None
    if main in found:
        return f"give {snapshots / str(main)}, the revision main"
    if not found:
        return "download the model again: no revision is there"
    if len(found) == 1:
        return f"give {snapshots / found[0]}"
    return f"give {snapshots} with one of {', '.join(found[:8])}"


def _adapter(path: Path, entries: list[Path], fault: Fault) -> MistralMsError | None:
    names = {each.name for each in entries}
    config = path / "adapter_config.json"
    if config.name in names or any(name.startswith("adapter_model.") for name in names):
        return adapter_error(path, _base(config), fault)
    if "lora.safetensors" in names:
        return fault(
            "an adapter (mistral-finetune), not a whole model",
            where=path,
            rule="an adapter is a change to the weights of its base model",
            todo="merge the adapter first: mistral-finetune saves merged weights with "
            "save_adapters: False",
        )
    return None


def adapter_error(
    path: Path, what: str | None = None, fault: Fault = CheckpointError
) -> MistralMsError:
    """An adapter was given where a whole model is needed.

    Args:
        path: its directory.
        what: what it says of itself.
        fault: class of the error.
    """
    return fault(
        "an adapter (PEFT), not a whole model",
        where=path,
        value=what,
        rule="an adapter is a change to the weights of its base model",
        todo=f"give the base model and --adapter {path} (in a run file init_from.adapter); or make "
        f"a whole model of both: convert BASE NEW --merge {path}",
    )


def _base(config: Path) -> str | None:
    """What an adapter's configuration says of itself."""
    try:
        values = read_json(config, MistralMsError, CONFIG_BYTES)
    except MistralMsError:
        return None
    kind, base = values.get("peft_type"), values.get("base_model_name_or_path")
    said = [kind] if isinstance(kind, str) else []
    said += [f"of {base}"] if isinstance(base, str) else []
    return " ".join(said) or None


def _gguf(path: Path, entries: list[Path], fault: Fault) -> MistralMsError | None:
    names = [each.name for each in entries if each.suffix == ".gguf"]
    if not names:
        return None
    more = f" and {len(names) - 1} more" if names[1:] else ""
    return _of_gguf(path, names[0] + more, fault)


def _of_gguf(path: Path, names: str, fault: Fault) -> MistralMsError:
    return fault(
        "GGUF, not a checkpoint of a known format",
        where=path,
        value=names,
        rule="llama.cpp's format, mostly of quantised weights, is not read",
        todo=f"use {_SOURCE_FILES}",
    )


def is_torchs(file: Path) -> bool:
    """Whether a file is torch's archive, or its pickle before 1.6, whatever its name says."""
    try:
        with open_regular(file, MistralMsError) as opened:
            return opened.read(2) in (b"PK", b"\x80\x02")
    except (MistralMsError, OSError):
        return False


def _ckpt(path: Path, entries: list[Path], fault: Fault) -> MistralMsError | None:
    """The files of each rank of MindFormers, in a directory of its own; or one of torch."""
    ranks = [each for each in entries if re.fullmatch(r"rank_\d+", each.name) and is_dir(each)]
    if ranks:
        return _of_ranks(path, ranks, fault)
    files = [each for each in entries if each.suffix == ".ckpt"]
    return _of_ckpt(path, files[0], fault) if files else None


def _of_ckpt(path: Path, file: Path, fault: Fault) -> MistralMsError | None:
    if not is_torchs(file):
        return None
    return fault(
        "a .ckpt file of torch, not a checkpoint of a known format",
        where=path,
        value=None if file == path else file.name,
        rule="the names in it are those of the program that wrote it",
        todo=f"convert {_SOURCE_FILES}",
    )


def _of_ranks(path: Path, ranks: list[Path], fault: Fault) -> MistralMsError:
    """What MindFormers left of each rank; only its strategy files say who holds what."""
    if len(ranks) == 1:
        return fault(
            "the directory of a rank, not a checkpoint",
            where=path,
            value=ranks[0].name,
            rule="MindFormers' files lie one level below",
            todo=f"give {ranks[0]}, if the run had one process",
        )
    return fault(
        "the parts of many ranks, not a checkpoint",
        where=path,
        value=f"{len(ranks)} directories rank_N",
        rule="the strategy files of the run say which part of each tensor a rank holds",
        todo="merge them: convert with --strategy DIRECTORY, where MindFormers wrote those files "
        "(output/strategy), and with the run's yaml file beside the directories rank_N",
    )


def _training(path: Path, entries: list[Path], fault: Fault) -> MistralMsError | None:
    """The directory of a training here, or that of its checkpoints."""
    if is_dir(path / "checkpoints"):
        path, entries = path / "checkpoints", sorted((path / "checkpoints").iterdir())
    steps = [each for each in entries if _STEP.fullmatch(each.name) and is_dir(each)]
    if not steps:
        return None
    newest = max(steps, key=lambda each: int(each.name.removeprefix("step-")))
    return fault(
        "the directory of a training, not a checkpoint",
        where=path,
        value=f"{len(steps)} checkpoint{'s' if steps[1:] else ''}",
        rule="each checkpoint of a training has its own directory",
        todo=f"give {newest}",
    )
