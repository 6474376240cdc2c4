"""The page of ``moe-lab``."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mindspore

from mistral_ms import __version__
from mistral_ms.cli.moe_lab import PAGE, Lab
from mistral_ms.datasets import SequenceSource
from mistral_ms.training.comparison import (
    Trained,
    dropped_curves,
    load_maps,
    loss_curves,
    number_bars,
)
from mistral_ms.training.report import Comparison, Picture, Report, render_html

HEAD = (
    "preset", "loss, trained", "loss, evaluated", "variation of load", "dropped", "ms a step",
    "parameters", "active",
)  # fmt: skip


def write_page(
    lab: Lab, runs: Sequence[Trained], data: SequenceSource, output: Path
) -> list[tuple[Path, str]]:
    """Writes the page, and its figures as files of their own.

    Args:
        lab: what was compared.
        runs: what came of it.
        data: what they learnt.
        output: an existing directory.

    Returns:
        What was written, and what it is.
    """
    drawn = {
        "numbers": (
            "What came of each",
            "Loss of the finished model on the same text outside of training, where nothing is "
            "drawn and nothing dropped; variation of the experts' loads (deviation over mean) and "
            "dropped choices, means of the last quarter of the steps; median time of a step on "
            "this machine.",
            number_bars(runs),
        ),
        "loss": (
            "Loss in training",
            "Mean loss per token of each batch before its update, without the router's losses; "
            "bold: the mean of neighbouring steps. Who chooses by looking at later tokens learns "
            "an easier task here: compare the losses above.",
            loss_curves(runs),
        ),
        "expert_load": (
            "Load of the experts",
            "A row is an expert, a block of rows a sparse layer, white the balanced share: orange "
            "experts are asked more often, purple ones less, before any capacity applies.",
            load_maps(runs),
        ),
        "dropped": (
            "Dropped choices",
            "Share of all choices that found their expert full; of tokens that no expert took, "
            "where experts choose. Whoever is not here drops nothing.",
            dropped_curves(runs),
        ),
    }
    pictures = output / "figures"
    pictures.mkdir(exist_ok=True)
    shown = []
    for name, (title, caption, png) in drawn.items():
        if png is not None:
            (pictures / f"{name}.png").write_bytes(png)
            shown.append(Picture(title, caption, png))
    page, first = output / PAGE, next(iter(lab.runs))
    files = [
        (page, "page"),
        (pictures, "pictures"),
        (output / first / "metrics.jsonl", "metrics"),
    ]
    report = Report(
        title=f"{len(runs)} mixtures of experts side by side",
        lead=(
            f"{', '.join(run.name for run in runs)}: small decoders that differ in their mixture "
            "of experts, trained on the same batches from the same seed. A few minutes on a small "
            "text show how the gates behave; they do not show which one is better at scale."
        ),
        facts=_facts(lab, data),
        comparison=Comparison("Side by side", HEAD, [_row(run) for run in runs]),
        pictures=shown,
        files=[
            (str(page), "this page"),
            (str(pictures), "the pictures of this page"),
            (str(output / "NAME" / "metrics.jsonl"), "one JSON object a step, of each preset"),
            (str(output / "NAME" / "run.yaml"), "what was trained, with everything spelled out"),
        ],
        commands=[
            (
                f"python run_mixtral.py train --config {output / first / 'run.yaml'} output=DIR",
                "the same training with checkpoints",
            )
        ],
    )
    page.write_text(render_html(report), encoding="utf-8")
    return files


def numbers(lab: Lab, runs: Sequence[Trained], output: Path) -> dict[str, Any]:
    """What ``--json`` writes."""
    return {
        "steps": lab.steps,
        "page": str(output / PAGE),
        "presets": [
            {
                "name": run.name,
                "training_loss": run.loss,
                "evaluated_loss": run.evaluated,
                "load_variation": run.load_variation,
                "dropped_fraction": run.dropped,
                "seconds_per_step": run.step_seconds,
                "parameters": run.parameters,
                "active_parameters": run.active,
            }
            for run in runs
        ],
    }


def _row(run: Trained) -> tuple[str, ...]:
    return (
        run.name,
        f"{run.loss:.3f}",
        f"{run.evaluated:.3f}",
        f"{run.load_variation:.2f}",
        f"{100 * run.dropped:.1f} %",
        f"{1000 * run.step_seconds:.0f}",
        f"{run.parameters / 1e6:.2f} M",
        f"{run.active / 1e6:.2f} M",
    )


def _facts(lab: Lab, data: SequenceSource) -> list[tuple[str, str]]:
    run = next(iter(lab.runs.values()))
    model, training = run.model, run.training
    return [
        (
            "Decoder",
            f"{model.num_hidden_layers} layers, hidden size {model.hidden_size}, "
            f"{model.num_attention_heads} heads, vocabulary {model.vocab_size}",
        ),
        ("Data", f"{data.sequences} sequences of {data.seq_length} tokens, the same for all"),
        (
            "Training",
            f"{lab.steps} steps of {training.global_batch_size} sequences, seed {training.seed}, "
            f"{training.optimizer.name}, {training.lr_scheduler_type} after "
            f"{training.warmup_steps} steps of warm-up",
        ),
        (
            "Software",
            f"mistral_ms {__version__}, MindSpore {mindspore.__version__} on "
            f"{mindspore.get_context('device_target')}, Python {platform.python_version()}",
        ),
    ]
