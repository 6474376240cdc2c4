"""Reading the files of ``configs/run``: the model that they name, their paths, overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mistral_ms.config.conventions import PACKAGED_TOKENIZER
from mistral_ms.config.hugging_face import from_hf
from mistral_ms.config.load import apply_overrides, read_yaml
from mistral_ms.config.mindformers_yaml import read_mindformers
from mistral_ms.config.mistral_params import from_mistral
from mistral_ms.errors import ConfigError
from mistral_ms.reading import is_dir, is_file, read_json
from mistral_ms.recognition import adapter_error, explain, is_torchs


def read_run_file(path: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """The values of a run file with those of the model that it names, and overrides applied.

    Args:
        path: the file.
        overrides: see :func:`~mistral_ms.config.load_run_config`.

    Raises:
        ConfigError: see :func:`~mistral_ms.config.load.read_yaml` and
            :func:`~mistral_ms.config.load.apply_overrides`.
    """
    values = _beside(path.parent, read_yaml(path))
    # each of these replaces all that the file says under its key
    whole = [
        item for item in overrides if item.startswith(("model=", "init_from=", "distillation="))
    ]
    rest = [item for item in overrides if item not in whole]
    values |= apply_overrides({}, whole)
    values = apply_overrides(_grouped(values), [i for i in rest if i.startswith("init_from.")])
    model, kind = values.get("model"), None
    if model is None and isinstance(values.get("init_from"), dict):
        model, kind = values["init_from"].get("path"), values["init_from"].get("format")
    if isinstance(model, str):
        values["model"] = _read_model(Path(model), kind)
    elif not isinstance(model, dict):
        raise ConfigError(
            "invalid configuration",
            where=f"{path}: model",
            value=repr(model),
            rule="must be the path of a model file or of a checkpoint, or the model's keys",
        )
    return apply_overrides(_without_rival(values, rest), rest)


def _grouped(values: Mapping[str, Any]) -> dict[str, Any]:
    """Spells bare paths under ``init_from`` and ``distillation`` out."""
    bare = {key: values.get(key) for key in ("init_from", "distillation")}
    return {**values, **{key: {"path": p} for key, p in bare.items() if isinstance(p, str)}}


def _read_model(path: Path, kind: object = None) -> dict[str, Any]:
    """The keys of a model file, or of the model that a checkpoint's directory holds.

    Args:
        path: the file or directory; a file of MindFormers' weights stands for its directory.
        kind: the checkpoint's format, where the directory holds several.
    """
    theirs = isinstance(kind, str) and kind.startswith("mindformers")
    if is_file(path) and (theirs or (path.suffix == ".ckpt" and not is_torchs(path))):
        path = path.parent
    if not is_dir(path):
        if (error := explain(path, ConfigError)) is not None:
            raise error
        values = read_yaml(path)
        _move_token_counts(values, path.parent)
        return values
    mistrals = isinstance(kind, str) and kind.startswith("mistral")
    for name, read in (("config.json", from_hf), ("params.json", from_mistral)):
        if is_file(path / name) and not (mistrals and name == "config.json"):
            config, _ = read(read_json(path / name, ConfigError), str(path / name))
            if config.lora is not None:
                raise adapter_error(path, "saved by a training", ConfigError)
            return config.model_dump()
    if (error := explain(path, ConfigError)) is not None:
        raise error
    if any(path.glob("*.ckpt")) or any(path.glob("*.safetensors")):
        return read_mindformers(path)[0].model_dump()
    raise ConfigError(
        "no model", where=path, rule="a checkpoint's directory has a config.json or params.json"
    )


def _beside(directory: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Makes the paths in a run file independent of the working directory."""

    def moved(value: Any) -> Any:
        return str(directory / value) if isinstance(value, str) else value

    values = dict(values)
    for key in ("model", "init_from", "distillation"):
        if key in values:
            values[key] = moved(values[key])
    for key in ("init_from", "distillation"):
        if isinstance(start := values.get(key), dict):
            paths = {part: moved(start[part]) for part in ("path", "adapter") if part in start}
            values[key] = {**start, **paths}
    for group in ("data", "evaluation"):
        if isinstance(source := values.get(group), dict):
            source = dict(source)
            if "dataset" in source:
                source["dataset"] = moved(source["dataset"])
            if isinstance(source.get("inputs"), list):
                source["inputs"] = [moved(item) for item in source["inputs"]]
            values[group] = source
    if isinstance(values.get("model"), dict):
        _move_token_counts(values["model"], directory)
    data = values.get("data")
    if isinstance(data, dict) and not str(data.get("tokenizer")).startswith(PACKAGED_TOKENIZER):
        data["tokenizer"] = moved(data.get("tokenizer"))
    return values


def _move_token_counts(model: dict[str, Any], directory: Path) -> None:
    """The path among a gate's settings."""
    gate = moe.get("gate") if isinstance(moe := model.get("moe"), dict) else None
    if isinstance(gate, dict) and isinstance(gate.get("token_counts"), str):
        gate["token_counts"] = str(directory / gate["token_counts"])


def _without_rival(values: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Who overrides the steps does not mean the file's epochs, and the other way round."""
    merged = dict(values)
    rivals = (
        ("training.max_steps", "num_train_epochs"),
        ("training.num_train_epochs", "max_steps"),
        ("data.dataset", "inputs"),
        ("data.inputs", "dataset"),
        ("evaluation.dataset", "inputs"),
        ("evaluation.inputs", "dataset"),
    )
    given = {item.partition("=")[0] for item in overrides}
    for key, rival in rivals:
        group = key.partition(".")[0]
        if key in given and isinstance(merged.get(group), dict):
            merged[group] = {k: v for k, v in merged[group].items() if k != rival}
    return merged
