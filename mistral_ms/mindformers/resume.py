"""Trainings of MindFormers' trainer that go on in one process.

What its trainer writes, ``rank_0/NAME-EPOCH_STEP``, MindFormers 1.9 takes of several processes
alone; of one it takes a directory with the counters in a file of their own. Of either it reads what
fits model and optimizer, and only logs the rest: a training whose means are missing goes on with
none. Here the file is found, looked at before anything is built, and laid out as MindFormers wants
it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mistral_ms.checkpoint import our_shapes
from mistral_ms.checkpoint.ckpt_file import CkptStore
from mistral_ms.checkpoint.merge_ranks import CONTAINERS, files_by_step, newest
from mistral_ms.checkpoint.safetensors_file import TensorInfo, read_header
from mistral_ms.config import ModelConfig
from mistral_ms.errors import CheckpointError
from mistral_ms.mindformers.run_file import get

COUNTERS_FILE = "hyper_param.safetensors"
"""Of a whole training in one directory, beside its tensors."""
_COUNTERS = ("step_num", "epoch_num", "loss_scale", "global_batch_size")
_MOMENTS = {False: ("adam_m.", "adam_v."), True: ("exp_avg.", "exp_avg_sq.")}
"""MindFormers' prefixes of the means of AdamW; True: of its fused one (``use_fused``)."""


def take_training(config: dict[str, Any], path: Path, model: ModelConfig) -> None:
    """Finds the training that a run goes on with: the file that ``resume_training`` names, or the
    newest of ``rank_0``; or a directory that ``training_files to-mindformers`` has written.

    Args:
        config: of the run; its ``load_checkpoint`` becomes what was found.
        path: its ``load_checkpoint``.
        model: the model.

    Raises:
        CheckpointError: no training, a damaged one, or one of another model or optimizer.
    """
    found = _find(path, config["resume_training"])
    files = sorted(found.glob("*.safetensors")) if found.is_dir() else [found]
    held: dict[str, TensorInfo] = {}
    for file in files:
        held |= _tensors(file)
    for name, shape in _wanted(config, model):
        tensor = held.get(name)
        if tensor is None or (shape is not None and tensor.shape != shape):
            raise CheckpointError(
                "no training of this model",
                where=f"load_checkpoint {found}: {name}",
                value="missing" if tensor is None else list(tensor.shape),
                rule="a training goes on with its weights, the optimizer's means, and its counters"
                + ("" if shape is None else f": {list(shape)} there"),
                todo="set resume_training: False to begin with its weights",
            )
    config["load_checkpoint"] = str(found.resolve())
    config["resume_training"], config["auto_trans_ckpt"] = True, False


def lay_out(found: Path, place: Path) -> Path:
    """The directory that MindFormers goes on with.

    Args:
        found: see :func:`take_training`. A ``.ckpt`` file is read whole, and written again.
        place: an empty directory for it, if it is another.
    """
    if found.is_dir():
        return found
    import mindspore as ms

    if found.suffix == ".ckpt":
        held = ms.load_checkpoint(str(found))
        named = [{"name": name, "data": each} for name, each in held.items()]
        ms.save_checkpoint(named, str(place / "training.safetensors"), format="safetensors")
    else:
        held = ms.load_checkpoint(
            str(found), choice_func=lambda name: name in _COUNTERS, format="safetensors"
        )
        (place / "training.safetensors").symlink_to(found.resolve())
    counters = [{"name": name, "data": held[name]} for name in _COUNTERS]
    ms.save_checkpoint(counters, str(place / COUNTERS_FILE), format="safetensors")
    return place


def newest_of_rank(path: Path) -> Path | None:
    """The newest file of what MindFormers' trainer wrote in one process: ``rank_R``, or the
    directory in which ``rank_0`` stands alone. None of anything else.

    Raises:
        CheckpointError: two files of one step; a damaged file.
    """
    directory = path if path.name.startswith("rank_") else path / "rank_0"
    if not directory.is_dir() or (directory != path and (path / "rank_1").exists()):
        return None
    steps = files_by_step(directory)
    return steps[newest(steps)] if steps else None


def _find(path: Path, name: bool | str) -> Path:
    """The file, or the directory with one training."""
    if path.is_file() or (path / COUNTERS_FILE).is_file():
        return path
    directory = path / "rank_0" if (path / "rank_0").is_dir() else path
    if not directory.is_dir():
        raise CheckpointError("no such file", where=f"load_checkpoint {path}")
    if isinstance(name, str):
        if not (directory / name).is_file():
            raise CheckpointError("no such file", where=f"resume_training {directory / name}")
        return directory / name
    steps = files_by_step(directory)
    if not steps:
        raise CheckpointError(
            "no training",
            where=f"load_checkpoint {directory}",
            rule=f"MindFormers' files end in -EPOCH_STEP{' or -EPOCH_STEP'.join(CONTAINERS)}",
        )
    return steps[newest(steps)]


def _tensors(file: Path) -> Mapping[str, TensorInfo]:
    if file.suffix == ".ckpt":
        store = CkptStore([file])
        store.close()
        return store.tensors
    return read_header(file).tensors


def _wanted(
    config: Mapping[str, Any], model: ModelConfig
) -> Iterator[tuple[str, tuple[int, ...] | None]]:
    """Names and shapes; None: any."""
    shapes = our_shapes(model)
    yield from shapes.items()
    if get(config, "optimizer.type", "AdamW") == "AdamW":
        for prefix in _MOMENTS[bool(get(config, "optimizer.use_fused"))]:
            yield from ((f"{prefix}{name}", shape) for name, shape in shapes.items())
    yield from ((name, None) for name in _COUNTERS)
