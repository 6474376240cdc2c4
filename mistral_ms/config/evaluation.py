"""How a training is judged while it goes on."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, model_validator

from mistral_ms.config.base import Frozen


class EvaluationConfig(Frozen):
    """Held-out data of a run.

    Attributes:
        eval_steps: steps between evaluations; the last step is always followed by one.
        dataset: directory written by the ``data`` command, with sequences of the run's length.
        inputs: txt and jsonl files; packed into the run's own directory, as ``data.inputs`` are:
            with the tokenizer and the packing that ``data`` names.
        batch_size: sequences at a time.
        keep_best: keep the weights of the lowest loss so far, in the directory ``best``.
        early_stopping_patience: end the training after so many evaluations in a row that were no
            better than the best before them; None never does.
    """

    eval_steps: int = Field(ge=1)
    dataset: Path | None = None
    inputs: tuple[Path, ...] = ()
    batch_size: int = Field(default=8, ge=1)
    keep_best: bool = False
    early_stopping_patience: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _one_source(self) -> EvaluationConfig:
        if self.dataset is not None and self.inputs:
            raise ValueError("give either evaluation.dataset or evaluation.inputs")
        return self
