"""Buffers that old checkpoints carry beside the weights: known, compared where cheap, skipped.

Before transformers 4.32 the frequencies of the rotary positions were stored with every layer, and
Meta's format, which Mistral's descends from, has them once. They follow from the configuration.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from mistral_ms.checkpoint.dtypes import WEIGHT_DTYPES, cast
from mistral_ms.checkpoint.stream import Store
from mistral_ms.config import ModelConfig
from mistral_ms.errors import CheckpointError

_FREQUENCIES = {
    "hf": re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"),
    "mistral": re.compile(r"rope\.freqs"),
    "mistral-dump": re.compile(r"rope\.freqs"),
}
_OTHERS = {
    "hf": re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(cos|sin)_cached"),
}
# half a unit in the last place of each dtype, and room for another order of float32 operations;
# float16 holds small frequencies as subnormal numbers
_RELATIVE = {"F32": 1e-5, "BF16": 2**-8, "F16": 2**-10}
_ABSOLUTE = {"F32": 0.0, "BF16": 0.0, "F16": 2**-24}


def check_buffers(kind: str, store: Store, config: ModelConfig) -> tuple[str, ...]:
    """The names of the tensors that are no weights; frequencies are compared with the model's.

    Those of a model with ``rope_scaling`` are not: some versions stored the scaled ones.

    Args:
        kind: the checkpoint's format.
        store: its files.
        config: the model.

    Raises:
        CheckpointError: frequencies of another ``rope_theta`` or ``head_dim``: weights and
            configuration are not of the same model.
    """
    frequencies, others = _FREQUENCIES.get(kind), _OTHERS.get(kind)
    skipped = []
    for name in store.tensors:
        if frequencies is not None and frequencies.fullmatch(name):
            if config.rope_scaling is None:
                _compare(store, name, config)
            skipped.append(name)
        elif others is not None and others.fullmatch(name):
            skipped.append(name)
    return tuple(skipped)


def skipped_text(names: Sequence[str]) -> str:
    """Says in one line which buffers of a checkpoint were not read."""
    plural = "s" if len(names) > 1 else ""
    return f"{len(names)} buffer{plural}, such as {names[0]}: computed from the configuration"


def _compare(store: Store, name: str, config: ModelConfig) -> None:
    info, size = store.tensors[name], config.head_size
    exponents = np.arange(0, size, 2, dtype=np.float64) / size
    expected = config.rope_theta**-exponents
    rule = f"rope_theta {config.rope_theta:g} and head_dim {size} give others"
    if info.shape != expected.shape:
        raise _contradiction(f"{info.file}: {name}", f"shape {list(info.shape)}", rule)
    stored = np.empty(info.size, WEIGHT_DTYPES[info.dtype])
    store.read_into(name, 0, stored)
    found = stored
    if info.dtype != "F32":
        found = np.empty(info.size, np.float32)
        cast(stored, info.dtype, "F32", found)
    allowed = _ABSOLUTE[info.dtype] + _RELATIVE[info.dtype] * expected
    wrong = np.flatnonzero(~(np.abs(found - expected) <= allowed))
    if wrong.size:
        first = int(wrong[0])
        value = f"element {first} is {found[first]:.6g}, not {expected[first]:.6g}"
        raise _contradiction(f"{info.file}: {name}", value, rule)


def _contradiction(where: str, value: str, rule: str) -> CheckpointError:
    return CheckpointError(
        "contradiction",
        where=where,
        value=value,
        rule=rule,
        todo="take the configuration that the weights were published with",
    )
