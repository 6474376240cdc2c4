"""Nearly empty batches and crowded experts on two ranks: the same as in one process."""

import numpy as np
import pytest
from distributed.corners import TRAINED, batches
from distributed.test_training import LOSS, WEIGHTS, alone
from distributed.training import LAYOUTS, model

from mistral_ms.parallel.topology import Topology, weight_slice
from mistral_ms.weights import by_name, specs

DROPLESS = next(variant for variant in TRAINED if "dropless" in variant)
each_corner = pytest.mark.parametrize("name", batches())
each_variant = pytest.mark.parametrize("variant", TRAINED)


def results_of(variant, name):
    return alone(2, TRAINED[variant], variant)[2][name]


@each_corner
@each_variant
def test_figures_are_those_of_one_process(report, name, variant):
    results = results_of(variant, name)
    for figure in ("loss", "aux_loss", "grad_norm"):
        want = [getattr(result, figure) for result in results]
        assert np.isfinite(want).all()
        # as in test_training.py
        tolerance = 1e-4 if figure == "grad_norm" else LOSS
        for got in report(2).everywhere(f"corners/{name}/{variant}/{figure}"):
            np.testing.assert_allclose(got, want, rtol=tolerance, err_msg=figure)
    for figure in ("routed_LE", "kept_LE"):
        want = np.array([getattr(result, figure) for result in results])
        for got in report(2).everywhere(f"corners/{name}/{variant}/{figure}"):
            np.testing.assert_array_equal(got, want)


@each_variant
def test_weights_end_where_one_process_ends(report, variant):
    topology = Topology.of(LAYOUTS[2][TRAINED[variant]])
    weights = by_name(specs(model(TRAINED[variant])))
    for path, want in alone(2, TRAINED[variant], variant)[3].items():
        for rank in (0, 1):
            got = report(2).get(rank, f"corners/{variant}/weights/{path}")
            part = want[weight_slice(weights[path], topology, rank)].astype(np.float64)
            assert np.linalg.norm(got - part) <= WEIGHTS * np.linalg.norm(part), path


def test_the_corners_are_what_they_are_called():
    """Two choices a token."""
    first = {name: results_of(DROPLESS, name)[0] for name in batches()}
    assert first["one rank sees padding only"].routed_LE.sum() == 2 * 64
    assert first["one token a rank"].routed_LE.sum() == 2 * 2
    crowded = first["all tokens to the same experts"].routed_LE
    assert ((crowded > 0).sum(1) == 2).all()
    assert results_of("plain", "all tokens to the same experts")[0].dropped_fraction > 0.5
