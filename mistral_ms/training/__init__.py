"""Training: schedule, optimizer, the compiled step, the loop, checkpoints, and what it reports."""

from mistral_ms.training.loop import Observer, TrainingSummary, train
from mistral_ms.training.lr_scheduler import learning_rate
from mistral_ms.training.memory import MemoryReport
from mistral_ms.training.metrics import MetricsWriter, StepRecord, read_metrics
from mistral_ms.training.objective import make_objective
from mistral_ms.training.progress import show_progress
from mistral_ms.training.result import NotFiniteError, StepResult
from mistral_ms.training.run import RunResult, TrainingRun
from mistral_ms.training.step import Progress, TrainStep, Update

__all__ = [
    "MemoryReport",
    "MetricsWriter",
    "NotFiniteError",
    "Observer",
    "Progress",
    "RunResult",
    "StepRecord",
    "StepResult",
    "TrainStep",
    "TrainingRun",
    "TrainingSummary",
    "Update",
    "learning_rate",
    "make_objective",
    "read_metrics",
    "show_progress",
    "train",
]
