"""Pictures of a training, as PNG. Colours are told apart by colour-blind readers and in print."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mistral_ms.config import RunConfig
from mistral_ms.errors import DataError
from mistral_ms.training.metrics import StepRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6E6E6E"
WIDTH = 8.0  # inches
DPI = 150
HEAT_COLUMNS = 120
"""Columns of a heat map: steps are averaged in groups so that single batches do not flicker."""


def write_figures(directory: Path, records: Sequence[StepRecord], run: RunConfig) -> None:
    """Writes the pictures of a training as PNG files: loss and learning rate, where pairs of
    answers are learnt those of the preferences with their accuracy; and, of a sparse model,
    expert load, dropped choices, and router losses where there are further ones.

    Args:
        directory: where to; made when it is not there.
        records: of one training, in order; without any nothing is written.
        run: its configuration.
    """
    if not records:
        return
    if records[-1].preference:
        pictures = {"loss": preference_figure(records)}
    else:
        pictures = {"loss": loss_figure(records, run.model.vocab_size)}
    if run.model.sparse_layers:
        assert run.model.moe is not None
        factor = run.routing.relative_capacity(run.model.moe.num_experts_per_tok)
        pictures["expert_load"] = expert_load_figure(records, factor)
        if run.routing.policy != "dropless":
            pictures["dropped"] = dropped_figure(records)
        if records[-1].router_losses:
            pictures["router_losses"] = router_losses_figure(records)
    directory.mkdir(exist_ok=True)
    for name, png in pictures.items():
        (directory / f"{name}.png").write_bytes(png)


def loss_figure(records: Sequence[StepRecord], vocab_size: int | None = None) -> bytes:
    """The loss over the steps, where outputs are held to those of another model the distance from
    it, and the learning rate below.

    The axis of the loss is logarithmic when the loss falls to less than a tenth.

    Args:
        records: of one training, in order.
        vocab_size: marks ln V, the loss of a guess among all tokens.
    """
    figure = new_figure(4.8)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    steps = [r.step for r in records]
    lm = [r.lm_loss for r in records]
    top.plot(steps, [r.loss for r in records], color=ORANGE, alpha=0.4, lw=4, label="total loss")
    top.plot(steps, lm, color=BLUE, lw=1.4, label="language model loss")
    if records[-1].distillation is not None:
        # a resumed training may have begun without it
        far = [math.nan if r.distillation is None else r.distillation for r in records]
        top.plot(steps, far, color=GREEN, lw=1.4, label="distance from the other model")
    if np.nanmax(lm) > 10 * np.nanmin(lm) > 0:
        logarithmic(top)
    else:
        top.set_ylim(bottom=0)
    top.set_ylabel("loss (nats per token)")
    if vocab_size is not None:
        level = math.log(vocab_size)
        top.axhline(level, color=GREY, ls=":", lw=1.2)
        text = f"ln {vocab_size} = {level:.2f}: a blind guess"
        top.annotate(
            text, (0.99, level), (0, -3), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="right", va="top", color=GREY, fontsize=8.5,
        )  # fmt: skip
    last = records[-1]
    top.annotate(
        f"{last.lm_loss:.3g}", (last.step, last.lm_loss), (4, 0), textcoords="offset points",
        va="center", color=BLUE, fontsize=9, annotation_clip=False,
    )  # fmt: skip
    top.legend(loc="lower left", frameon=False)
    _rate_panel(bottom, records)
    _epoch_axis(top, records)
    return png_of(figure)


def preference_figure(records: Sequence[StepRecord]) -> bytes:
    """The loss of the preferences over the steps, how many pairs are in the right order, and the
    learning rate. The language-model loss is not trained, and not drawn.

    Args:
        records: of one training on pairs of answers, in order.
    """
    figure = new_figure(6.0)
    top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=(3, 2, 1))
    steps = [r.step for r in records]
    top.plot(steps, [r.preference["loss"] for r in records], color=BLUE, lw=1.4)
    top.set_ylabel("preference loss")
    top.set_ylim(bottom=0)
    right = [100.0 * r.preference["rewards/accuracies"] for r in records]
    middle.plot(steps, right, color=ORANGE, lw=1.4)
    middle.set_ylabel("accuracy")
    middle.yaxis.set_major_formatter("{x:g} %")
    middle.set_ylim(0, 105)
    _rate_panel(bottom, records)
    _epoch_axis(top, records)
    return png_of(figure)


def _rate_panel(axes: Axes, records: Sequence[StepRecord]) -> None:
    """The learning rate over the steps, the lowest panel of a figure."""
    axes.plot([r.step for r in records], [r.lr for r in records], color=GREEN, lw=1.6)
    axes.set_ylabel("learning rate")
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    axes.set_xlabel("step")
    axes.set_xlim(0, records[-1].step)


def expert_load_figure(
    records: Sequence[StepRecord], capacity_factor: float | None = None
) -> bytes:
    """The share of choices that each expert receives, layer by layer, over the steps.

    Args:
        records: of one training of a sparse model, in order.
        capacity_factor: marks the share above which choices are dropped.

    Raises:
        DataError: a dense model has no experts.
    """
    load = np.array([r.expert_load for r in records])  # [steps, layers, experts]
    if load.ndim != 3 or 0 in load.shape:
        raise DataError("no expert load", rule="the model has no sparse layers")
    from matplotlib.colors import TwoSlopeNorm

    _, layers, experts = load.shape
    balanced = 100.0 / experts
    figure = new_figure(1.2 + layers * max(1.6, 0.2 * experts))
    panels = figure.subplots(layers, 1, sharex=True, squeeze=False)[:, 0]
    norm = TwoSlopeNorm(balanced, vmin=0.0, vmax=2 * balanced)
    for layer, panel in enumerate(panels):
        image = panel.imshow(
            100.0 * column_means(load[:, layer]).T,
            aspect="auto",
            interpolation="nearest",
            cmap="PuOr_r",
            norm=norm,
            extent=(0.5, len(records) + 0.5, experts - 0.5, -0.5),
        )
        panel.set_ylabel(f"sparse layer {layer}\nexpert")
        panel.set_yticks(range(experts) if experts <= 16 else range(0, experts, experts // 8))
        panel.grid(False)
    panels[-1].set_xlabel("step")
    bar = figure.colorbar(image, ax=list(panels), extend="max", pad=0.015, aspect=30)
    bar.ax.set_title("share of the\nlayer's choices", fontsize=9, loc="left")
    ticks = {
        0.0: "0 %",
        balanced: f"{balanced:.3g} %  balanced",
        2 * balanced: f"{2 * balanced:.3g} %",
    }
    if capacity_factor is not None and 1.04 < capacity_factor < 1.9:
        ticks[capacity_factor * balanced] = f"{capacity_factor * balanced:.4g} %  capacity"
    bar.set_ticks(list(ticks), labels=list(ticks.values()))
    bar.ax.axhline(balanced, color="black", lw=1)
    _epoch_axis(panels[0], records)
    return png_of(figure)


def dropped_figure(records: Sequence[StepRecord]) -> bytes:
    """The share of choices that found their expert full, or of tokens that no expert took, over
    the steps.
    """
    figure = new_figure(2.6)
    axes = figure.subplots()
    steps = [r.step for r in records]
    dropped = 100.0 * np.array([r.dropped_fraction for r in records])
    axes.plot(steps, dropped, color=BLUE, alpha=0.4, lw=0.8, label="each step")
    axes.plot(
        steps, smooth(dropped, _per_epoch(records)), color=BLUE, lw=1.8, label="mean over an epoch"
    )
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter("{x:g} %")
    axes.set_ylabel("dropped choices")
    axes.set_xlabel("step")
    axes.set_xlim(0, steps[-1])
    axes.legend(loc="best", frameon=False)
    _epoch_axis(axes, records)
    return png_of(figure)


def router_losses_figure(records: Sequence[StepRecord]) -> bytes:
    """Every router loss over the steps, without its coefficient, each in a panel with its name.

    Args:
        records: of one training in order, with further router losses.
    """
    steps = [r.step for r in records]
    losses = {"aux": [r.aux_loss for r in records], "z": [r.z_loss for r in records]}
    for name in records[-1].router_losses:
        # a resumed training may have begun without it
        losses[name] = [r.router_losses.get(name, math.nan) for r in records]
    figure = new_figure(0.8 + 1.5 * len(losses))
    panels = figure.subplots(len(losses), 1, sharex=True, squeeze=False)[:, 0]
    for panel, (name, values) in zip(panels, losses.items(), strict=True):
        panel.plot(steps, values, color=BLUE, lw=1.4)
        panel.set_ylabel(name)
        panel.set_ylim(bottom=0)
    panels[-1].set_xlabel("step")
    _epoch_axis(panels[0], records)
    return png_of(figure)


def new_figure(height: float) -> Figure:
    """An empty figure of the common width; ``height`` in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height), dpi=DPI, layout="constrained")


def logarithmic(axes: Axes) -> None:
    """Makes the axis of a loss logarithmic, with plain numbers beside it."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def png_of(figure: Figure) -> bytes:
    """The figure as a file."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_axisbelow(True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _epoch_axis(axes: Axes, records: Sequence[StepRecord]) -> None:
    """A second axis on top that counts epochs."""
    per_step = records[-1].epoch / records[-1].step
    top = axes.secondary_xaxis("top", functions=(lambda x: x * per_step, lambda x: x / per_step))
    top.set_xlabel("epoch")


def _per_epoch(records: Sequence[StepRecord]) -> int:
    """Steps of an epoch, at least 1."""
    return max(1, round(records[-1].step / max(records[-1].epoch, 1e-9)))


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over ``window`` neighbouring values, centred; over fewer at both ends."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    middle = np.arange(len(values))
    starts = np.maximum(0, middle - window // 2)
    ends = np.minimum(len(values), middle + (window + 1) // 2)
    return (sums[ends] - sums[starts]) / (ends - starts)


def column_means(load: np.ndarray) -> np.ndarray:
    """[steps, experts] -> at most HEAT_COLUMNS rows, each the mean of neighbouring steps."""
    return np.stack([part.mean(0) for part in np.array_split(load, min(len(load), HEAT_COLUMNS))])
