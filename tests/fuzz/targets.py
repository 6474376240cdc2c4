"""Every reader with its seed, what it is asked to do, and how a silent change would show.

A format without checksums cannot notice a flipped bit in a weight, nor another number in a
configuration. There the oracle is a second reader: the format's own library, on the same damaged
file. Formats of ours carry digests: there the oracle is the undamaged input.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fuzz import seeds
from mistral_ms.checkpoint import convert, inspect, open_checkpoint, open_tensor_set, read_state
from mistral_ms.checkpoint.dtypes import WEIGHT_DTYPES
from mistral_ms.checkpoint.layout import format_layout
from mistral_ms.config import DataConfig, load_any_config, read_end_tokens
from mistral_ms.config.hugging_face_keys import HF_KEYS
from mistral_ms.datasets.description import verify
from mistral_ms.datasets.documents import Rejects, TextDocument, check_inputs, read_documents
from mistral_ms.errors import ConfigError
from mistral_ms.parallel.topology import Topology
from mistral_ms.reading import LINE_BYTES, read_bytes
from mistral_ms.tokenizer import ChatFormat, load_tokenizer

Seen = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """One kind of input.

    Attributes:
        build: writes the undamaged input into a directory that is not there yet.
        read: reads a directory, writing to another path only; returns what it has seen.
        judge: what is wrong about having read this; None when nothing is. Called with the
            damaged directory, what was seen in it, the undamaged one, and what was seen there.
    """

    build: Callable[[Path], None]
    read: Callable[[Path, Path], Seen]
    judge: Callable[[Path, Seen, Path, Seen], str | None]


def _digest(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()


def _stored(path: Path) -> Seen:
    """The bytes of every tensor under its own name, and the configuration."""
    with open_checkpoint(path) as source:
        seen: Seen = {"config": source.config.model_dump(mode="json")}
        for name, info in source.tensors.items():
            values = np.empty(info.size, WEIGHT_DTYPES[info.dtype])
            source.store.read_into(name, 0, values)
            seen[name] = _digest(values.tobytes())
        for name in source.names():
            source.read(name, "keep")
    return seen


def read_checkpoint(path: Path, out: Path) -> Seen:
    sound = inspect(path, verify=True).ok
    convert(path, out)
    # convert need not look at a training's state; but what it reads must be what was written
    return {**_stored(path), "sound": sound}


def read_training(path: Path, out: Path) -> Seen:
    """As for a resume, which looks at the digests first."""
    seen = {**read_checkpoint(path, out)}
    if not seen["sound"]:
        return seen
    seen["state"] = read_state(path)
    with open_tensor_set(path, "optimizer") as stored:
        for name in stored.names():
            seen[f"optimizer {name}"] = _digest(stored.read(name).tobytes())
    return seen


def like_the_library(damaged: Path, seen: Seen, good: Path, before: Seen) -> str | None:
    """The same bytes as safetensors' or torch's own reader gives, and the numbers of the JSON."""
    theirs: dict[str, str] = {}
    files = sorted(damaged.iterdir())
    mapped = [file for file in files if file.suffix == ".safetensors"]
    for file in mapped or files:  # pickles beside safetensors are not read
        if file.suffix == ".safetensors":
            import safetensors

            for name, entry in safetensors.deserialize(file.read_bytes()):
                theirs[name] = _digest(entry["data"])
        elif file.suffix in (".bin", ".pth"):
            import torch

            for name, tensor in torch.load(file, "cpu", weights_only=True, mmap=False).items():
                bits = tensor.contiguous().reshape(-1).view(torch.uint8)
                theirs[name] = _digest(bits.numpy().tobytes())
    ours = {name: value for name, value in seen.items() if name not in ("config", "sound")}
    if ours.items() - theirs.items():
        return f"other bytes than the library's: {sorted(ours.items() - theirs.items())[0][0]}"
    file = damaged / "config.json"
    if not (damaged / "params.json").exists() and file.exists() and seen["config"]["moe"] is None:
        for key, value in json.loads(file.read_text()).items():
            if key in HF_KEYS and isinstance(value, int | float):
                found = seen["config"][HF_KEYS[key][0]]
                if found != value:
                    return f"{key} is {value} in the file and {found} here"
    return None


def like_protobuf(damaged: Path, seen: Seen, good: Path, before: Seen) -> str | None:
    """The same bytes as protobuf finds by MindSpore's own description of the format."""
    found = importlib.util.find_spec("mindspore")
    assert found is not None
    assert found.origin is not None
    path = Path(found.origin).parent / "train" / "checkpoint_pb2.py"
    spec = importlib.util.spec_from_file_location("checkpoint_pb2", path)
    assert spec is not None
    assert spec.loader is not None
    description = sys.modules.setdefault("checkpoint_pb2", importlib.util.module_from_spec(spec))
    os.environ["PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION"] = "python"  # as MindSpore sets it
    if not hasattr(description, "Checkpoint"):
        spec.loader.exec_module(description)
    theirs: dict[str, bytes] = {}
    for file in damaged.glob("*.ckpt"):
        message = description.Checkpoint()
        message.ParseFromString(file.read_bytes())
        for value in message.value:
            theirs[value.tag] = theirs.get(value.tag, b"") + value.tensor.tensor_content
    ours = {name: value for name, value in seen.items() if name not in ("config", "sound")}
    others = [name for name, value in ours.items() if _digest(theirs[name]) != value]
    return f"other bytes than protobuf's: {others[0]}" if others else None


def like_before(damaged: Path, seen: Seen, good: Path, before: Seen) -> str | None:
    """Files with digests: what was read is what was written, or nothing was read."""
    keys = before if seen.get("sound", True) else before.keys() & seen.keys() - {"sound"}
    if different := [key for key in keys if seen.get(key) != before[key]]:
        return f"not noticed: {different[0]} has changed"
    return None


def nothing(damaged: Path, seen: Seen, good: Path, before: Seen) -> str | None:
    """No redundancy and no second reader: that it ends well is all that can be said."""
    return None


def read_run(path: Path, out: Path) -> Seen:
    run = load_any_config(path / "run.yaml", ["parallel.pp=1", "model.rope_theta=1e4"])
    Topology.of(run.parallel)
    format_layout(run.model)
    return {"run": run.model_dump(mode="json")}


def read_overrides(path: Path, out: Path) -> Seen:
    data = read_bytes(path / "overrides.txt", ConfigError, LINE_BYTES)
    lines = data.decode("utf-8", "surrogateescape").splitlines()  # as in a program's arguments
    overrides = [line[:5000].replace("\0", "") for line in lines[:5]]
    return {"run": load_any_config(path.with_name("run.yaml"), overrides).model_dump(mode="json")}


def overrides_seed(path: Path) -> None:
    path.mkdir()
    text = (
        "training.max_steps=5\nmodel.hidden_size=16\nparallel.dp=4\nrouting.capacity_factor=2.0\n"
    )
    (path / "overrides.txt").write_text(text)
    path.with_name("run.yaml").write_text(yaml.safe_dump(seeds.RUN))


def read_tokenizer(path: Path, out: Path) -> Seen:
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode("abc a é\n")
    special, _ = tokenizer.encode_special("a<x> b</s>")
    seen = {"ids": ids, "text": tokenizer.decode(ids), "special": special}
    if tokenizer.settings.templates:
        seen["chat"] = ChatFormat(tokenizer).encode_chat([{"role": "user", "content": "a"}])
    return seen | {"size": tokenizer.vocab_size, "ends": list(read_end_tokens(path))}


def read_chat(path: Path, out: Path) -> Seen:
    chat = ChatFormat(load_tokenizer(path))
    turns = [{"role": "user", "content": "abc"}, {"role": "assistant", "content": "a"}]
    return {"prompt": chat.encode_chat(turns[:1]), "whole": chat.encode_dialogue(turns).ids}


def read_texts(path: Path, out: Path) -> Seen:
    inputs = sorted(p for p in path.iterdir())
    check_inputs(inputs)
    texts: list[Any] = []
    for file in inputs:
        config = DataConfig(seq_length=4, split_lines=file.name.lower().startswith("b"))
        for document in read_documents(file, config, Rejects(False), lambda size: None):
            if isinstance(document, TextDocument):
                texts.append("".join(document.chunks))
            else:
                texts.append(list(document.messages))
    return {"texts": texts}


def like_json(damaged: Path, seen: Seen, good: Path, before: Seen) -> str | None:
    """Each document is what Python's own parser finds in its line."""
    theirs: list[Any] = []
    for file in sorted(damaged.iterdir()):
        text = file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
        for line in filter(str.strip, text.split("\n")):
            if file.suffix.lower() == ".jsonl":
                record = json.loads(line)
                line = record.get("text", record.get("messages"))
            theirs.append(line)
    return None if seen["texts"] == theirs else "other documents than the lines hold"


def read_dataset(path: Path, out: Path) -> Seen:
    info = verify(path)
    return {f.name: _digest((path / f.name).read_bytes()) for f in info.files}


TARGETS: dict[str, Target] = {
    "hf_single": Target(seeds.hf_single, read_checkpoint, like_the_library),
    "hf_shards": Target(seeds.hf_shards, read_checkpoint, like_the_library),
    "bin_zip": Target(seeds.bin_zip, read_checkpoint, like_the_library),
    "bin_shards": Target(seeds.bin_shards, read_checkpoint, like_the_library),
    "bin_legacy": Target(seeds.bin_legacy, read_checkpoint, like_the_library),
    "mistral": Target(seeds.mistral, read_checkpoint, like_the_library),
    "mistral_pth": Target(seeds.mistral_pth, read_checkpoint, like_the_library),
    "mindformers": Target(seeds.mindformers, read_checkpoint, like_the_library),
    "mindformers_ckpt": Target(seeds.mindformers_ckpt, read_checkpoint, like_protobuf),
    "native": Target(seeds.native, read_training, like_before),
    "parts": Target(seeds.parts, read_checkpoint, like_before),
    "run_yaml": Target(seeds.run_yaml, read_run, nothing),
    "run_files": Target(seeds.run_files, read_run, nothing),
    "predict_yaml": Target(seeds.predict_yaml, read_run, nothing),
    "overrides": Target(overrides_seed, read_overrides, nothing),
    "tokenizer_json": Target(seeds.tokenizer_json, read_tokenizer, nothing),
    "tokenizer_model": Target(seeds.tokenizer_model, read_tokenizer, nothing),
    "chat": Target(seeds.chat, read_chat, nothing),
    "documents": Target(seeds.documents, read_texts, like_json),
    "dataset": Target(seeds.dataset, read_dataset, like_before),
}
