"""Evaluation on held-out data while a training goes on: records, best weights, an early end."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mistral_ms.checkpoint.save import save_model
from mistral_ms.config import EvaluationConfig, RoutingConfig
from mistral_ms.datasets import SequenceSource
from mistral_ms.errors import ConfigError, DataError
from mistral_ms.models import CausalLM, share_parameters
from mistral_ms.training.evaluate import Evaluator
from mistral_ms.training.metrics import StepRecord


@dataclass(frozen=True, slots=True)
class EvaluationRecord:
    """One line of ``evaluation.jsonl``.

    Attributes:
        step: the update after which it was made.
        epoch: passes over the training data, with their fraction.
        loss: mean negative log-likelihood of the held-out tokens, dropless.
        perplexity: exp(loss).
        accuracy: share of tokens that were the model's best guess.
        tokens: predicted tokens.
        seconds: that it took.
        best: whether the loss is below all before it.
    """

    step: int
    epoch: float
    loss: float
    perplexity: float
    accuracy: float
    tokens: int
    seconds: float
    best: bool


OnEvaluation = Callable[[EvaluationRecord], None]


class HeldOut:
    """Judges a training every so many steps; an observer of its steps.

    Args:
        config: how often, and what follows.
        model: what is trained.
        routing: the policy that it is judged with.
        dtype: of its weights.
        data: the held-out sequences.
        last_step: is always followed by an evaluation.
        path: the file of records; those of later steps than ``step`` are dropped.
        step: of the training so far, which may be resumed.
        best: directory of the best weights.
        extra_files: go there, too (tokenizers).

    Attributes:
        records: all so far.
    """

    def __init__(
        self,
        config: EvaluationConfig,
        model: CausalLM,
        routing: RoutingConfig,
        dtype: str,
        data: SequenceSource,
        *,
        last_step: int,
        path: Path,
        step: int,
        best: Path,
        extra_files: dict[str, bytes | Path],
    ) -> None:
        self.config, self._model, self._last_step = config, model, last_step
        shared = share_parameters(model, routing, positions=data.seq_length, dtype=dtype)
        self._evaluate = Evaluator(shared, data, config.batch_size)
        self._path, self._best, self._files = path, best, extra_files
        self.records = [each for each in read_evaluations(path) if each.step <= step]

    def __call__(self, record: StepRecord, told: Sequence[OnEvaluation] = ()) -> None:
        """Evaluates after this step, if it is its turn.

        Args:
            record: of the step.
            told: called with the evaluation's record.
        """
        if record.step % self.config.eval_steps and record.step != self._last_step:
            return
        found = self._evaluate()
        lowest = min((each.loss for each in self.records), default=math.inf)
        made = EvaluationRecord(
            step=record.step,
            epoch=record.epoch,
            loss=found.loss,
            perplexity=found.perplexity,
            accuracy=found.accuracy,
            tokens=found.tokens,
            seconds=found.seconds,
            best=bool(found.loss < lowest),
        )
        self.records.append(made)
        lines = "".join(json.dumps(asdict(each)) + "\n" for each in self.records)
        fresh = self._path.with_name(f".{self._path.name}.new")
        fresh.write_text(lines, encoding="utf-8")
        fresh.replace(self._path)
        if made.best and self.config.keep_best:
            weights = self._model.weights()
            save_model(
                self._best, self._model.config, weights, extra_files=self._files, overwrite=True
            )
        for tell in told:
            tell(made)

    @property
    def ends_training(self) -> bool:
        """Whether so many evaluations in a row were no better as the configuration allows."""
        patience = self.config.early_stopping_patience
        if patience is None or not self.records:
            return False
        last_best = max(n for n, each in enumerate(self.records) if each.best or n == 0)
        return len(self.records) - 1 - last_best >= patience


def read_evaluations(path: Path) -> list[EvaluationRecord]:
    """Reads what :class:`HeldOut` wrote; nothing where there is no file.

    Raises:
        DataError: a line that is not a record.
    """
    if not path.exists():
        return []
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            found.append(EvaluationRecord(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise DataError(
                "not a record of an evaluation", where=f"{path}: line {number}", value=str(error)
            ) from error
    return found


def check_evaluation(world: int, execution: str) -> None:
    """Raises where a training cannot be judged while it goes on.

    Args:
        world: its processes.
        execution: ``explicit`` or ``graph``.

    Raises:
        ConfigError: names the reason.
    """
    if world > 1 or execution == "graph":
        raise ConfigError(
            "impossible evaluation",
            where="evaluation",
            value=f"{world} processes, execution {execution}",
            rule="a training is judged while it goes on in one process with explicit execution "
            "alone",
            todo="leave evaluation out, and run the evaluate command on its checkpoints",
        )
