"""Evaluation on held-out data while a training goes on: records, best weights, an early end."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mistral_ms.checkpoint import CheckpointSeries
from mistral_ms.checkpoint.save import save_model
from mistral_ms.config import EvaluationConfig, RoutingConfig
from mistral_ms.datasets import SequenceSource
from mistral_ms.errors import ConfigError, DataError, TrainingError
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
        data: digest of the held-out sequences.
    """

    step: int
    epoch: float
    loss: float
    perplexity: float
    accuracy: float
    tokens: int
    seconds: float
    best: bool
    data: str


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
        best: directory of the best weights, in a directory of their step.
        extra_files: go there, too (tokenizers).

    Attributes:
        records: all so far.

    Raises:
        TrainingError: the records are of other held-out data.
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
        self._path, self._best, self._files = path, CheckpointSeries(best, 1), extra_files
        self.records = [each for each in read_evaluations(path) if each.step <= step]
        self._digest = data.digest
        if self.records and self.records[-1].data != self._digest:
            raise TrainingError(
                "resume with other held-out data",
                where="evaluation",
                value=f"now {self._digest[:12]}, in {path} {self.records[-1].data[:12]}",
                rule="losses on different data cannot be compared",
                todo=f"move {path} and {best} away to begin anew",
            )
        for later in self._best.steps():
            if later > step:  # of a training that went on beyond the checkpoint
                shutil.rmtree(self._best.path(later))

    def __call__(self, record: StepRecord, told: Sequence[OnEvaluation] = ()) -> None:
        """Evaluates after this step, if it is its turn.

        Args:
            record: of the step.
            told: called with the evaluation's record.
        """
        if record.step % self.config.eval_steps and record.step != self._last_step:
            return
        found = self._evaluate()
        before = [each.loss for each in self.records if math.isfinite(each.loss)]
        lowest = min(before, default=math.inf)
        made = EvaluationRecord(
            step=record.step,
            epoch=record.epoch,
            loss=found.loss,
            perplexity=found.perplexity,
            accuracy=found.accuracy,
            tokens=found.tokens,
            seconds=found.seconds,
            best=bool(found.loss < lowest),
            data=self._digest,
        )
        if made.best and self.config.keep_best:  # first: what is recorded as the best is there
            self._best.save(made.step, self._write)
        self.records.append(made)
        lines = "".join(json.dumps(asdict(each)) + "\n" for each in self.records)
        fresh = self._path.with_name(f".{self._path.name}.new")
        fresh.write_text(lines, encoding="utf-8")
        fresh.replace(self._path)
        for tell in told:
            tell(made)

    def _write(self, path: Path) -> None:
        model = self._model
        save_model(
            path, model.config, model.stored_weights(), extra_files=self._files, overwrite=True
        )

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
