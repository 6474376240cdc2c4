"""What checkpoints of others carry beside the weights: known, compared where cheap, skipped.

Before transformers 4.32 the frequencies of the rotary positions were stored with every layer, and
Meta's format, which Mistral's descends from, has them once. They follow from the configuration.
MindFormers writes the optimizer's state, counters and the router's statistics into the same files.
Some store the head of a model whose head is its embedding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from mistral_ms.checkpoint.dtypes import WEIGHT_DTYPES, cast, itemsize
from mistral_ms.checkpoint.layout import FormatLayout
from mistral_ms.checkpoint.safetensors_file import TensorInfo
from mistral_ms.checkpoint.stream import CHUNK_BYTES, Store
from mistral_ms.config import ModelConfig
from mistral_ms.errors import CheckpointError
from mistral_ms.weights import EMBEDDING, HEAD

_FREQUENCIES = {
    "hf": re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"),
    "mistral": re.compile(r"rope\.freqs"),
    "mistral-dump": re.compile(r"rope\.freqs"),
}
# Sources: the optimizers' clone(prefix=...) in mindspore and mindformers/core/optim; append_info in
# mindformers/core/callback; the wrappers' parameters; Parameter(...) in modules/transformer/moe.py
# and modules/paged_attention_mgr.py.
_OPTIMIZER = (
    "adam_m", "adam_v", "moment1", "moment2", "moments", "exp_avg", "exp_avg_sq", "max_exp_avg_sq",
    "vhat", "lamb_m", "lamb_v", "momentum_buf", "muon_m", "accu_grads",
)  # fmt: skip
_COUNTERS = (
    "global_step", "epoch_num", "step_num", "loss_scale", "scale_sense", "global_batch_size",
    "current_iterator_step", "last_overflow_iterator_step", "beta1_power", "beta2_power",
    "learning_rate", r"learning_rate_group_\d+", "state_step",
    # of our models in its Trainer
    "router_report", "metrics_scale",
    r"net\.(layers\.\d+\.moe|loss)\.metrics_buffer", r"norm\.square\.\d+",
)  # fmt: skip
_ROUTER = r"model\.layers\.\d+\.feed_forward\.router\.router"
_STATE = re.compile(
    rf"({'|'.join(_OPTIMIZER)})\..+|{'|'.join(_COUNTERS)}"
    rf"|{_ROUTER}\.(topk_bias|expert_load|fi_parameter|pi_cache|fi_cache|cumsum_value)"
    r"|model\.layers\.\d+\.attention\.infer_attention\.(\w+\.)*(key|value)_cache"
)
_BIAS = re.compile(rf"{_ROUTER}\.topk_bias")
_OTHERS = {
    "hf": re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(cos|sin)_cached"),
    "mindformers": _STATE,
}
# half a unit in the last place of each dtype, and room for another order of float32 operations;
# float16 holds small frequencies as subnormal numbers
_RELATIVE = {"F32": 1e-5, "BF16": 2**-8, "F16": 2**-10}
_ABSOLUTE = {"F32": 0.0, "BF16": 0.0, "F16": 2**-24}


def is_no_weight(kind: str, name: str) -> bool:
    """Whether a tensor of a checkpoint of this format is known to be no weight."""
    return any(
        (pattern := table.get(kind)) is not None and pattern.fullmatch(name) is not None
        for table in (_FREQUENCIES, _OTHERS)
    )


def check_buffers(kind: str, store: Store, config: ModelConfig) -> tuple[str, ...]:
    """The names of the tensors that are no weights; frequencies are compared with the model's.

    Those of a model with ``rope_scaling`` are not: some versions stored the scaled ones. A bias
    that MindFormers added to the router's scores must be zero, as it is where it was not trained.

    Args:
        kind: the checkpoint's format.
        store: its files.
        config: the model.

    Raises:
        CheckpointError: frequencies of another ``rope_theta`` or ``head_dim``: weights and
            configuration are not of the same model. Or a router's bias that is not zero.
    """
    frequencies = _FREQUENCIES.get(kind)
    skipped = []
    for name in store.tensors:
        if not is_no_weight(kind, name):
            continue
        if frequencies is not None and frequencies.fullmatch(name):
            if config.rope_scaling is None:
                _compare(store, name, config)
        elif kind == "mindformers" and _BIAS.fullmatch(name):
            _check_bias(store, name)
        skipped.append(name)
    return tuple(skipped)


def skipped_text(names: Sequence[str]) -> str:
    """Says in one line what of a checkpoint was not read."""
    plural = "s" if len(names) > 1 else ""
    if _STATE.fullmatch(names[0]):
        return f"{len(names)} tensor{plural} of a run's state, such as {names[0]}: no weights"
    return f"{len(names)} buffer{plural}, such as {names[0]}: computed from the configuration"


def _check_bias(store: Store, name: str) -> None:
    info = store.tensors[name]
    values = np.ones(1, np.float32)
    if info.dtype == "F32":
        values = np.empty(info.size, np.float32)
        store.read_into(name, 0, values)
    if info.dtype != "F32" or values.any():
        raise CheckpointError(
            "unsupported tensor",
            where=f"{info.file}: {name}",
            value=info.dtype if info.dtype != "F32" else f"up to {np.abs(values).max():.6g}",
            rule="a bias on the router's scores (balance_via_topk_bias) is no part of Mixtral; "
            "only zeros are skipped",
        )


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


def tied_head(config: ModelConfig, layout: FormatLayout, store: Store) -> frozenset[str]:
    """The head's tensor, where a tied model stores it all the same: it must equal the embedding.

    Raises:
        CheckpointError: it does not.
    """
    head = HEAD  # the formats that may have it agree on its name
    if not config.tie_word_embeddings or head not in store.tensors or head in layout.shapes:
        return frozenset()
    embedding = next(p.name for b, p in layout.places.items() if b.name == EMBEDDING)
    one, two = store.tensors[head], store.tensors.get(embedding)
    if two is not None and not (
        one.shape == two.shape
        and one.dtype == two.dtype
        and all(_equal_chunks(store, head, embedding, one))
    ):
        raise CheckpointError(
            "contradiction",
            where=f"{one.file}: {head}",
            value=f"differs from {embedding}",
            rule="tie_word_embeddings is true, so they must be equal",
            todo="set tie_word_embeddings to false if both are meant",
        )
    return frozenset({head})


def _equal_chunks(store: Store, one: str, two: str, info: TensorInfo) -> Iterator[bool]:
    """Whether two tensors are the same bits, a few megabytes at a time."""
    width = itemsize(info.dtype)
    bits = np.dtype(f"u{width}")
    step = CHUNK_BYTES // width
    buffers = np.empty((2, step), WEIGHT_DTYPES[info.dtype])
    for start in range(0, info.size, step):
        left, right = buffers[:, : min(step, info.size - start)]
        store.read_into(one, start, left)
        store.read_into(two, start, right)
        yield np.array_equal(left.view(bits), right.view(bits))
