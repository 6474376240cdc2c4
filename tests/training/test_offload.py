"""The optimizer on the host: the bits of the one on the device, without its bytes there."""

import mindspore as ms
import numpy as np
import pytest
from support.training import as_reported, bits, run_steps

from mistral_ms.optimizers import make_plan
from mistral_ms.training.offload import HostOptimizer

pytestmark = pytest.mark.usefixtures("strict_graphs")

STEPS = 20
MODES = [
    pytest.param({}, id="float32"),
    pytest.param(
        {"dtype": "float16", "gradient_accumulation_steps": 2},
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


@pytest.mark.parametrize("options", MODES)
def test_host_and_device_give_the_same_bits(make_update, data, options):
    """The host updates several tensors at a time, and several times."""
    runs = []
    for update in (make(make_update, "none", **options), on_host(make_update, 10_000, **options)):
        results = run_steps(update, data, STEPS)
        runs.append((bits(update), [as_reported(result) for result in results]))
    assert runs[0] == runs[1]
    assert results[-1].lm_loss < results[0].lm_loss - 0.3, "the weights must have moved"


@pytest.mark.slow
def test_the_size_of_the_buckets_does_not_matter(make_update, data):
    """One tensor a bucket. All in one bucket, as is usual: tests/launch/test_acceptance.py."""
    device, host = make(make_update, "none"), on_host(make_update, 1)
    for update in (device, host):
        run_steps(update, data, 3)
    assert bits(host) == bits(device)


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


@pytest.mark.slow
def test_the_host_keeps_its_masters_to_itself(make_update, data):
    """float32 masters are the weights: they are no part of a checkpoint, and follow a restore."""
    update = make(make_update, "host")
    assert set(bits(update)) == set(bits(make(make_update, "none")))
    weight = next(iter(update.weights.values()))
    weight.set_data(ms.Tensor(np.full(weight.shape, 0.5, np.float32)))
    update.optimizer.restored()
    run_steps(update, data, 1)
    assert np.abs(weight.asnumpy() - 0.5).max() < 0.1
