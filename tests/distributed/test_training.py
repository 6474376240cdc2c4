"""Twenty steps in any layout are twenty steps in one process with the same dispatch groups."""

import functools

import numpy as np
import pytest
from distributed.training import CASES, LAYOUTS, MODEL, STEPS, data, routing, training
from support.training import run_steps

from mistral_ms.models import CausalLM
from mistral_ms.training import TrainStep

LOSS = 1e-5
"""Relative; sums of float32 in another order."""
WEIGHTS = 1e-4
"""Relative L2 norm, at a learning rate of 1e-3: Adam turns a gradient that is rounding noise into
a step of full size."""
HALF = 2e-3
"""For float16, whose roundings (5e-4) depend on the order of sums."""
each_case = pytest.mark.parametrize(("world", "name", "variant"), CASES)


@functools.cache
def alone(groups, variant):
    """One process with ``groups`` times the micro-batches."""
    config = training(variant, groups)
    model = CausalLM(MODEL, routing(variant), dtype=config.dtype)
    model.initialize(0)
    update = TrainStep(model, config, pooled_aux=False)
    results = run_steps(update, data(), STEPS)
    return results, {name: p.asnumpy() for name, p in model.weights().items()}


def tolerance(variant, usual):
    return HALF if variant == "float16" else usual


@each_case
@pytest.mark.parametrize("figure", ["loss", "lm_loss", "aux_loss", "z_loss", "grad_norm"])
def test_figures_are_those_of_one_process_on_every_rank(report, world, name, variant, figure):
    want = [getattr(r, figure) for r in alone(LAYOUTS[world][name].dp, variant)[0]]
    rel = tolerance(variant, 1e-4 if figure == "grad_norm" else LOSS)
    for got in report(world).everywhere(f"training/{name}/{variant}/{figure}"):
        np.testing.assert_allclose(got, want, rtol=rel)
    assert want[-1] != want[0]


@each_case
def test_gradient_norms_count_every_element_once(report, world, name, variant):
    results = alone(LAYOUTS[world][name].dp, variant)[0]
    want = np.array([list(r.gradient_norms.values()) for r in results])
    for got in report(world).everywhere(f"training/{name}/{variant}/norms"):
        np.testing.assert_allclose(got, want, rtol=tolerance(variant, 2e-4) * 10, atol=1e-7)


# a near-tie that float16 breaks in another way moves a choice
@pytest.mark.parametrize(("world", "name", "variant"), [c for c in CASES if c[2] != "float16"])
def test_choices_are_counted_over_all_ranks(report, world, name, variant):
    results = alone(LAYOUTS[world][name].dp, variant)[0]
    for figure in ("routed_LE", "kept_LE"):
        want = np.array([getattr(r, figure) for r in results])
        for got in report(world).everywhere(f"training/{name}/{variant}/{figure}"):
            np.testing.assert_array_equal(got, want)


@each_case
def test_weights_end_where_one_process_ends(report, world, name, variant):
    want = alone(LAYOUTS[world][name].dp, variant)[1]
    for path, values in want.items():
        for got in report(world).everywhere(f"training/{name}/{variant}/weights/{path}"):
            difference = np.linalg.norm(np.float64(got) - values) / np.linalg.norm(
                np.float64(values)
            )
            assert difference <= tolerance(variant, WEIGHTS), path


def test_something_was_dropped_clipped_and_learnt():
    results, _ = alone(2, "plain")
    assert sum(r.dropped_fraction for r in results) > 0
    assert max(r.grad_norm for r in results) > 0.5
    assert results[-1].lm_loss < results[0].lm_loss
