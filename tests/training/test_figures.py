"""The pictures: what they show, as far as a program can tell. People look at the rest."""

import io
from dataclasses import replace

import numpy as np
import pytest
from matplotlib import colormaps
from matplotlib.image import imread

from mistral_ms.errors import DataError
from mistral_ms.training import StepRecord
from mistral_ms.training import figures as module
from mistral_ms.training.figures import (
    dropped_figure,
    expert_load_figure,
    loss_figure,
    preference_figure,
    router_losses_figure,
)


def records(steps=60, layers=2, experts=8, loss=lambda t: 10 * 0.9**t):
    rng = np.random.default_rng(0)
    load = rng.dirichlet(np.full(experts, 20.0), (steps, layers))
    return [
        StepRecord(
            t + 1, (t + 1) / 8, loss(t) + 0.04, loss(t), 2.0, 0.0, 1e-3, 1.0, 1e3, 1.0, 0, 0.1,
            tuple(map(tuple, load[t])),
        )
        for t in range(steps)
    ]  # fmt: skip


@pytest.fixture
def drawn(monkeypatch):
    """The figures themselves, not only their files."""
    kept = []
    original = module.png_of
    monkeypatch.setattr(module, "png_of", lambda figure: kept.append(figure) or original(figure))
    return kept


def pixels(png):
    return imread(io.BytesIO(png))


@pytest.mark.parametrize("steps", [1, 2, 60, 500])
@pytest.mark.parametrize("draw", [loss_figure, expert_load_figure, dropped_figure])
def test_a_picture_of_any_length(draw, steps):
    image = pixels(draw(records(steps)))
    assert image.shape[1] == 1200
    assert image.std() > 0.01, "not blank"


def test_the_same_records_give_the_same_file():
    assert loss_figure(records(), 32000) == loss_figure(records(), 32000)


class TestLoss:
    def test_shows_both_losses_and_the_rate(self, drawn):
        source = records()
        loss_figure(source, vocab_size=32000)
        top, bottom = drawn[0].axes
        total, lm, guess = (line.get_ydata() for line in top.lines)
        assert list(total) == [r.loss for r in source]
        assert list(lm) == [r.lm_loss for r in source]
        assert guess[0] == pytest.approx(10.373, abs=1e-3)
        assert list(bottom.lines[0].get_ydata()) == [r.lr for r in source]

    def test_shows_the_distance_from_another_model(self, drawn):
        loss_figure([replace(each, distillation=each.lm_loss / 4) for each in records()])
        lines = {line.get_label(): list(line.get_ydata()) for line in drawn[0].axes[0].lines}
        assert lines["distance from the other model"] == [r.lm_loss / 4 for r in records()]

    def test_logarithmic_only_where_it_falls_far(self, drawn):
        loss_figure(records())
        loss_figure(records(loss=lambda t: 5 - 0.01 * t))
        assert [figure.axes[0].get_yscale() for figure in drawn] == ["log", "linear"]

    def test_a_loss_of_zero_can_be_drawn(self, drawn):
        loss_figure(records(loss=lambda t: 0.0))
        assert drawn[0].axes[0].get_yscale() == "linear"


def test_of_preferences_their_loss_and_accuracy(drawn):
    source = [
        replace(r, preference={"loss": 0.69 / r.step, "rewards/accuracies": 1 - 0.5 / r.step})
        for r in records(20)
    ]
    assert pixels(preference_figure(source)).shape[1] == 1200
    loss, accuracy, rate = (axes.lines[0].get_ydata() for axes in drawn[0].axes)
    assert list(loss) == [r.preference["loss"] for r in source]
    assert list(accuracy) == [100 * r.preference["rewards/accuracies"] for r in source]
    assert list(rate) == [r.lr for r in source]


class TestExpertLoad:
    def test_rows_are_experts_and_columns_are_steps(self, drawn):
        source = records(steps=30, layers=3, experts=4)
        expert_load_figure(source)
        panels = [axes for axes in drawn[0].axes if axes.images]
        assert len(panels) == 3
        for layer, panel in enumerate(panels):
            shown = panel.images[0].get_array()
            want = 100 * np.array([r.expert_load[layer] for r in source]).T
            assert np.allclose(shown, want)

    def test_many_steps_are_averaged(self, drawn):
        source = records(steps=480)
        expert_load_figure(source)
        shown = next(axes for axes in drawn[0].axes if axes.images).images[0].get_array()
        first = np.mean([r.expert_load[0] for r in source[:4]], 0)
        assert shown.shape == (8, 120)
        assert np.allclose(shown[:, 0], 100 * first)

    def test_the_balanced_share_is_white_and_marked(self, drawn):
        expert_load_figure(records(), capacity_factor=1.1)
        panel = next(axes for axes in drawn[0].axes if axes.images)
        image, bar = panel.images[0], drawn[0].axes[-1]
        assert min(colormaps[image.cmap.name](image.norm(12.5))[:3]) > 0.93
        labels = [label.get_text() for label in bar.get_yticklabels()]
        assert "12.5 %  balanced" in labels
        assert "13.75 %  capacity" in labels

    def test_over_and_under_differ_in_lightness_order_and_hue(self, drawn):
        expert_load_figure(records())
        image = next(axes for axes in drawn[0].axes if axes.images).images[0]
        low, high = (np.array(image.cmap(image.norm(v))[:3]) for v in (5.0, 20.0))
        # purple against orange: blue and red swap, which all common kinds of colour blindness see
        assert low[2] > low[0]
        assert high[0] > high[2]

    def test_a_dense_model_has_none(self):
        with pytest.raises(DataError, match="no expert load"):
            expert_load_figure(records(layers=0))


def test_dropped_shows_percent_and_a_centred_mean(drawn):
    source = records()
    dropped_figure(source)
    raw, mean = (line.get_ydata() for line in drawn[0].axes[0].lines)
    assert raw == pytest.approx([10.0] * 60)
    assert mean == pytest.approx([10.0] * 60)


@pytest.mark.parametrize(
    ("sequence", "want"), [(1, [0, 3, 6, 9]), (3, [1.5, 3, 6, 7.5]), (9, [4.5] * 4)]
)
def test_smoothing_by_hand(sequence, want):
    assert module.smooth(np.array([0.0, 3, 6, 9]), sequence) == pytest.approx(want)


def test_router_losses_have_a_panel_each_by_their_names(drawn):
    """A training that goes on with a loss more shows a gap before."""
    course = records(steps=4)
    course[2:] = [replace(r, router_losses={"load": 0.25 * r.step}) for r in course[2:]]
    router_losses_figure(course)
    panels = drawn[0].axes
    assert [panel.get_ylabel() for panel in panels] == ["aux", "z", "load"]
    shown = panels[2].lines[0].get_ydata()
    np.testing.assert_array_equal(shown, [np.nan, np.nan, 0.75, 1.0])
