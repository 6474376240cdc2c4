"""A model that is served: its layout, and what its cache must hold."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, model_validator

from mistral_ms.config.base import Frozen, validate
from mistral_ms.config.model import DType, ModelConfig
from mistral_ms.config.parallel import ParallelConfig
from mistral_ms.config.run import RunConfig
from mistral_ms.config.run_files import read_run_file


class PredictionConfig(Frozen):
    """Sizes that a graph of generation is compiled for.

    Attributes:
        batch: sequences that are computed side by side, over all processes.
        max_length: positions of a sequence, prompt and new tokens together.
        chunk: prompt tokens that are computed at a time.
        dtype: of activations and cache.
    """

    batch: int = Field(ge=1)
    max_length: int = Field(ge=1)
    chunk: int = Field(default=256, ge=1)
    dtype: DType = "bfloat16"

    @model_validator(mode="after")
    def _pieces_fit(self) -> PredictionConfig:
        if self.chunk > self.max_length:
            raise ValueError(f"chunk ({self.chunk}) must not exceed max_length ({self.max_length})")
        return self


class PredictConfig(Frozen):
    """A file ``configs/run/predict_*.yaml``.

    Attributes:
        model: the architecture; in the file as in a training's.
        prediction: sizes of cache and batch.
        parallel: how many processes share the model, and how.
    """

    model: ModelConfig
    prediction: PredictionConfig
    parallel: ParallelConfig = ParallelConfig()

    @model_validator(mode="after")
    def _consistent(self) -> PredictConfig:
        length, longest = self.prediction.max_length, self.model.longest_sequence
        if length > longest:
            raise ValueError(
                f"prediction.max_length ({length}) must not exceed "
                f"the model's positions: {self.model.length_rule}"
            )
        batch, dp = self.prediction.batch, self.parallel.dp
        if batch % dp:
            raise ValueError(f"parallel.dp ({dp}) must divide prediction.batch ({batch})")
        self.parallel.check(self.model)
        return self


def load_any_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig | PredictConfig:
    """Reads a run file of either kind: one with a ``prediction`` is not of a training.

    Args:
        path: the run file.
        overrides: see :func:`~mistral_ms.config.load_run_config`.

    Raises:
        ConfigError: see there.
    """
    values = read_run_file(Path(path), overrides)
    if "prediction" in values:
        return validate(PredictConfig, values, str(path))
    return validate(RunConfig, values, str(path))
