"""Tensors that MindFormers has read, under our names; and models written as checkpoints."""

from __future__ import annotations

import re
from collections.abc import Container, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Parameter

from mistral_ms.checkpoint import Source, open_checkpoint
from mistral_ms.checkpoint.buffers import check_buffers
from mistral_ms.checkpoint.dtypes import FROM_CONFIG, TO_CONFIG
from mistral_ms.checkpoint.keys import HF, HF_FUSED, MINDFORMERS, MINDFORMERS_GRAPH, KeyTable
from mistral_ms.checkpoint.layout import format_layout
from mistral_ms.checkpoint.load import set_values, to_numpy
from mistral_ms.checkpoint.mindformers_layout import find_table
from mistral_ms.checkpoint.plan import check_tensors, make_plan
from mistral_ms.checkpoint.safetensors_file import Observer, TensorInfo, read_header
from mistral_ms.checkpoint.stream import read_array, stream
from mistral_ms.config import ModelConfig
from mistral_ms.config.computation import check_same_model
from mistral_ms.errors import CheckpointError, ConfigError
from mistral_ms.layers.parameter import weight
from mistral_ms.weights import EMBEDDING

WHERE = "load_checkpoint"


def _patterns(table: KeyTable) -> Iterator[tuple[re.Pattern[str], str]]:
    """For each tensor of a format: what its name matches, and our name with places to fill."""
    for ours, stored in table.items():
        pattern = re.escape(stored.name).replace(r"\{layer\}", r"(?P<layer>\d+)")
        pattern = pattern.replace(r"\{expert\}", r"(?P<expert>\d+)")
        yield re.compile(pattern), ours


_NAMES = tuple(pattern for each in (HF, HF_FUSED, MINDFORMERS) for pattern in _patterns(each))
_LEGACY = MINDFORMERS[EMBEDDING].name


def converted_name(name: str) -> str:
    """Our name of a tensor of Hugging Face's, or of MindFormers 1.x: an expert's is that of all
    experts of its layer, and w1 stands for w1 and w3 where they are stored together. Other names
    stay.
    """
    for pattern, ours in _NAMES:
        if found := pattern.fullmatch(name):
            return ours.format(layer=found.groupdict().get("layer"))
    return name


class ParameterStore:
    """Tensors in memory in the place of a checkpoint's files, see
    :class:`~mistral_ms.checkpoint.stream.Store`.

    Args:
        parameters: by their names.
    """

    def __init__(self, parameters: Mapping[str, Parameter]) -> None:
        self.tensors: dict[str, TensorInfo] = {}
        self._parameters = parameters
        for name, each in parameters.items():
            dtype = FROM_CONFIG.get(str(each.dtype).lower(), str(each.dtype))
            self.tensors[name] = TensorInfo(tuple(each.shape), dtype, Path(WHERE))
        self._newest: tuple[str, np.ndarray] | None = None

    def read_into(self, name: str, start: int, out: np.ndarray) -> None:
        """See the protocol."""
        out[...] = self.flat(name, start, start + out.size)

    def flat(self, name: str, start: int, stop: int) -> np.ndarray:
        """See the protocol."""
        if self._newest is None or self._newest[0] != name:
            values, _ = to_numpy(self._parameters[name])
            self._newest = name, values.reshape(-1)
        return self._newest[1][start:stop]

    def observe(self, observer: Observer) -> None:
        """See the protocol; there are no files to observe."""

    def close(self) -> None:
        """See the protocol."""


def is_legacy(names: Container[str]) -> bool:
    """Whether tensors have the names of MindFormers 1.x."""
    return _LEGACY in names


def converted_weights(
    source: Mapping[str, Parameter], architecture: ModelConfig
) -> dict[str, Parameter]:
    """All tensors of a checkpoint of others under our names, experts stacked by their numbers.

    Args:
        source: by Hugging Face's names, those of transformers 4 or of 5; or by those of
            MindFormers 1.x, in any layout of the experts, whatever a training added.
        architecture: the model.

    Raises:
        CheckpointError: missing or extra tensors, wrong shapes.
    """
    store = ParameterStore(source)
    kind, table = "hf", HF
    if is_legacy(source):
        kind = "mindformers"
        table = find_table(store.tensors, architecture, None, Path(WHERE))
    elif any(name.endswith(".mlp.experts.gate_up_proj") for name in source):
        table = HF_FUSED
    layout = format_layout(architecture, table)
    skipped = check_buffers(kind, store, architecture)
    held = {name: info for name, info in store.tensors.items() if name not in skipped}
    if architecture.tie_word_embeddings:
        held.pop("lm_head.weight", None)
    check_tensors(held, layout.shapes, WHERE)
    found = {}
    for assembly in make_plan(layout, format_layout(architecture)):
        dtype = store.tensors[assembly.pieces[0].source].dtype
        parameter = weight(*assembly.shape, dtype=TO_CONFIG[dtype])
        set_values(parameter, read_array(partial(stream, store), assembly, dtype))
        parameter.name = assembly.name
        found[assembly.name] = parameter
    return found


def experts_of(source: Mapping[str, Parameter]) -> dict[str, int]:
    """How many experts the router's weight of a layer chooses among; nothing for a dense model."""
    for name, each in source.items():
        if converted_name(name).endswith(".moe.router.weight"):
            return {"num_local_experts": int(each.shape[0])}
    return {}


def open_same(path: Path, model: ModelConfig, verify: bool = True) -> Source:
    """Opens a whole checkpoint of any known format for a model; also a file of MindFormers without
    a configuration beside it, whose model is this one then.

    Args:
        path: a directory, or a file that MindFormers has written.
        model: what its weights are read into.
        verify: see :func:`~mistral_ms.checkpoint.open_checkpoint`.

    Raises:
        CheckpointError: see there.
        ConfigError: it is of another model.
    """
    source = open_checkpoint(path, config=model, verify=verify)
    # MindFormers' files need not say it, and it changes nothing within the sequences that are run
    longest = source.config.max_position_embeddings
    todo = "set the keys of model.model_config and moe_config to those of the checkpoint"
    try:
        compared = model.model_copy(update={"max_position_embeddings": longest})
        check_same_model(compared, source.config, f"load_checkpoint {path}", todo)
    except BaseException:
        source.close()
        raise
    return source


def check_for_ranks(config: Mapping[str, Any], path: Path, model: ModelConfig) -> None:
    """Checks what several processes are to load: the parts that ranks have saved, which MindFormers
    knows, or a whole checkpoint in the forms of the auto-parallel graph.

    Args:
        config: of the run.
        path: its ``load_checkpoint``.
        model: the model.

    Raises:
        CheckpointError: a whole checkpoint in other forms, or of another model.
        ConfigError: settings with which it is not read.
    """
    if config.get("load_ckpt_format", "ckpt") != "safetensors":
        raise ConfigError(
            "unsupported value",
            where="load_ckpt_format",
            value=config.get("load_ckpt_format", "ckpt"),
            rule="several processes cut their parts out of safetensors files",
            todo="set load_ckpt_format: safetensors",
        )
    if (path / "rank_0").is_dir() or (path.is_file() and path.parent.name.startswith("rank_")):
        return
    held: dict[str, TensorInfo] = {}
    for file in sorted(path.glob("*.safetensors")):
        held |= read_header(file).tensors
    for name, shape in format_layout(model, MINDFORMERS_GRAPH).shapes.items():
        found = held.get(name)
        if found is None or found.shape != shape or found.dtype != "F32":
            raise CheckpointError(
                "checkpoint to be converted",
                where=f"load_checkpoint {path}: {name}",
                value="missing" if found is None else f"{found.dtype} {list(found.shape)}",
                rule=f"several processes read float32 {list(shape)}: the forms of their graph",
                todo="python run_mixtral.py convert SRC DST --to mindformers --layout graph "
                "--dtype fp32, and load DST",
            )
    if not config.get("auto_trans_ckpt"):
        raise ConfigError(
            "unsupported value",
            where="auto_trans_ckpt",
            value=config.get("auto_trans_ckpt"),
            rule="processes cut their parts out of a whole checkpoint",
            todo="set auto_trans_ckpt: True",
        )
