"""Says which formats a directory holds, by the names of the files in it.

MindFormers lets users call their files as they like: of those the names of the tensors decide.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from mistral_ms.checkpoint.files import (
    ADAPTER_FILES,
    CONFIG,
    MANIFEST,
    PARAM_NAME_MAP,
    matches,
    read_json,
)
from mistral_ms.checkpoint.safetensors_file import read_header
from mistral_ms.errors import CheckpointError
from mistral_ms.reading import is_dir, is_file
from mistral_ms.recognition import explain, is_torchs

Kind = Literal["hf", "mistral", "mistral-dump", "mistral_ms", "mindformers"]
KINDS: tuple[str, ...] = get_args(Kind)
ALIASES = {"mindspore": "mistral_ms"}  # the command line's name for our own format
# a format with the layout of its experts, where their shapes do not tell
MindFormersLayout = Literal["fused", "gmm", "graph"]
LAYOUTS = {"mindformers-fused": "mindformers", "mindformers-gmm": "mindformers"}
NATIVE_BLOCK = "mistral_ms"  # the key of config.json that only our checkpoints have


Container = Literal["safetensors", "pickle", "ckpt"]


@dataclass(frozen=True)
class WeightFiles:
    """One set of weight files in a directory.

    Attributes:
        kind: the format.
        container: ``safetensors``, ``pickle`` or ``ckpt``.
        stem: name without endings: ``model``, ``pytorch_model`` or ``consolidated``; ``*`` for
            files that may be called anything.
        files: those found, sorted by name; the index apart.
        index: the index file, or None.
    """

    kind: str
    container: Container
    stem: str
    files: tuple[Path, ...]
    index: Path | None

    def __str__(self) -> str:
        names = [p.name for p in self.files] or [self.index.name if self.index else "?"]
        return f"{self.kind} ({names[0]}{f' and {len(names) - 1} more' if names[1:] else ''})"


# kind, container, stem, pattern of the files, index. Within a kind the first is preferred.
_SETS: tuple[tuple[str, Container, str, str, str | None], ...] = (
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


# files of ours, of PEFT, and of MindSpore's unified_safetensors (counters of a training)
_NO_WEIGHTS = ("optimizer*.safetensors", *ADAPTER_FILES, "hyper_param.safetensors")
# a tensor of each layer: MindFormers' LlamaForCausalLM, and our models in its Trainer
_MINDFORMERS = re.compile(
    r"model\.tok_embeddings\.embedding_weight|model\.norm_out\.weight"
    r"|model\.layers\.\d+\.(attention_norm|ffn_norm)\.weight"
    r"|layers\.\d+\.input_layernorm\.weight"
)


def kind_of(name: str) -> str:
    """Checks a kind's name; ``mindspore`` is another word for ours, and a layout goes without
    saying.

    Raises:
        CheckpointError: an unknown kind.
    """
    name = ALIASES.get(name, name)
    if name not in (*KINDS, *LAYOUTS):
        raise CheckpointError(
            "unknown kind of checkpoint",
            where="kind",
            value=repr(name),
            rule=f"must be one of {', '.join((*KINDS, *ALIASES, *LAYOUTS))}",
        )
    return LAYOUTS.get(name, name)


def layout_of(kind: str | None) -> MindFormersLayout | None:
    """The layout of the experts that a kind's name says, if it says one."""
    if kind not in LAYOUTS:
        return None
    return "gmm" if kind == "mindformers-gmm" else "fused"


def find_weights(path: Path) -> tuple[WeightFiles, ...]:
    """All sets of weight files in a directory, or the one that a file of MindFormers is.

    Raises:
        CheckpointError: no such directory.
    """
    if is_file(path) and (single := _mindformers_files([path])):
        return single
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
    if not is_file(path / CONFIG):  # MindFormers' names in files that are called as those of HF
        found = [
            replace(each, kind="mindformers")
            if each.kind == "hf" and _speak_mindformers(each.files)
            else each
            for each in found
        ]
    if not any(each.kind == "mistral_ms" for each in found):  # those are what we have written
        named = {file for each in found for file in each.files}
        found += _mindformers_files([entry for entry in entries if entry not in named])
    return tuple(found)


def _mindformers_files(entries: Sequence[Path]) -> tuple[WeightFiles, ...]:
    """The sets of files that MindFormers may have written, each with its index if there is one."""
    found: list[WeightFiles] = []
    safetensors = tuple(
        p
        for p in entries
        if p.suffix == ".safetensors" and not matches(p.name, _NO_WEIGHTS) and is_file(p)
    )
    if not any(_speak_mindformers([p]) for p in safetensors):  # it reads all of a directory
        safetensors = ()
    ckpts = tuple(p for p in entries if p.suffix == ".ckpt" and is_file(p) and not is_torchs(p))
    groups: tuple[tuple[Container, tuple[Path, ...], str], ...] = (
        ("safetensors", safetensors, PARAM_NAME_MAP),
        ("ckpt", ckpts, "*.ckpt.index.json"),
    )
    for container, files, pattern in groups:
        if files:
            index = next((p for p in entries if p.match(pattern)), None)
            found.append(WeightFiles("mindformers", container, "*", files, index))
    return tuple(found)


def _speak_mindformers(files: Sequence[Path]) -> bool:
    """Whether the first of these files has tensors as MindFormers, or our models there, call them.

    A file whose header cannot be read has none.
    """
    try:
        names = read_header(files[0]).tensors if files else ()
    except CheckpointError:
        return False
    return any(_MINDFORMERS.fullmatch(name) for name in names)


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
            "consolidated.NN.pth and consolidated.NN.pt; of MindFormers *.ckpt, and *.safetensors "
            "with its names in them",
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
    """The kind of a checkpoint: hf, mistral, mistral-dump, mistral_ms or mindformers.

    Raises:
        CheckpointError: see :func:`choose_weights`.
    """
    return choose_weights(Path(path), kind).kind
