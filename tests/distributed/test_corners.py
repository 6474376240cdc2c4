"""Nearly empty batches and crowded experts on two ranks: the same as in one process."""

import functools

import numpy as np
import pytest
from distributed.corners import LAYOUT, VARIANTS, batches, steps

from mistral_ms.parallel.topology import Topology, weight_slice

each_corner = pytest.mark.parametrize("name", batches())
each_policy = pytest.mark.parametrize("variant", VARIANTS)
SAME = 1e-5
"""Relative: sums of float32 in another order; of the weights as in test_training.py, in fewer
steps."""


@functools.cache
def alone(variant):
    return steps(variant, None)


@each_corner
@each_policy
def test_figures_are_those_of_one_process(report, name, variant):
    results = alone(variant)[0][name]
    for figure in ("loss", "aux_loss", "grad_norm"):
        want = [getattr(result, figure) for result in results]
        assert np.isfinite(want).all()
        for got in report(2).everywhere(f"corners/{name}/{variant}/{figure}"):
            np.testing.assert_allclose(got, want, rtol=SAME, err_msg=figure)
    for figure in ("routed_LE", "kept_LE"):
        want = np.array([getattr(result, figure) for result in results])
        for got in report(2).everywhere(f"corners/{name}/{variant}/{figure}"):
            np.testing.assert_array_equal(got, want)


@each_policy
def test_weights_end_where_one_process_ends(report, variant):
    topology = Topology.of(LAYOUT)
    for path, parameter in alone(variant)[1].weights().items():
        want = parameter.asnumpy()
        for rank in (0, 1):
            got = report(2).get(rank, f"corners/{variant}/weights/{path}")
            part = np.float64(want[weight_slice(path, want.shape, topology, rank)])
            assert np.linalg.norm(got - part) <= 1e-4 * np.linalg.norm(part), path


def test_the_corners_are_what_they_are_called():
    results = {name: found[0] for name, found in alone("dropless")[0].items()}
    assert results["one rank sees padding only"].routed_LE.sum() == 64 * 2
    assert results["one token a rank"].routed_LE.sum() == 2 * 2
    crowded = results["all tokens to the same experts"].routed_LE
    assert ((crowded > 0).sum(1) == 2).all()
    assert alone("plain")[0]["all tokens to the same experts"][0].dropped_fraction > 0.5
