"""Configurations of models by the path of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mistral_ms.checkpoint import open_checkpoint
from mistral_ms.config import ModelConfig, load_model_config
from mistral_ms.config.base import validate


class AutoConfig:
    """Makes a :class:`~mistral_ms.config.ModelConfig`, whose keys are Hugging Face's."""

    @staticmethod
    def from_pretrained(path: str | Path, *, format: str | None = None) -> ModelConfig:
        """The architecture of a checkpoint of any known format, or of a YAML file.

        Args:
            path: the checkpoint's directory; or a file as in ``configs/model``.
            format: which format to read where the directory holds several.

        Raises:
            ConfigError: a YAML file with an unknown key or an impossible value.
            CheckpointError: no checkpoint there, or one that cannot be read.
        """
        path = Path(path)
        if path.suffix in (".yaml", ".yml"):
            return load_model_config(path)
        with open_checkpoint(path, format, verify=False) as source:
            return source.config

    @staticmethod
    def for_model(**keys: Any) -> ModelConfig:
        """The architecture of some keys.

        Raises:
            ConfigError: an unknown key or an impossible value.
        """
        return validate(ModelConfig, keys, "AutoConfig.for_model")
