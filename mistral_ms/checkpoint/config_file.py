"""The configuration file beside the weights, read and written for every format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mistral_ms.checkpoint.detect import NATIVE_BLOCK
from mistral_ms.checkpoint.files import CONFIG, MINDFORMERS_YAML, PARAMS, read_json
from mistral_ms.config import (
    ModelConfig,
    from_hf,
    from_mistral,
    read_mindformers,
    to_hf,
    to_mindformers,
    to_mistral,
    to_native,
)
from mistral_ms.config.base import validate
from mistral_ms.config.packed_quantization import PackedQuantization, read_packed_quantization
from mistral_ms.config.quantization import Quantization
from mistral_ms.config.tables import mapping
from mistral_ms.errors import CheckpointError, ConfigError
from mistral_ms.reading import is_file

QUANTIZATION = "quantization"
"""The key of our block that says how the experts are stored."""
HF_QUANTIZATION = "quantization_config"


def read_config(path: Path, kind: str) -> tuple[ModelConfig, tuple[str, ...]]:
    """Reads the configuration beside the weights.

    Args:
        path: the checkpoint's directory.
        kind: its format.

    Returns:
        The model, and the names of the keys that were ignored.

    Raises:
        CheckpointError: no such file, or it describes something that is not supported.
    """
    try:
        if kind == "mistral" or (kind == "mistral-dump" and (path / PARAMS).exists()):
            return _read_params(path / PARAMS)
        if kind == "mindformers" and not is_file(path / CONFIG):
            return read_mindformers(path)
        source = read_json(path / CONFIG)
        if kind == "mistral_ms":
            _check_format(path, source)
        elif read_quantization(path, kind) is not None:
            del source[HF_QUANTIZATION]  # how weights are stored is no part of the model
        return from_hf(source, str(path / CONFIG))
    except ConfigError as error:
        raise CheckpointError(
            error.what, where=error.where, value=error.value, rule=error.rule, todo=error.todo
        ) from error


def read_quantization(path: Path, kind: str) -> Quantization | PackedQuantization | None:
    """How weights of a checkpoint are quantised; None: they are not.

    Args:
        path: the checkpoint's directory.
        kind: its format.

    Raises:
        CheckpointError: in a way that is not known.
    """
    if kind not in ("mistral_ms", "hf"):
        return None
    source = read_json(path / CONFIG)
    block = source.get(NATIVE_BLOCK) if kind == "mistral_ms" else None
    try:
        if isinstance(block, dict) and block.get(QUANTIZATION) is not None:
            where = f"{path / CONFIG}: {NATIVE_BLOCK}.{QUANTIZATION}"
            return validate(Quantization, mapping(block[QUANTIZATION], where), where)
        if kind == "hf" and source.get(HF_QUANTIZATION) is not None:
            where = f"{path / CONFIG}: {HF_QUANTIZATION}"
            return read_packed_quantization(source[HF_QUANTIZATION], where)
        return None
    except ConfigError as error:
        raise CheckpointError(
            error.what, where=error.where, value=error.value, rule=error.rule, todo=error.todo
        ) from error


def describes_itself(path: Path) -> bool:
    """Whether a configuration lies beside weights that MindFormers has written."""
    return is_file(path / CONFIG) or any(is_file(each) for each in path.glob("*.y*ml"))


def model_type_of(path: Path, kind: str) -> object:
    """The ``model_type`` of a checkpoint of Hugging Face's; None of any other."""
    return read_json(path / CONFIG).get("model_type") if kind == "hf" else None


def _read_params(path: Path) -> tuple[ModelConfig, tuple[str, ...]]:
    source = read_json(path)
    if source.get("quantization") is not None:
        raise CheckpointError(
            "quantised weights",
            where=f"{path}: quantization",
            value=source["quantization"],
            rule="only float32, float16 and bfloat16 weights are supported",
            todo="use the model's unquantised repository",
        )
    if "num_hidden_layers" in source:
        # The first dump was converted with a params.json that had HF's keys.
        kind = "mixtral" if "num_local_experts" in source else "mistral"
        return from_hf({"model_type": kind, **source}, str(path))
    return from_mistral(source, str(path))


def _check_format(path: Path, source: Mapping[str, Any]) -> None:
    block = source.get(NATIVE_BLOCK)
    version = block.get("format") if isinstance(block, dict) else None
    if version != 1:
        raise CheckpointError(
            "unknown format version",
            where=f"{path / CONFIG}: {NATIVE_BLOCK}.format",
            value=version,
            rule="this release reads format 1",
        )


def encode_config(
    config: ModelConfig,
    kind: str,
    layout: str | None = None,
    quantization: Quantization | None = None,
) -> tuple[str, dict[str, Any]]:
    """Name and content of the configuration file of a format.

    Args:
        config: the model.
        kind: hf, mistral, mistral_ms or mindformers.
        layout: of mindformers: gmm is for inference with a cache, graph for our own models.
        quantization: of mistral_ms: how the experts are quantised.

    Raises:
        ConfigError: the format cannot express the model.
    """
    if kind == "hf" or layout == "graph":
        return CONFIG, to_hf(config)
    if kind == "mistral":
        return PARAMS, to_mistral(config)
    if kind == "mindformers":
        return MINDFORMERS_YAML, to_mindformers(config, use_past=layout == "gmm")
    values = to_native(config)
    if quantization is not None:
        values[NATIVE_BLOCK][QUANTIZATION] = quantization.model_dump(mode="json")
    return CONFIG, values
