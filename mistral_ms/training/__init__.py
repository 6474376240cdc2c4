"""Training: schedule, optimizer, the compiled step, the loop, and what it reports."""

from mistral_ms.training.loop import Observer, TrainingSummary, train
from mistral_ms.training.metrics import MetricsWriter, StepRecord, read_metrics
from mistral_ms.training.progress import show_progress
from mistral_ms.training.schedule import learning_rate
from mistral_ms.training.step import StepResult, TrainStep

__all__ = [
    "MetricsWriter",
    "Observer",
    "StepRecord",
    "StepResult",
    "TrainStep",
    "TrainingSummary",
    "learning_rate",
    "read_metrics",
    "show_progress",
    "train",
]
