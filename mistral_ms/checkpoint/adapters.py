"""Adapters in files: PEFT's, and those that a training here has saved.

To the rest of this package an adapter is a checkpoint of a model that has ``lora``: its tensors are
the adapters' alone, and PEFT's file is one more format with a key table.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from mistral_ms.checkpoint import keys
from mistral_ms.checkpoint.detect import WeightFiles
from mistral_ms.checkpoint.files import (
    ADAPTER_CONFIG,
    ADAPTER_MODEL,
    CONFIG,
    adapter_files,
    inside,
    read_json,
)
from mistral_ms.checkpoint.fused_adapters import FusedStore, fused_form
from mistral_ms.checkpoint.layout import format_layout
from mistral_ms.checkpoint.plan import check_tensors, make_plan, target_dtype
from mistral_ms.checkpoint.shards import open_weights
from mistral_ms.checkpoint.source import Source, open_checkpoint
from mistral_ms.checkpoint.stream import Store
from mistral_ms.checkpoint.target import TargetDirectory
from mistral_ms.checkpoint.writer import Entry, write_tensors
from mistral_ms.config import LoraConfig, ModelConfig
from mistral_ms.config.computation import check_same_model
from mistral_ms.config.lora import ALL_LINEAR
from mistral_ms.config.peft import from_peft, to_peft
from mistral_ms.config.peft_fused import read_fused
from mistral_ms.errors import CheckpointError
from mistral_ms.reading import is_dir, is_file
from mistral_ms.weights import adaptable_modules, specs, unmatched

PEFT, PEFT_FUSED = "peft", "peft-fused"
"""PEFT's files beside the classes of transformers 4, and those beside the classes of version 5."""


def open_adapter(
    path: Path, base: ModelConfig, *, verify: bool = True, follow_links: bool = False
) -> Source:
    """Opens an adapter and checks that it is one of this model.

    Args:
        path: its directory: ``adapter_config.json`` and ``adapter_model.safetensors`` of PEFT, or a
            checkpoint of a training of adapters here.
        base: the model that it changes.
        verify: of what was saved here, compare what is read with the recorded digests.
        follow_links: links may lead out of the directory.

    Returns:
        A source whose tensors are the adapters', and whose model is the base with ``lora``.

    Raises:
        CheckpointError: no adapter is there; a tensor that no matrix of the model has, one that is
            missing, or another shape.
        ConfigError: an adapter of another kind or of another model.
    """
    path = Path(path)
    if is_file(path / ADAPTER_CONFIG):
        return _open_peft(path, base, follow_links)
    if not is_dir(path) or not is_file(path / CONFIG):
        raise CheckpointError(
            "no adapter",
            where=path,
            rule=f"has {ADAPTER_CONFIG} and {ADAPTER_MODEL}, or is a checkpoint of a training of "
            "adapters",
        )
    source = open_checkpoint(path, verify=verify, follow_links=follow_links, adapters=True)
    try:
        if source.config.lora is None:
            raise CheckpointError(
                "a whole model, not an adapter", where=path, todo="give it as the model"
            )
        trained_on = source.config.model_copy(update={"lora": None})
        check_same_model(base, trained_on, f"adapter {path}", "give the model it was trained on")
    except BaseException:
        source.close()
        raise
    return source


def read_adapter_config(path: Path) -> LoraConfig:
    """What PEFT's configuration in a directory says.

    Raises:
        ConfigError: see :func:`~mistral_ms.config.peft.from_peft`.
        CheckpointError: no such file, or no JSON.
    """
    return from_peft(read_json(path / ADAPTER_CONFIG), str(path / ADAPTER_CONFIG))


def _open_peft(path: Path, base: ModelConfig, follow_links: bool) -> Source:
    inside(path, ADAPTER_CONFIG, path, follow_links)
    lora = _without_strangers(read_adapter_config(path), base)
    fused = read_fused(read_json(path / ADAPTER_CONFIG), str(path / ADAPTER_CONFIG))
    config = base.model_copy(update={"lora": lora})
    layout = format_layout(config, keys.PEFT)  # first: says what of the names is wrong
    store = open_peft_tensors(path, follow_links)
    try:
        if fused is None:
            check_tensors(store.tensors, layout.shapes, path)
        else:
            store = FusedStore(store, layout.shapes, fused, path)
        kind = PEFT if fused is None else PEFT_FUSED
        source = Source(path, kind, config, layout, store, follow_links=follow_links)
        source.unapplied = ()
        return source
    except BaseException:
        store.close()
        raise


def open_peft_tensors(path: Path, follow_links: bool = False) -> Store:
    """The file of tensors in a directory of PEFT's.

    Raises:
        CheckpointError: there is none that is read, or it is damaged.
    """
    if not is_file(path / ADAPTER_MODEL):
        others = ", ".join(adapter_files(path)) or None
        raise CheckpointError(
            "missing file",
            where=path / ADAPTER_MODEL,
            value=others,
            rule="of adapters only safetensors are read",
            todo="save it again with PEFT: save_pretrained(DIR, safe_serialization=True)",
        )
    files = WeightFiles(PEFT, "safetensors", "adapter_model", (path / ADAPTER_MODEL,), None)
    return open_weights(path, files, follow_links)


def _without_strangers(lora: LoraConfig, base: ModelConfig) -> LoraConfig:
    """PEFT allows names that the model does not have: they stand for nothing. The tensors of the
    file are compared one by one all the same.
    """
    if isinstance(lora.target_modules, str):
        return lora
    strangers = unmatched(lora.target_modules, adaptable_modules(specs(base)))
    kept = tuple(name for name in lora.target_modules if name not in strangers)
    return lora.model_copy(update={"target_modules": kept}) if kept else lora


def write_peft(
    adapter: Source,
    path: Path,
    base: Path | None,
    *,
    overwrite: bool = False,
    fused: bool = False,
) -> None:
    """Writes an adapter as PEFT does: all of it, or nothing.

    Args:
        adapter: see :func:`open_adapter`.
        path: the directory.
        base: where the model that it changes lies, for ``base_model_name_or_path``.
        overwrite: replace an adapter that is at ``path``.
        fused: as beside the classes of transformers 5, whose experts' weights are stacked.

    Raises:
        CheckpointError: something at ``path``, a full disk.
        ConfigError: ``fused``, and decomposed weights of experts or router.
    """
    config = adapter.config
    assert config.lora is not None
    lora = config.lora
    if lora.target_modules == ALL_LINEAR:  # in PEFT's own files the names are spelled out
        modules = adaptable_modules(specs(config))
        names = tuple(sorted({name.rpartition(".")[2] for name in modules}))
        lora = lora.model_copy(update={"target_modules": names})
    values = to_peft(lora, None if base is None else str(base))
    if fused:
        changed, entries = fused_form(adapter)
        values |= changed
    else:
        entries = []
        for assembly in make_plan(adapter.layout, format_layout(config, keys.PEFT)):
            stored = target_dtype(assembly, adapter.tensors, "keep")
            chunks = partial(adapter.stream, assembly, stored)
            entries.append(Entry(assembly.name, assembly.shape, stored, chunks))
    with TargetDirectory(path, overwrite=overwrite) as target:
        target.write_json(ADAPTER_CONFIG, values)
        for file in adapter.side_files:
            target.copy(file)
        write_tensors(
            target,
            entries,
            stem="adapter_model",
            single=ADAPTER_MODEL,
            metadata={"format": "pt"},
            max_shard_bytes=1 << 63,
        )
        adapter.verify()
