"""The optimizer on the host: the bits of the one on the device, without its bytes there."""

import pytest
from support.training import as_reported, bits, run_steps

from mistral_ms.optimizers import make_plan
from mistral_ms.training.offload import HostOptimizer

pytestmark = pytest.mark.usefixtures("strict_graphs")

STEPS = 20
MODES = [
    # several buckets of several tensors
    pytest.param({}, 10_000, id="float32", marks=pytest.mark.slow),
    # one tensor a bucket; all in one, as is usual: tests/launch/test_acceptance.py
    pytest.param(
        {"dtype": "float16", "gradient_accumulation_steps": 2},
        1,
        id="float16-accumulated",
        marks=pytest.mark.slow,
    ),
]


def make(make_update, offload, **options):
    return make_update(max_steps=STEPS, offload_optimizer=offload, **options)


def on_host(make_update, bucket, **options):
    """With buckets of so many bytes; a tensor is never cut."""
    update = make(make_update, "host", **options)
    plan = make_plan(update.config, update.model.specs.values())
    update.optimizer = HostOptimizer(update.weights, plan, bucket)
    return update


@pytest.mark.parametrize(("options", "bucket"), MODES)
def test_host_and_device_give_the_same_bits(make_update, data, options, bucket):
    """However the tensors are divided among the host's updates. Its float32 masters are the weights
    and follow a restore: test_optimizers.py.
    """
    runs = []
    for update in (make(make_update, "none", **options), on_host(make_update, bucket, **options)):
        results = run_steps(update, data, STEPS)
        runs.append((bits(update), [as_reported(result) for result in results]))
    assert runs[0] == runs[1]
    assert results[-1].lm_loss < results[0].lm_loss - 0.3, "the weights must have moved"


BYTES = {
    ("float32", "none"): (12, 0),
    ("float32", "host"): (4, 12),
    ("float16", "none"): (14, 0),
    ("float16", "host"): (2, 12),
}


@pytest.mark.parametrize(("dtype", "offload"), BYTES)
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_bytes_that_are_kept(make_update, dtype, offload, micro_batches):
    """Counted over the parameters of the compiled cells: 12 or 14 a parameter, or 4 or 2."""
    report = make(
        make_update, offload, dtype=dtype, gradient_accumulation_steps=micro_batches
    ).memory()
    device, host = BYTES[dtype, offload]
    assert report.device_bytes_per_parameter == device
    assert report.host_optimizer == host * report.parameters
    assert report.device_gradients == (4 * report.parameters if micro_batches > 1 else 0)
    assert report.device_weights == (2 if dtype == "float16" else 4) * report.parameters


def test_the_count_sees_what_the_compiled_graph_holds(make_update, data):
    """After it was compiled: weights and optimizer state, and nothing else."""
    update = make(make_update, "none")
    run_steps(update, data, 1)
    [cell] = update.cells()
    held = {id(p) for p in cell.get_parameters()}
    kept = {**update.model.weights(), **update.optimizer.state()}
    assert held == {id(p) for p in kept.values()}
