"""Pictures and numbers of several trainings side by side."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mistral_ms.errors import DataError
from mistral_ms.training.figures import column_means, logarithmic, new_figure, png_of, smooth
from mistral_ms.training.metrics import StepRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette; a second round has another stroke
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#7F7F7F")
STROKES = ("-", "--", ":", "-.")
LAST = 4
"""Numbers of a training are means over this part of its steps, the last one."""
SMOOTHED = 20
"""Curves are means over this part of the steps."""
MAPS_IN_A_ROW = 4
"""At most."""


@dataclass(frozen=True)
class Trained:
    """One of the trainings that are compared.

    Attributes:
        name: of it.
        records: one a step.
        seconds: of each step, one after the other; the first compiles.
        evaluated: loss of the finished model outside of training: nothing is drawn, and nothing
            dropped unless the run says so.
        parameters: of the model.
        active: of those, what one token meets: the other experts left out.
    """

    name: str
    records: Sequence[StepRecord]
    seconds: Sequence[float]
    evaluated: float
    parameters: int
    active: int

    @property
    def load(self) -> np.ndarray:
        """Share of each expert over the balanced share: [steps, layers, E]."""
        load = np.array([record.expert_load for record in self.records])
        if load.ndim != 3 or 0 in load.shape:
            raise DataError("no expert load", where=self.name, rule="has no sparse layers")
        return load * load.shape[-1]

    @property
    def load_variation(self) -> float:
        """Coefficient of variation of the experts' loads (deviation over mean), a layer and a step
        at a time, over the last quarter.
        """
        return float(_last(self.load.std(-1)).mean())

    @property
    def dropped(self) -> float:
        """Share of choices that found their expert full, over the last quarter."""
        return float(_last(np.array([record.dropped_fraction for record in self.records])).mean())

    @property
    def loss(self) -> float:
        """Language model loss in training, over the last quarter."""
        return float(_last(np.array([record.lm_loss for record in self.records])).mean())

    @property
    def step_seconds(self) -> float:
        """Median time of a step, without the first, which compiles; of that one if it is alone."""
        return float(np.median(self.seconds[1:] or self.seconds))


def loss_curves(runs: Sequence[Trained]) -> bytes:
    """The language model losses of all trainings over the steps, and the second half once more,
    enlarged; faint: of each batch. The first axis is logarithmic when a loss falls to less than a
    tenth.
    """
    figure = new_figure(4.2)
    whole, end = figure.subplots(1, 2, width_ratios=(3, 2))
    falls, last = False, max(len(run.records) for run in runs)
    for run, colour, stroke in _styles(runs):
        steps = np.array([record.step for record in run.records])
        loss = np.array([record.lm_loss for record in run.records])
        curve, late = _curve(loss), steps > last // 2
        whole.plot(steps, loss, color=colour, alpha=0.2, lw=0.8)
        whole.plot(steps, curve, color=colour, ls=stroke, lw=1.8)
        end.plot(steps[late], curve[late], color=colour, ls=stroke, lw=1.8, label=run.name)
        falls = falls or bool(loss.max() > 10 * loss.min() > 0)
    whole.set_ylabel("language model loss (nats per token)")
    if falls:
        logarithmic(whole)
    else:
        whole.set_ylim(bottom=0)
    _legend(end, len(runs))
    _steps(whole, runs)
    end.set(xlabel="step", xlim=(last // 2, last))
    end.set_title("second half, enlarged", fontsize=10)
    return png_of(figure)


def dropped_curves(runs: Sequence[Trained]) -> bytes | None:
    """The shares of dropped choices of the trainings that drop any; None where none does."""
    dropping = {run.name for run in runs if any(r.dropped_fraction > 0 for r in run.records)}
    if not dropping:
        return None
    figure = new_figure(3.4)
    axes = figure.subplots()
    for run, colour, stroke in _styles(runs):
        if run.name not in dropping:
            continue
        steps = [record.step for record in run.records]
        dropped = 100.0 * np.array([record.dropped_fraction for record in run.records])
        axes.plot(steps, dropped, color=colour, alpha=0.2, lw=0.8)
        axes.plot(steps, _curve(dropped), color=colour, ls=stroke, lw=1.8, label=run.name)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:g} %")
    axes.set_ylabel("dropped choices")
    _legend(axes, len(dropping))
    _steps(axes, runs)
    return png_of(figure)


def load_maps(runs: Sequence[Trained]) -> bytes:
    """The load of every expert over the steps, a map for each training; its layers, each from the
    first expert on, below each other.

    Raises:
        DataError: a training of a dense model.
    """
    from matplotlib.colors import TwoSlopeNorm

    rows = -(-len(runs) // MAPS_IN_A_ROW)
    columns = -(-len(runs) // rows)
    figure = new_figure(0.6 + 2.9 * rows)
    panels = figure.subplots(rows, columns, sharex=True, squeeze=False)
    norm = TwoSlopeNorm(1.0, vmin=0.0, vmax=2.0)
    for number, run in enumerate(runs):
        panel, load = panels[divmod(number, columns)], run.load
        steps, layers, experts = load.shape
        image = np.full((layers * (experts + 1) - 1, len(column_means(load[:, 0]))), np.nan)
        for layer in range(layers):
            first = layer * (experts + 1)  # a row stays free between layers
            image[first : first + experts] = column_means(load[:, layer]).T
        drawn = panel.imshow(
            image,
            aspect="auto",
            interpolation="nearest",
            cmap="PuOr_r",
            norm=norm,
            extent=(0.5, steps + 0.5, len(image) - 0.5, -0.5),
        )
        middles = [layer * (experts + 1) + (experts - 1) / 2 for layer in range(layers)]
        words = [f"{layer + 1}" for layer in range(layers)]
        panel.set_yticks(middles, words)
        panel.tick_params(axis="y", length=0)
        panel.set_title(f"{run.name}\nload varies by {run.load_variation:.2f}", fontsize=10)
        if number % columns == 0:
            panel.set_ylabel("sparse layer")
        if number + columns >= len(runs):
            panel.set_xlabel("step")
            panel.tick_params(axis="x", labelbottom=True)
    for empty in panels.flat[len(runs) :]:
        empty.set_axis_off()
    bar = figure.colorbar(drawn, ax=panels, extend="max", pad=0.015, aspect=30)
    bar.set_ticks([0, 1, 2], labels=["unused", "balanced", "twice"])
    return png_of(figure)


def number_bars(runs: Sequence[Trained]) -> bytes:
    """What each training came to: losses, variation of the load, dropped choices, time."""
    figure = new_figure(1.3 + 0.34 * len(runs))
    panels = figure.subplots(1, 4, sharey=True)
    seconds = [run.step_seconds for run in runs]
    in_ms = max(seconds) < 1
    measures = {
        "loss, evaluated": ([run.evaluated for run in runs], "{:.2f}"),
        "variation of load": ([run.load_variation for run in runs], "{:.2f}"),
        "dropped choices": ([100 * run.dropped for run in runs], "{:.1f} %"),
        "time of a step": (
            [1000 * each for each in seconds] if in_ms else seconds,
            "{:.0f} ms" if in_ms else "{:.1f} s",
        ),
    }
    colours = [colour for _, colour, _ in _styles(runs)]
    for panel, (title, (values, form)) in zip(panels, measures.items(), strict=True):
        places = range(len(runs))
        panel.barh(places, values, color=colours, height=0.7)
        top = max(*values, 1e-9)
        for place, value in zip(places, values, strict=True):
            panel.text(value + 0.03 * top, place, form.format(value), va="center", fontsize=8.5)
        panel.set_xlim(0, 1.45 * top)  # the numbers beside the bars have room
        panel.set_title(title, fontsize=10)
        panel.set_xticks([])
        panel.spines["bottom"].set_visible(False)
        panel.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(runs)), [run.name for run in runs])
    panels[0].invert_yaxis()
    return png_of(figure)


def _last(values: np.ndarray) -> np.ndarray:
    """The last part of the steps, one at least."""
    return values[-max(1, len(values) // LAST) :]


def _curve(values: np.ndarray) -> np.ndarray:
    return smooth(values, max(1, len(values) // SMOOTHED))


def _styles(runs: Iterable[Trained]) -> Iterator[tuple[Trained, str, str]]:
    """Each training with its colour and its stroke, the same in all pictures."""
    for number, run in enumerate(runs):
        again, colour = divmod(number, len(COLOURS))
        yield run, COLOURS[colour], STROKES[again % len(STROKES)]


def _legend(axes: Axes, entries: int) -> None:
    """Beside the axes, where it hides nothing."""
    size = 9 if entries <= 12 else 7.5
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=size)


def _steps(axes: Axes, runs: Sequence[Trained]) -> None:
    axes.set_xlabel("step")
    axes.set_xlim(0, max(len(run.records) for run in runs))
