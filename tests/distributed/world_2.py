"""Everything that is checked with 2 processes; run by msrun."""

from distributed.collectives import run_collectives, run_pipeline
from distributed.dispatching import dispatch_all
from distributed.generating import run_generating
from distributed.grouped import run_grouped
from distributed.models import run_models
from distributed.moeified import run_moeified
from distributed.tensors import run_tensor
from distributed.training import run_training
from distributed.worker import Worker

Worker().run(
    run_collectives,
    run_pipeline,
    run_tensor,
    run_models,
    dispatch_all,
    run_grouped,
    run_moeified,
    run_generating,
    run_training,
)
