"""What the processes of a job would refuse, found out before there are any.

Files and shapes are looked at without MindSpore. It is imported only for what it alone can tell:
the device of a run in bfloat16, and settings of optimizers and gates beyond those of the defaults.
"""

from __future__ import annotations

from pathlib import Path

from mistral_ms.checkpoint import open_checkpoint
from mistral_ms.checkpoint.run_files import RunFiles, run_files
from mistral_ms.config import OptimizerConfig, ParallelConfig, RunConfig
from mistral_ms.config.computation import check_same_model
from mistral_ms.config.run import data_of
from mistral_ms.datasets import check_length, read_info
from mistral_ms.datasets.documents import check_inputs
from mistral_ms.parallel.pipeline import check_objective
from mistral_ms.weights import specs


def check_training(run: RunConfig, config: Path, resumed: Path | None, node_rank: int) -> None:
    """Whether a training can begin.

    Args:
        run: what is trained.
        config: its run file.
        resumed: the directory of ``--resume``.
        node_rank: number of this machine; texts and the output directory are the first one's.

    Raises:
        MistralMsError: in the words of the command itself.
    """
    files = run_files(config, run.output, resumed)
    if node_rank == 0 and resumed is not None:
        files.again()
    elif node_rank == 0:
        files.check_new()
    check_objective(run.model, run.routing, run.parallel, run.training.router_aux_loss_coef)
    specs(run.model)  # layers that cannot be
    _check_data(run, files, node_rank)
    if run.init_from is not None and resumed is None:
        start, links = run.init_from, run.init_from.follow_links
        with open_checkpoint(start.path, start.format, verify=False, follow_links=links) as source:
            todo = "leave model out of the run to take the checkpoint's"
            check_same_model(run.model, source.config, f"init_from {start.path}", todo)
    if _needs_mindspore(run):
        from mistral_ms.training.prepare import check_settings

        check_settings(run)


def check_reading(
    path: Path, parallel: ParallelConfig, kind: str | None = None, follow_links: bool = False
) -> None:
    """Whether a checkpoint is there and a layout divides its model.

    Args:
        path: the checkpoint.
        parallel: the layout.
        kind: its format, where it may have several.
        follow_links: see :func:`~mistral_ms.checkpoint.open_checkpoint`.

    Raises:
        CheckpointError: there is no such checkpoint, or it is incomplete.
        ConfigError: the layout does not divide it.
    """
    with open_checkpoint(path, kind, verify=False, follow_links=follow_links) as source:
        parallel.check(source.config)


def _needs_mindspore(run: RunConfig) -> bool:
    training, moe = run.training, run.model.moe
    optimizer = OptimizerConfig.model_fields["name"].default != training.optimizer.name
    return bool(
        optimizer
        or training.optimizer.model_extra
        or training.param_groups
        or training.router_losses
        or training.dtype == "bfloat16"
        or (moe is not None and not moe.gate.default)
    )


def _check_data(run: RunConfig, files: RunFiles, node_rank: int) -> None:
    data = data_of(run)
    if data.dataset is not None:
        check_length(data.dataset, read_info(data.dataset), run.training.seq_length)
    elif node_rank == 0 and not (files.dataset.exists() or files.preferences.exists()):
        check_inputs(data.inputs)
