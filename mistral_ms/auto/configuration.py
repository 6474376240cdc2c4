"""Configurations of models by the path of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mistral_ms.checkpoint import open_checkpoint
from mistral_ms.config import ModelConfig, from_hf, load_model_config
from mistral_ms.config.base import validate
from mistral_ms.config.hugging_face_keys import HF_MOE_KEYS
from mistral_ms.errors import ConfigError


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
    def for_model(model_type: str | None = None, **keys: Any) -> ModelConfig:
        """The architecture of some keys.

        Args:
            model_type: ``mistral``, ``mixtral`` or another one that checkpoints of Hugging Face
                may have: then the keys are those of its ``config.json``, ``num_local_experts``
                beside ``hidden_size``. None: they are those of the configuration that this
                returns, whose sparse layers are the group ``moe``.
            keys: and their values.

        Raises:
            ConfigError: an unknown key, one that is missing, or an impossible value.
        """
        where = "AutoConfig.for_model"
        if model_type is not None:
            return from_hf({**keys, "model_type": model_type}, where)[0]
        flat = next((key for key in HF_MOE_KEYS if key in keys), None)
        if flat is not None:
            raise ConfigError(
                "unknown key",
                where=f"{where}: {flat}",
                value=keys[flat],
                rule="without model_type keys are those of the configuration, whose sparse layers "
                "are the group moe",
                todo=f'write moe={{"{flat}": ...}}, or model_type="mixtral" before keys of '
                "config.json",
            )
        return validate(ModelConfig, keys, where)
