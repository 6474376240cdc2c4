"""The demo's report page."""

from __future__ import annotations

import platform
from collections.abc import Sequence

import mindspore
import numpy as np

from mistral_ms import __version__
from mistral_ms.cli.demo_story import Story
from mistral_ms.optimizers import AdamWConfig, settings_of
from mistral_ms.training import StepRecord
from mistral_ms.training.figures import dropped_figure, expert_load_figure, loss_figure
from mistral_ms.training.report import Passage, Picture, Report, render_html


def write_page(story: Story) -> None:
    """Writes the page, and its figures as files of their own."""
    report = build_report(story)
    story.files.pictures.mkdir(exist_ok=True)
    for name, picture in zip(("loss", "expert_load", "dropped"), report.pictures, strict=True):
        (story.files.pictures / f"{name}.png").write_bytes(picture.png)
    story.files.page.write_text(render_html(report), encoding="utf-8")


def build_report(story: Story) -> Report:
    """What the page says."""
    summary, moe = story.summary, story.run.model.moe
    assert moe is not None
    return Report(
        title="A tiny Mixtral learns a text by heart",
        lead=(
            f"{story.parameters / 1e6:.1f} million parameters, {moe.num_local_experts} experts of "
            f"which each token visits {moe.num_experts_per_tok}, trained on this machine for "
            f"{summary.epochs:.0f} epochs in {summary.seconds:.0f} seconds: the loss went from "
            f"{summary.first_lm_loss:.2f} to {summary.final_lm_loss:.3g}."
        ),
        checks=story.checks,
        facts=_facts(story),
        pictures=_pictures(story),
        passages=[_passage(story)],
        files=_files(story),
        commands=_commands(story),
    )


def _facts(story: Story) -> list[tuple[str, str]]:
    model, training, summary = story.run.model, story.run.training, story.summary
    routing = story.run.routing
    optimizer = settings_of(training.optimizer)
    assert isinstance(optimizer, AdamWConfig)
    moe = model.moe
    assert moe is not None
    return [
        (
            "Model",
            f"{model.num_hidden_layers} layers, hidden size {model.hidden_size}, "
            f"{model.num_attention_heads} heads, {model.num_key_value_heads} key/value heads, "
            f"{moe.num_local_experts} experts of size {model.expert_size}, "
            f"Top-{moe.num_experts_per_tok}, vocabulary {model.vocab_size}",
        ),
        (
            "Routing",
            f"{routing.policy}, factor {routing.capacity_factor}, "
            f"{routing.drop_priority.replace('_', '-')} priority",
        ),
        (
            "Text",
            f"{story.text.size / 1000:.1f} kB, {len(story.text.ids)} tokens "
            "(Mistral's tokenizer v1), packaged with mistral_ms",
        ),
        (
            "Batch",
            f"{training.global_batch_size} sequences of {training.seq_length} tokens, "
            f"seed {training.seed}",
        ),
        (
            "Optimizer",
            f"AdamW, lr {optimizer.learning_rate:g}, betas ({optimizer.adam_beta1:g}, "
            f"{optimizer.adam_beta2:g}), decay {optimizer.weight_decay:g}, "
            + (
                "no clipping"
                if training.max_grad_norm is None
                else f"clipped at {training.max_grad_norm:g}"
            ),
        ),
        (
            "Schedule",
            f"{training.warmup_steps} steps of warm-up, then {training.lr_scheduler_type} to "
            f"{100 * training.min_lr_ratio:g} % of the peak",
        ),
        (
            "Loss",
            f"language model + {training.router_aux_loss_coef:g} × load balancing "
            f"({routing.aux_loss.replace('_', ' ')}) + "
            f"{training.router_z_loss_coef:g} × router z-loss",
        ),
        ("Steps", f"{summary.steps} ({summary.epochs:.1f} epochs)"),
        (
            "Language model loss",
            f"{summary.first_lm_loss:.4f} → {summary.final_lm_loss:.4f}",
        ),
        (
            "Speed",
            f"{summary.tokens_per_s:.0f} tokens/s, {summary.seconds:.0f} s with compilation; "
            f"the whole demo {story.seconds:.0f} s",
        ),
        (
            "Software",
            f"mistral_ms {__version__}, MindSpore {mindspore.__version__} on CPU, "
            f"Python {platform.python_version()}",
        ),
    ]


def _pictures(story: Story) -> list[Picture]:
    records, run = story.records, story.run
    moe = run.model.moe
    assert moe is not None
    factor = run.routing.relative_capacity(moe.num_experts_per_tok)
    epoch = _last_epoch(records)
    load = np.mean([record.expert_load for record in epoch], 0)
    dropped = float(np.mean([record.dropped_fraction for record in epoch]))
    share = 100.0 / moe.num_local_experts
    return [
        Picture(
            "Loss",
            "Mean loss per token of each batch, before its update; the broad line adds the "
            "router's losses. Below: the learning rate.",
            loss_figure(records, run.model.vocab_size),
        ),
        Picture(
            "Expert load",
            "Which share of a layer's choices fell on each expert, before the capacity applies. "
            f"White is the balanced share, {share:.3g} %; orange experts are asked more often "
            f"than that, purple ones less. In the last epoch the shares lie between "
            f"{100 * load.min():.1f} % and {100 * load.max():.1f} %.",
            expert_load_figure(records, factor),
        ),
        Picture(
            "Dropped choices",
            "Share of all choices that found their expert full; such a token goes on through the "
            f"residual. In the last epoch {100 * dropped:.1f} %.",
            dropped_figure(records),
        ),
    ]


def _last_epoch(records: Sequence[StepRecord]) -> list[StepRecord]:
    """The records of the last pass over the data."""
    end = records[-1].epoch
    return [record for record in records if record.epoch > end - 1.0]


def _passage(story: Story) -> Passage:
    generated = len(story.completion.token_ids)
    return Passage(
        prompt=story.text.title,
        written=story.completion.text,
        remark=(
            "Grey: the prompt. Bold: the model's greedy continuation, read from the saved "
            f"checkpoint. Its first {story.recited} of {generated} tokens are the text's own."
        ),
    )


def _files(story: Story) -> list[tuple[str, str]]:
    files = story.files
    return [
        (str(files.page), "this page"),
        (str(files.metrics), "one JSON object per step: losses, rate, gradient norm, expert load"),
        (str(files.pictures), "the pictures of this page"),
        (str(files.checkpoint), "the trained model in our format, with its tokenizer"),
        (str(files.exported), "the same for Hugging Face transformers"),
        (str(files.returned), "that export, converted back"),
    ]


def _commands(story: Story) -> list[tuple[str, str]]:
    files, title = story.files, story.text.title
    return [
        (
            f'.venv/bin/python run_mixtral.py generate {files.checkpoint} --prompt "{title}" '
            "--max-new-tokens 48",
            "let the model write again",
        ),
        (f".venv/bin/python run_mixtral.py inspect {files.exported}", "see what a checkpoint is"),
        (
            f".venv/bin/python run_mixtral.py align {files.exported}",
            "compare its logits with those of transformers",
        ),
    ]
