"""``convert``: from Hugging Face's files, by bytes, against copying and MindFormers' algorithm."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import checkpoints
from benchmarks.harness import Measured, SideSpec, measure, started
from benchmarks.peer import Work, timed

Say = Callable[[str], None]
Case = Mapping[str, Any]
LAYERS = (2, 4, 8)


def _work(make: Callable[[Path], None], case: Case, outputs: Callable[[Path], Any]) -> Work:
    """Makes the target once for the comparison, then anew for each measurement.

    The source stays in the page cache, for all sides.
    """
    target = Path(case["folder"]) / f"target-{os.getpid()}"

    def made() -> None:
        make(target)

    def clear() -> None:
        if target.is_dir():
            shutil.rmtree(target)
        elif target.exists():
            target.unlink()

    made()
    found = outputs(target)
    clear()

    def measure_once() -> dict[str, float]:
        taken = timed(made)
        clear()
        return {case["figure"]: taken}

    peak = _peak_bytes()
    return Work(measure_once, found, {"peak_bytes": peak} if peak else {})


def _peak_bytes() -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return float(lines[0].split()[1]) * 1024 if lines else 0.0


def _checksum(tensor: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(tensor).data)


def _checksums(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of all tensors, in the order of their names: 32 bits each, which float64 holds exactly."""
    sums = [_checksum(tensors[name]) for name in sorted(tensors)]
    return {
        "checksums": np.array(sums),
        "names": np.array(zlib.crc32(repr(sorted(tensors)).encode())),
    }


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    found: dict[str, np.ndarray] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


def _pieces(folder: Path) -> dict[str, np.ndarray]:
    """Checksums of every expert's and every other tensor's bytes, sorted: whatever their names."""
    sums = []
    for name, tensor in _tensors(folder).items():
        parts = tensor if ".experts." in name and tensor.ndim == 3 else tensor[None]
        sums += [_checksum(part) for part in parts]
    return {"checksums": np.array(sorted(sums))}


def ours(case: Case) -> Work:
    """To our own format: experts stacked, digests written, all of it on the disk."""
    from mistral_ms.checkpoint import convert

    source = Path(case["checkpoint"])
    return _work(lambda target: _ignored(convert(source, target)), case, _pieces)


def ours_to_mindformers(case: Case) -> Work:
    """To MindFormers' names and stacked experts."""
    from mistral_ms.checkpoint import convert

    source = Path(case["checkpoint"])
    return _work(
        lambda target: _ignored(convert(source, target, "mindformers")),
        case,
        lambda target: _checksums(_tensors(target)),
    )


def _ignored(_: object) -> None:
    """What a conversion says of itself."""


def copy(case: Case) -> Work:
    """``cp -r`` and ``sync`` of what it wrote."""

    def make(target: Path) -> None:
        subprocess.run(["cp", "-r", case["checkpoint"], target], check=True)
        subprocess.run(["sync", *sorted(map(str, target.iterdir()))], check=True)

    return _work(make, case, _pieces)


def load_convert_save(case: Case) -> Work:
    """The algorithm of MindFormers 1.x: everything is loaded, renamed, stacked, and saved at once.

    Written anew, after its ``convert_weight``; the model of transformers that it loads in between
    is left out, which makes it faster. It saves safetensors, as ours does here, and waits for the
    disk, which it does not do by itself.
    """
    import mindspore as ms
    from mindspore import Parameter, Tensor

    names = (
        ("embed_tokens.weight", "tok_embeddings.embedding_weight"),
        (".self_attn.q_proj.", ".attention.wq."),
        (".self_attn.k_proj.", ".attention.wk."),
        (".self_attn.v_proj.", ".attention.wv."),
        (".self_attn.o_proj.", ".attention.wo."),
        (".input_layernorm.", ".attention_norm."),
        (".post_attention_layernorm.", ".ffn_norm."),
        (".block_sparse_moe.gate.", ".feed_forward.router.dense."),
        ("model.norm.weight", "model.norm_out.weight"),
    )

    def make(target: Path) -> None:
        loaded = _tensors(Path(case["checkpoint"]))
        config = json.loads((Path(case["checkpoint"]) / "config.json").read_text())
        saved = []
        for name in [name for name in loaded if ".experts." not in name]:
            renamed = name
            for theirs, new in names:
                renamed = renamed.replace(theirs, new)
            saved.append({"name": renamed, "data": Parameter(Tensor(loaded[name]), name=renamed)})
        for layer in range(config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            for w in ("w1", "w2", "w3"):
                stacked = np.stack(
                    [
                        loaded[f"{prefix}block_sparse_moe.experts.{e}.{w}.weight"]
                        for e in range(config["num_local_experts"])
                    ]
                )
                renamed = f"{prefix}feed_forward.ffn.{w}.weight"
                saved.append({"name": renamed, "data": Parameter(Tensor(stacked), name=renamed)})
        target.mkdir()
        ms.save_checkpoint(saved, str(target / "model.safetensors"), format="safetensors")
        subprocess.run(["sync", *map(str, target.iterdir())], check=True)

    return _work(make, case, lambda target: _checksums(_tensors(target)))


def run(say: Say, rounds: int, small: bool = False) -> list[Measured]:
    """All sizes; targets lie beside the sources, on the disk of the temporary directory."""
    here = "benchmarks.convert"
    changed = "its algorithm written anew, without the model that it loads in between"
    sides = [
        SideSpec("mistral_ms", f"{here}:ours", "pieces", 0.0),
        SideSpec("mistral_ms, to MindFormers", f"{here}:ours_to_mindformers", "named", 0.0),
        SideSpec("cp and sync", f"{here}:copy", "pieces", 0.0),
        SideSpec(
            "MindFormers' algorithm", f"{here}:load_convert_save", "named", 0.0, changed=changed
        ),
        SideSpec("disk", "benchmarks.limits:write_disk", limit=True),
    ]
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        cases = []
        for layers in (1,) if small else LAYERS:
            config = checkpoints.mixtral(layers, checkpoints.TINY if small else checkpoints.NORMAL)
            path = checkpoints.write(Path(folder) / f"layers-{layers}", config)
            size = sum(each.stat().st_size for each in path.iterdir())
            cases.append(
                {
                    "megabytes": round(size / 1e6),
                    "checkpoint": str(path),
                    "folder": folder,
                    "figure": "convert",
                }
            )
        with started(sides, say) as running:
            return measure(running, cases, rounds=rounds, seconds=20.0, say=say)
