"""The parts that MindFormers left of many ranks, merged by MindSpore's own transformation.

Which part of each tensor a rank holds is said by the strategy files of the run alone, and
MindSpore's code is the one that reads them. It needs room for the whole checkpoint, with the
optimizer's state where that was saved, on the disk, and for some tensors in memory.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from mistral_ms.checkpoint.ckpt_file import CkptStore
from mistral_ms.checkpoint.files import CONFIG, side_files
from mistral_ms.checkpoint.safetensors_file import SafetensorsStore, read_header
from mistral_ms.errors import CheckpointError
from mistral_ms.reading import is_dir, is_file

_STEP = re.compile(r"-(\d+)_(\d+)\.(?:safetensors|ckpt)$")  # epoch and step, by CheckpointMonitor
CONTAINERS = (".safetensors", ".ckpt")
"""How files of MindFormers' trainer end."""


@contextlib.contextmanager
def merged_ranks(path: Path, strategy: Path, scratch: Path) -> Iterator[Path]:
    """Merges the newest step that all ranks have; what was merged is gone when the context ends.

    Args:
        path: the directory with ``rank_0``, ``rank_1`` and so on, and the configuration.
        strategy: the directory with the strategy files of that run, or one file merged of them.
        scratch: where to; it need not be there yet.

    Yields:
        The directory of a checkpoint.

    Raises:
        CheckpointError: no parts, a rank or a file that is missing, no strategy files, or MindSpore
            cannot merge them.
    """
    parts = _newest(path)
    if not is_file(strategy) and not (is_dir(strategy) and any(strategy.iterdir())):
        raise CheckpointError(
            "no strategy files",
            where=strategy,
            rule="MindFormers writes them into output/strategy, one for each rank",
        )
    existing = next(parent for parent in scratch.resolve().parents if is_dir(parent))
    with tempfile.TemporaryDirectory(prefix=f".{scratch.name}.merging-", dir=existing) as directory:
        root = Path(directory)
        for rank, file in enumerate(parts):
            (root / "parts" / f"rank_{rank}").mkdir(parents=True)
            (root / "parts" / f"rank_{rank}" / file.name).symlink_to(file.resolve())
        whole = _merge(path, strategy, root, parts[0].suffix)
        yamls = [p for p in path.iterdir() if p.suffix in (".yaml", ".yml") and is_file(p)]
        config = [path / CONFIG] if is_file(path / CONFIG) else []
        for file in (*config, *yamls, *side_files(path)):
            shutil.copyfile(file, whole / file.name)
        yield whole


def _newest(path: Path) -> list[Path]:
    """The file of each rank: of the newest step that all of them have."""
    found: dict[int, Path] = {}
    if is_dir(path):
        entries = (entry for entry in path.iterdir() if is_dir(entry))
        matches = ((re.fullmatch(r"rank_(\d+)", entry.name), entry) for entry in entries)
        found = {int(match.group(1)): entry for match, entry in matches if match}
    if missing := [path / f"rank_{rank}" for rank in range(len(found) or 1) if rank not in found]:
        rule = "the parts of ranks lie in rank_0, rank_1, ... without gaps"
        raise CheckpointError("no parts of ranks", where=missing[0], rule=rule)
    files = [files_by_step(found[rank]) for rank in range(len(found))]
    common = set.intersection(*(set(each) for each in files))
    if not common:
        raise CheckpointError(
            "incomplete checkpoint",
            where=path,
            rule="no step has a file of every rank",
            todo="copy the directories of all ranks",
        )
    step = newest({step: files[0][step] for step in common})
    return [each[step] for each in files]


def newest(files: Mapping[tuple[int, int], Path]) -> tuple[int, int]:
    """The newest of a rank's files, by the steps that they count themselves: names count from 1
    again when a training goes on.

    Args:
        files: see :func:`files_by_step`; one at least.

    Raises:
        CheckpointError: a damaged file.
    """
    if len(files) == 1:
        return next(iter(files))
    return max(files, key=lambda step: (_counted(files[step]), step))


def _counted(file: Path) -> int:
    """The steps that a file counts; -1 if it counts none."""
    store = (
        CkptStore([file]) if file.suffix == ".ckpt" else SafetensorsStore({file: read_header(file)})
    )
    with contextlib.closing(store):
        info = store.tensors.get("step_num")
        if info is None or info.size != 1 or info.dtype not in ("I32", "I64"):
            return -1
        value = np.zeros(1, np.int32 if info.dtype == "I32" else np.int64)
        store.read_into("step_num", 0, value)
        return int(value[0])


def files_by_step(directory: Path) -> dict[tuple[int, int], Path]:
    """The files of a rank, by epoch and step; one that is called otherwise counts as the first.

    Args:
        directory: ``rank_R``.

    Raises:
        CheckpointError: two files of one step.
    """
    files = sorted(p for p in directory.iterdir() if p.suffix in CONTAINERS and is_file(p))
    steps: dict[tuple[int, int], Path] = {}
    for file in files:
        match = _STEP.search(file.name)
        step = (int(match.group(1)), int(match.group(2))) if match else (0, 0)
        if step in steps:
            raise CheckpointError(
                "several checkpoints of one rank",
                where=directory,
                value=f"{steps[step].name}, {file.name}",
                rule="files are told apart by -EPOCH_STEP at the end of their names",
                todo="leave one of them",
            )
        steps[step] = file
    return steps


@contextlib.contextmanager
def _without_waiting() -> Iterator[None]:
    """MindSpore 2.9 sleeps behind each file that it has written for as long as more than half of
    the machine's memory is in use, by whomever: for ever, where that is another program. It has
    given back nothing and has nothing more to give back then.
    """
    from mindspore.parallel import transform_safetensors

    real = getattr(transform_safetensors, "psutil", None)
    if real is None:  # another version
        yield
        return
    transform_safetensors.psutil = SimpleNamespace(
        virtual_memory=lambda: SimpleNamespace(percent=0.0)
    )
    try:
        yield
    finally:
        transform_safetensors.psutil = real


def _merge(path: Path, strategy: Path, root: Path, container: str) -> Path:
    """Calls MindSpore; returns the directory that it has written."""
    import mindspore as ms

    parts, whole = str(root / "parts"), root / "whole"
    merged = strategy if is_file(strategy) else root / "strategy.ckpt"
    try:
        if merged != strategy:
            ms.merge_pipeline_strategys(str(strategy), str(merged))
        if container == ".safetensors":
            with _without_waiting():
                ms.unified_safetensors(parts, str(merged), str(whole))
        else:
            ms.transform_checkpoints(parts, str(whole), "merged", str(merged), None)
    # whatever MindSpore raises about files that do not belong together
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise CheckpointError(
            "the parts of the ranks cannot be merged",
            where=path,
            value=lines[0] if lines else repr(error),
            rule=f"parts and strategy files ({strategy}) must be of the same run",
        ) from error
    return whole if container == ".safetensors" else whole / "rank_0"
