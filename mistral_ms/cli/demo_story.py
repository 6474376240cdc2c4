"""What happens in the demo: train, save, export, convert back, compare, generate."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from mistral_ms.checkpoint import convert, open_checkpoint, save_native
from mistral_ms.checkpoint.load import to_numpy
from mistral_ms.config import GenerationConfig, RunConfig
from mistral_ms.data import demo_text
from mistral_ms.datasets import InMemorySequences
from mistral_ms.inference import Completion, Engine
from mistral_ms.models import CausalLM
from mistral_ms.tokenizer import Tokenizer, packaged_tokenizer
from mistral_ms.training import (
    MetricsWriter,
    StepRecord,
    TrainingSummary,
    TrainStep,
    make_objective,
    show_progress,
    train,
)
from mistral_ms.training.report import Check

BLIND_GUESS_MARGIN = 0.1
"""Fresh weights make logits with a deviation near 0.2, which adds about 0.02 to ln V."""
LEARNT_LOSS = 0.5
"""A full demo ends far below; without learning the loss would stay above 5."""


@dataclass(frozen=True)
class Files:
    """What the demo writes into its directory.

    Attributes:
        root: the directory.
    """

    root: Path

    @property
    def page(self) -> Path:
        """The report."""
        return self.root / "report.html"

    @property
    def metrics(self) -> Path:
        """One JSON line a step."""
        return self.root / "metrics.jsonl"

    @property
    def pictures(self) -> Path:
        """The report's figures as files."""
        return self.root / "figures"

    @property
    def checkpoint(self) -> Path:
        """Our checkpoint, as trained."""
        return self.root / "checkpoint"

    @property
    def exported(self) -> Path:
        """The same in Hugging Face's format."""
        return self.root / "hf"

    @property
    def returned(self) -> Path:
        """The export, converted back to our format."""
        return self.root / "returned"


@dataclass(frozen=True)
class Text:
    """What is learnt.

    Attributes:
        size: bytes of the text.
        ids: its tokens, BOS first.
        title: its first line, the prompt of the generation.
        title_ids: the tokens of the title, BOS first; ``ids`` begins with them.
    """

    size: int
    ids: tuple[int, ...]
    title: str
    title_ids: tuple[int, ...]


@dataclass(frozen=True)
class Story:
    """All that happened, for the page and the JSON file.

    Attributes:
        run: the configuration.
        files: what was written.
        text: what was learnt.
        parameters: of the model.
        records: one a step.
        summary: of the training.
        completion: what the model wrote after the title.
        recited: how many of its tokens are the text's own, up to the first that is not.
        checks: what was verified.
        seconds: wall time of everything.
    """

    run: RunConfig
    files: Files
    text: Text
    parameters: int
    records: Sequence[StepRecord]
    summary: TrainingSummary
    completion: Completion
    recited: int
    checks: Sequence[Check]
    seconds: float


def tell(console: Console, run: RunConfig, output: Path, *, learns: bool) -> Story:
    """Runs the demo.

    Args:
        console: shows what is going on.
        run: model and training.
        output: an existing directory; what the demo wrote there before is replaced.
        learns: the training is long enough for the text to be learnt; that is checked.
    """
    started = time.perf_counter()
    files, tokenizer = Files(output), packaged_tokenizer()
    text = read_text(tokenizer)
    model = CausalLM(run.model, run.routing)
    model.initialize(run.training.seed)
    parameters = sum(weight.size for weight in model.weights().values())

    console.print(
        f"\n[bold]1[/]  training {parameters / 1e6:.1f} million parameters on "
        f"{text.size / 1000:.1f} kB of text ({len(text.ids)} tokens)"
    )
    records: list[StepRecord] = []
    source = InMemorySequences(
        text.ids, run.training.seq_length, run.training.global_batch_size, run.training.seed
    )
    with (
        MetricsWriter(files.metrics) as metrics,
        show_progress(console, run.training.last_step) as progress,
    ):
        pooled = run.routing.aux_loss == "pooled"
        objective = make_objective(model, run.training, pooled_aux=pooled)
        update = TrainStep(objective, run.training)
        summary = train(update, source, (records.append, metrics, progress))

    console.print(f"\n[bold]2[/]  saving the checkpoint: {files.checkpoint}")
    weights = {name: to_numpy(weight)[0] for name, weight in model.weights().items()}
    save(run, weights, tokenizer, files.checkpoint)
    console.print(f"[bold]3[/]  exporting to Hugging Face's format: {files.exported}")
    convert(files.checkpoint, files.exported, "hf", overwrite=True)
    console.print(f"[bold]4[/]  converting the export back: {files.returned}")
    convert(files.exported, files.returned, "mindspore", overwrite=True)

    console.print("[bold]5[/]  generating, greedily:\n")
    completion = generate(files.checkpoint, text, run.training.seq_length)
    console.print(f"[dim]{text.title}[/]", end="")
    console.print(completion.text, markup=False)
    expected = text.ids[len(text.title_ids) :]
    recited = matching(completion.token_ids, expected)

    checks = [
        *loss_checks(summary, run.model.vocab_size, learns),
        same_weights("the checkpoint holds the trained weights", weights, files.checkpoint),
        same_weights("to Hugging Face and back changes no bit", weights, files.returned),
    ]
    if learns:
        checks.append(recitation(recited, len(completion.token_ids)))
    console.print("\n[bold]6[/]  checks")
    for check in checks:
        console.print(
            f"   {'passed' if check.passed else 'FAILED'}  {check.name}: {check.detail}",
            markup=False,
        )
    return Story(
        run=run,
        files=files,
        text=text,
        parameters=parameters,
        records=records,
        summary=summary,
        completion=completion,
        recited=recited,
        checks=checks,
        seconds=time.perf_counter() - started,
    )


def read_text(tokenizer: Tokenizer) -> Text:
    """The packaged text and its first line."""
    text = demo_text()
    title = text.partition("\n")[0]
    return Text(
        size=len(text.encode("utf-8")),
        ids=tuple(tokenizer.encode(text)),
        title=title,
        title_ids=tuple(tokenizer.encode(title)),
    )


def save(
    run: RunConfig, weights: Mapping[str, np.ndarray], tokenizer: Tokenizer, path: Path
) -> None:
    """Writes the trained model as a checkpoint of ours, its tokenizer with it."""
    tensors = ((name, array.shape, "float32", array) for name, array in weights.items())
    save_native(path, run.model, tensors, tokenizer.files, overwrite=True)


def generate(checkpoint: Path, text: Text, length: int) -> Completion:
    """Continues the title up to ``length`` tokens: as far as a sequence of the training reached."""
    engine = Engine.load(checkpoint, max_length=length)
    request = GenerationConfig(max_new_tokens=length - len(text.title_ids))
    return engine.generate([text.title_ids], request).completions[0]


def matching(ids: Sequence[int], expected: Sequence[int]) -> int:
    """How many tokens agree, up to the first that does not."""
    pairs = zip(ids, expected, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(ids), len(expected)))


def loss_checks(summary: TrainingSummary, vocab_size: int, learns: bool) -> list[Check]:
    """Whether the loss began where it must and ended where it should."""
    first, final, guess = summary.first_lm_loss, summary.final_lm_loss, math.log(vocab_size)
    limit = LEARNT_LOSS if learns else first
    return [
        Check(
            "the loss begins at a blind guess",
            abs(first - guess) <= BLIND_GUESS_MARGIN,
            f"{first:.3f}, and ln {vocab_size} = {guess:.3f}",
        ),
        Check(
            "the loss falls",
            final < limit,
            f"from {first:.3f} to {final:.4f} (required: below {limit:.4g})",
        ),
    ]


def same_weights(name: str, weights: Mapping[str, np.ndarray], path: Path) -> Check:
    """Whether a checkpoint holds exactly these tensors, bit for bit."""
    with open_checkpoint(path) as source:
        stored = set(source.names())
        different = sorted(stored ^ set(weights))
        different += [
            key
            for key in sorted(stored & set(weights))
            if source.read(key, "keep").tobytes() != weights[key].tobytes()
        ]
    if different:
        return Check(name, False, f"{len(different)} tensors differ, the first is {different[0]}")
    return Check(name, True, f"{len(stored)} of {len(stored)} tensors are equal bit for bit")


def recitation(recited: int, generated: int) -> Check:
    """Whether the model knows how the text begins: at least half of what it writes is the text."""
    return Check(
        "the model recites its text",
        2 * recited >= generated,
        f"the first {recited} of {generated} generated tokens are the text's own",
    )


def result(story: Story) -> dict[str, Any]:
    """What ``--json`` writes."""
    files = story.files
    return asdict(story.summary) | {
        "total_seconds": round(story.seconds, 1),
        "parameters": story.parameters,
        "text_tokens": len(story.text.ids),
        "prompt": story.text.title,
        "text": story.completion.text,
        "token_ids": list(story.completion.token_ids),
        "recited_tokens": story.recited,
        "checks": [asdict(check) for check in story.checks],
        "passed": all(check.passed for check in story.checks),
        "files": {
            "report": str(files.page),
            "metrics": str(files.metrics),
            "checkpoint": str(files.checkpoint),
            "hf": str(files.exported),
            "returned": str(files.returned),
        },
    }
