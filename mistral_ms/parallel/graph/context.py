"""The auto-parallel context of a run."""

from __future__ import annotations

from mindspore import context

from mistral_ms.config import PredictConfig, RunConfig


def set_context(run: RunConfig | PredictConfig) -> None:
    """Tells MindSpore how the graphs of a run are divided.

    The device target must be Ascend and ``mindspore.communication.init()`` must have been called.
    All earlier settings are forgotten.

    Args:
        run: a training, or a prediction.
    """
    parallel = run.parallel
    context.reset_auto_parallel_context()
    context.set_auto_parallel_context(
        parallel_mode="semi_auto_parallel",
        device_num=parallel.world,
        full_batch=True,
        pipeline_stages=parallel.pp,
        enable_alltoall=True,  # else a change of layout is an AllGather and a cut
        gradients_mean=False,  # the loss is a sum of shares already
        enable_parallel_optimizer=parallel.optimizer_parallel,
        parallel_optimizer_config={"parallel_optimizer_threshold": 0},
    )
