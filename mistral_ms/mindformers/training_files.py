"""Trainings that go on in the other program: checkpoints of MindFormers' trainer and ours.

MindFormers' trainer writes one file for each process: the weights (which have our names in it, see
:class:`~mistral_ms.mindformers.modeling.MistralForCausalLM`), ``adam_m.*`` and ``adam_v.*``, and
counters. It resumes from a directory whose counters are in a file of their own; several processes
cut theirs out of it (``auto_trans_ckpt``), in the forms of the auto-parallel graph. Ours is a
directory, too, see :mod:`mistral_ms.training.state`. All is for AdamW and float32 weights. As a
command::

    python -m mistral_ms.mindformers.training_files to-mindformers --help
    python -m mistral_ms.mindformers.training_files from-mindformers --help
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from mistral_ms.checkpoint import (
    CheckpointSeries,
    open_checkpoint,
    open_tensor_set,
    our_shapes,
    read_state,
    save_native,
)
from mistral_ms.checkpoint.files import PARAM_NAME_MAP
from mistral_ms.checkpoint.merge_ranks import merged_ranks
from mistral_ms.checkpoint.run_files import RunFiles
from mistral_ms.config import (
    ModelConfig,
    ParallelConfig,
    RunConfig,
    load_run_config,
    spelled_out,
)
from mistral_ms.errors import CheckpointError, MistralMsError
from mistral_ms.optimizers import with_settings
from mistral_ms.parallel.context import ParallelContext
from mistral_ms.parallel.sharding.forms import GraphForm, graph_form
from mistral_ms.staging import StagedDirectory
from mistral_ms.training.identity import Identity
from mistral_ms.training.loss_scale import LossScale
from mistral_ms.training.prepare import open_data
from mistral_ms.training.state import FORMAT, OPTIMIZER, encode_state
from mistral_ms.weights import specs

MOMENTS = {"adam_m": "exp_avg", "adam_v": "exp_avg_sq"}
"""MindFormers' prefixes of the optimizer's state, and ours."""


def to_mindformers(
    checkpoint: Path, directory: Path, *, steps_per_epoch: int, graph: bool = False
) -> None:
    """Writes a training of ours for ``load_checkpoint: DIRECTORY`` with ``resume_training: True``.

    Args:
        checkpoint: a checkpoint of a training.
        directory: the new one.
        steps_per_epoch: of the data that the training goes on with.
        graph: several processes go on with it, with ``auto_trans_ckpt: True``.

    Raises:
        CheckpointError: a checkpoint without a training, or of one that cannot go on there;
            something at ``directory``.
    """
    state = read_state(checkpoint)
    step, updates, scale = state["step"], state["updates"], state["loss_scale"]["value"]
    tensors = {}
    with open_checkpoint(checkpoint, "mistral_ms") as source:
        forms = _forms(source.config, graph)
        for name in source.names():
            if source.dtype(name) != "float32":
                raise _not_possible(checkpoint, name, source.dtype(name))
            tensors[name] = forms[name].to_graph(source.read(name))
        names = source.names()
    with open_tensor_set(checkpoint, OPTIMIZER) as stored:
        wanted = {f"{ours}.{name}" for ours in MOMENTS.values() for name in names}
        if differing := sorted(wanted ^ set(stored.names())):
            raise _not_possible(checkpoint, differing[0], "another optimizer's state")
        for theirs, ours in MOMENTS.items():
            for name in names:
                moment = stored.read(f"{ours}.{name}", None)
                tensors[f"{theirs}.{name}"] = forms[name].to_graph(moment)
    counters: dict[str, Any] = {
        "global_step": np.array([updates], np.int32),
        "step_num": np.array(step, np.int32),
        "epoch_num": np.array(-(-step // steps_per_epoch), np.int32),
        "loss_scale": np.array(scale, np.float32),
        "scale_sense": np.array(scale, np.float32),
    }
    batch = state.get("training", {}).get("global_batch_size")
    if batch is not None:
        counters["global_batch_size"] = np.array(batch, np.int32)
    index = {"weight_map": dict.fromkeys(tensors, "training.safetensors")}  # MindSpore asks for it
    if directory.exists():
        raise CheckpointError(
            "something is there", where=directory, rule="the directory must be a new one"
        )
    staged = StagedDirectory(directory)
    try:
        path = staged.open()
        for file, held in (("training", tensors), ("hyper_param", counters)):
            named = [{"name": name, "data": Tensor(each)} for name, each in held.items()]
            ms.save_checkpoint(named, str(path / f"{file}.safetensors"), format="safetensors")
        (path / PARAM_NAME_MAP).write_text(json.dumps(index), encoding="utf-8")
        staged.install()
    finally:
        staged.close()


def _forms(architecture: ModelConfig, graph: bool) -> dict[str, GraphForm]:
    """How each weight lies in MindFormers' files: of one process as ours."""
    if graph:
        return {spec.name: graph_form(spec) for spec in specs(architecture)}
    return {name: GraphForm(shape, (), ()) for name, shape in our_shapes(architecture).items()}


def from_mindformers(
    file: Path,
    checkpoint: Path,
    architecture: ModelConfig,
    identity: dict[str, Any] | None = None,
    strategy: Path | None = None,
) -> None:
    """Writes a training of MindFormers' trainer as a checkpoint of ours; of a file without the
    optimizer's means the weights alone.

    Args:
        file: ``rank_0/NAME_rank_0-EPOCH_STEP.safetensors``; of several processes the directory
            with ``rank_0``, ``rank_1`` and so on, whose newest step is taken.
        checkpoint: the new directory.
        architecture: the model; the file does not say it.
        identity: of the training that goes on, see
            :class:`~mistral_ms.training.identity.Identity`; without it
            :func:`~mistral_ms.training.state.restore` reads the checkpoint, but no run resumes it.
        strategy: of several processes their strategy files, see
            :func:`~mistral_ms.checkpoint.merge_ranks.merged_ranks`.

    Raises:
        CheckpointError: no such file, missing tensors, wrong shapes, something at ``checkpoint``.
    """
    held = _read(file, strategy, checkpoint)
    _write(
        held, file, checkpoint, _forms(architecture, strategy is not None), architecture, identity
    )


def begin_run(
    file: Path,
    directory: Path,
    run: RunConfig,
    *,
    strategy: Path | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Writes a training of MindFormers' trainer as a run of ours, with which ``train --resume``
    goes on: with the run's data, in its order, from the step on that the training has reached.

    Args:
        file: see :func:`from_mindformers`.
        directory: of the run; no run may be there.
        run: the run.
        strategy: see :func:`from_mindformers`.
        say: told in a line each what is being done.

    Raises:
        MistralMsError: see :func:`from_mindformers`; data that cannot be read, or a run that is
            there.
    """
    files = RunFiles(directory)
    files.begin()
    with files.claim():
        held = _read(file, strategy, directory)
        data, _ = open_data(run, files, ParallelContext(ParallelConfig()), say)
        training = with_settings(run.training.with_max_steps(data.sequences))
        run = run.model_copy(update={"training": training})
        identity = Identity(run.model, run.routing, training, run.parallel, data.digest)
        path = CheckpointSeries(files.checkpoints).path(_steps(held)[0])
        path.parent.mkdir()
        forms = _forms(run.model, strategy is not None)
        _write(held, file, path, forms, run.model, identity.as_dict())
        files.config.write_text(spelled_out(run), encoding="utf-8")
        say(f"go on with   --resume {directory}")


def _read(file: Path, strategy: Path | None, target: Path) -> dict[str, Any]:
    """Everything that MindFormers has written."""
    if strategy is None:
        if not file.is_file():
            raise CheckpointError("no such file", where=file)
        return ms.load_checkpoint(str(file), format="safetensors")
    held: dict[str, Any] = {}
    with merged_ranks(file, strategy, target) as whole:
        for part in sorted(whole.glob("*.safetensors")):
            held |= ms.load_checkpoint(str(part), format="safetensors")
    return held


def _steps(held: dict[str, Any]) -> tuple[int, int]:
    """Steps, and updates of the weights, which fail where a gradient overflowed."""
    updates = int(held["global_step"].asnumpy().reshape(-1)[0]) if "global_step" in held else 0
    return int(held["step_num"].asnumpy()) if "step_num" in held else updates, updates


def _write(
    held: dict[str, Any],
    file: Path,
    checkpoint: Path,
    forms: dict[str, GraphForm],
    architecture: ModelConfig,
    identity: dict[str, Any] | None,
) -> None:
    """Writes what was read as a checkpoint of ours."""
    shapes = our_shapes(architecture)

    def named(theirs: str, ours: str) -> Iterator[tuple[str, tuple[int, ...], str, np.ndarray]]:
        for name, shape in shapes.items():
            tensor, wanted = held.get(f"{theirs}{name}"), forms[name].shape
            if tensor is None or tuple(tensor.shape) != wanted or tensor.dtype != ms.float32:
                found = "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"
                raise CheckpointError(
                    "missing tensor" if tensor is None else "wrong tensor",
                    where=f"{file}: {theirs}{name}",
                    value=found,
                    rule=f"the model has float32 {list(wanted)} there",
                )
            yield f"{ours}{name}", shape, "float32", forms[name].from_graph(tensor.asnumpy())

    config = architecture.model_copy(update={"torch_dtype": "float32"})
    if not any(name.startswith("adam_m.") for name in held):
        save_native(checkpoint, config, named("", ""))
        return
    step, updates = _steps(held)
    scale = float(held["loss_scale"].asnumpy()) if "loss_scale" in held else 1.0
    state = {
        "format": FORMAT,
        "step": step,
        "updates": updates,
        "loss_scale": asdict(LossScale(scale)),
        **(identity or {}),
    }
    moments = [each for t, o in MOMENTS.items() for each in named(f"{t}.", f"{o}.")]
    save_native(
        checkpoint,
        config,
        named("", ""),
        {"state.json": encode_state(state)},
        extra_tensors={OPTIMIZER: moments},
    )


def _not_possible(checkpoint: Path, name: str, value: str) -> CheckpointError:
    return CheckpointError(
        "training that cannot go on there",
        where=f"{checkpoint}: {name}",
        value=value,
        rule="MindFormers' AdamW keeps float32 weights and two float32 means of each",
        todo="load the weights alone: convert the checkpoint to hf",
    )


def main(words: Sequence[str] | None = None) -> int:
    """The command.

    Returns:
        0 when it is done, 2 for bad input.
    """
    parser = ArgumentParser(prog="python -m mistral_ms.mindformers.training_files")
    commands = parser.add_subparsers(dest="command", required=True)
    there = commands.add_parser("to-mindformers", help="for load_checkpoint and resume_training")
    there.add_argument("checkpoint", type=Path, help="of a training of ours")
    there.add_argument("directory", type=Path, help="the new one")
    there.add_argument("--steps-per-epoch", type=int, required=True, help="of MindFormers' data")
    there.add_argument("--graph", action="store_true", help="for several processes")
    here = commands.add_parser("from-mindformers", help="for generate, convert, init_from")
    here.add_argument(
        "file", type=Path, help="NAME.safetensors of MindFormers' trainer; or the parts of ranks"
    )
    here.add_argument("checkpoint", type=Path, help="the new one; with --run a run's directory")
    here.add_argument("--strategy", type=Path, help="strategy files of the parts of ranks")
    model = here.add_mutually_exclusive_group(required=True)
    model.add_argument("--like", type=Path, help="a checkpoint of the same model")
    model.add_argument("--run", type=Path, help="a run file: makes a run for train --resume")
    given = parser.parse_args(words)
    try:
        if given.command == "to-mindformers":
            to_mindformers(
                given.checkpoint,
                given.directory,
                steps_per_epoch=given.steps_per_epoch,
                graph=given.graph,
            )
        elif given.run is not None:
            run = load_run_config(given.run)
            begin_run(given.file, given.checkpoint, run, strategy=given.strategy)
        else:
            with open_checkpoint(given.like, verify=False) as source:
                architecture = source.config
            from_mindformers(given.file, given.checkpoint, architecture, strategy=given.strategy)
    except MistralMsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
