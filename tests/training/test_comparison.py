"""Trainings side by side: their numbers by hand, and what the pictures show."""

import io

import numpy as np
import pytest
from matplotlib.image import imread

from mistral_ms.errors import DataError
from mistral_ms.training import StepRecord, comparison
from mistral_ms.training.comparison import (
    Trained,
    dropped_curves,
    load_maps,
    loss_curves,
    number_bars,
)


def trained(name="one", load=((0.5, 0.25, 0.25, 0.0),), dropped=0.1, steps=8):
    """Losses 8, 7, ... ; the load is even before the last quarter."""
    even = tuple((1 / len(row),) * len(row) for row in load)
    records = [
        StepRecord(
            t + 1, 1.0, 8.0 - t, 8.0 - t, 2.0, 0.0, 1e-3, 1.0, 1e3, 1.0, 0, dropped,
            load if t >= steps - steps // 4 else even,
        )
        for t in range(steps)
    ]  # fmt: skip
    return Trained(name, records, [9.0, *np.arange(1.0, steps)], 0.5, 1000, 400)


def test_numbers_by_hand():
    run = trained()
    # loads 2, 1, 1, 0 of the balanced share: the population deviation is sqrt(2 / 4)
    assert run.load_variation == pytest.approx(0.5**0.5)
    assert run.loss == 1.5  # of losses 2 and 1
    assert run.dropped == pytest.approx(0.1)
    assert run.step_seconds == 4.0  # of 1 to 7; the first step compiles
    assert Trained("short", run.records[:1], [9.0], 0, 0, 0).step_seconds == 9.0


def test_a_dense_model_has_no_load():
    with pytest.raises(DataError, match="no expert load: dense"):
        load_maps([trained("dense", load=())])


@pytest.fixture
def figures(monkeypatch):
    kept, original = [], comparison.png_of
    monkeypatch.setattr(comparison, "png_of", lambda f: kept.append(f) or original(f))
    return kept


@pytest.mark.parametrize("number", [1, 9])
@pytest.mark.parametrize("draw", [loss_curves, load_maps, dropped_curves, number_bars])
def test_every_training_is_in_every_picture(draw, number, figures):
    """By name, and with other experts and layers each."""
    runs = [trained(f"run {n}", ((1 / (n + 2),) * (n + 2),) * (1 + n % 3)) for n in range(number)]
    image = imread(io.BytesIO(draw(runs)))
    assert image.shape[1] == 1200
    texts = " ".join(
        text.get_text()
        for axes in figures[0].axes
        for text in (
            axes.title, *axes.get_yticklabels(), *(axes.legend_.texts if axes.legend_ else ())
        )
    )  # fmt: skip
    assert all(run.name in texts for run in runs)


def test_a_map_has_a_block_of_rows_for_each_layer(figures):
    load_maps([trained(load=((1.0, 0.0), (0.5, 0.5)))])
    image = figures[0].axes[0].images[0].get_array()
    want = [[1] * 6 + [2] * 2, [1] * 6 + [0] * 2, [-1] * 8, [1] * 8, [1] * 8]
    np.testing.assert_array_equal(np.ma.filled(image, -1.0), want)


def test_where_nothing_is_dropped_there_is_no_picture():
    assert dropped_curves([trained(dropped=0.0)]) is None
