"""The Python interface: models, tokenizers and a trainer with the habits of Hugging Face.

Thin over the rest of the package, which the command line uses, too; in one process.
"""

from mistral_ms.auto.configuration import AutoConfig
from mistral_ms.auto.modeling import (
    AutoModelForCausalLM,
    CausalLMOutput,
    MistralForCausalLM,
    MixtralForCausalLM,
)
from mistral_ms.auto.tokenization import AutoTokenizer, BatchEncoding
from mistral_ms.auto.trainer import Trainer, TrainerCallback, TrainerState, TrainingArguments
from mistral_ms.config import when_unknown
from mistral_ms.shipped import import_shipped

when_unknown(import_shipped)  # checkpoints may name any gate of the package

__all__ = [
    "AutoConfig",
    "AutoModelForCausalLM",
    "AutoTokenizer",
    "BatchEncoding",
    "CausalLMOutput",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "Trainer",
    "TrainerCallback",
    "TrainerState",
    "TrainingArguments",
]
