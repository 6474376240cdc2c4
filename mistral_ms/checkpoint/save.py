"""Writes the parameters of a model as a checkpoint of any format that ``convert`` writes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from mistral_ms.checkpoint.adapters import PEFT, open_adapter, write_peft
from mistral_ms.checkpoint.converter import convert
from mistral_ms.checkpoint.load import dtype_name, to_numpy
from mistral_ms.checkpoint.native import save_native
from mistral_ms.config import ModelConfig
from mistral_ms.errors import CheckpointError

if TYPE_CHECKING:
    from mindspore import Parameter

OURS = "mistral_ms"


def save_model(
    path: Path,
    config: ModelConfig,
    weights: Mapping[str, Parameter],
    to: str = OURS,
    extra_files: Mapping[str, bytes | Path] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Writes a model as a checkpoint: all of it, or nothing.

    Args:
        path: its directory, which must not be there unless ``overwrite`` is given.
        config: the architecture.
        weights: what checkpoints hold of it, by our names.
        to: ``mistral_ms``, or another format that ``convert`` writes; of a model with adapters
            ``peft``.
        extra_files: further files by name: bytes, or a file to copy (tokenizers).
        overwrite: replace a checkpoint that is at ``path``.

    Raises:
        CheckpointError: an unknown format, something at ``path``, a full disk.
    """
    dtype = dtype_name(next(iter(weights.values())).dtype)
    config = config.model_copy(update={"torch_dtype": dtype})

    def tensors() -> Iterator[Any]:
        for name, each in weights.items():
            # buffers of gates are float32 whatever the weights are
            own = dtype_name(each.dtype)
            yield name, tuple(each.shape), own, lambda each=each: to_numpy(each)[0]

    if to == OURS:
        save_native(path, config, tensors(), extra_files, overwrite=overwrite)
        return
    if (to == PEFT) != (config.lora is not None):
        raise CheckpointError(
            "format cannot be written",
            where="format",
            value=to,
            rule=f"adapters alone are written as {OURS} or {PEFT}, and nothing else as {PEFT}",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=path.parent) as between:
        native = Path(between) / "model"
        save_native(native, config, tensors(), extra_files)
        if to != PEFT:
            convert(native, path, to, overwrite=overwrite)
            return
        base = config.model_copy(update={"lora": None})
        with open_adapter(native, base) as adapter:
            write_peft(adapter, path, None, overwrite=overwrite)
