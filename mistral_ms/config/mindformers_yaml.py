"""The model in a yaml file of MindFormers 1.x: read and written at the edge by tables.

Sources of the keys: the constructors of ``LlamaConfig``, ``MoEConfig`` and ``PretrainedConfig`` of
MindFormers 1.9, and the files of its ``research/mixtral``. The settings of a run, which fill most
of such a file, have no meaning here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mistral_ms.config.base import validate
from mistral_ms.config.hugging_face import from_hf
from mistral_ms.config.load import read_yaml
from mistral_ms.config.mindformers_keys import (
    FIXED,
    HARMLESS,
    MODEL,
    MOE,
    MOE_FIXED,
    MOE_HARMLESS,
    SEQ_LENGTH,
    Fixed,
    check_fixed,
)
from mistral_ms.config.model import ModelConfig
from mistral_ms.config.tables import (
    Inexpressible,
    mapping,
    pick,
    refuse_first,
    refuse_unknown,
    take_neutral,
)
from mistral_ms.errors import ConfigError
from mistral_ms.reading import is_file

NO_PAD = -1  # their way to say that no token is padding
# our classes in its Trainer, and the model_type of Hugging Face that they are
ADAPTED = {"MixtralConfig": "mixtral", "MistralConfig": "mistral"}
TYPES = ("LlamaConfig", *ADAPTED)
CLASSES = ("LlamaForCausalLM", "MixtralForCausalLM", "MistralForCausalLM")


def read_mindformers(directory: Path) -> tuple[ModelConfig, tuple[str, ...]]:
    """Reads the one yaml file of a directory that describes a model.

    Raises:
        ConfigError: none or several do; or see :func:`from_mindformers`.
    """
    files = sorted(p for p in directory.iterdir() if p.suffix in (".yaml", ".yml") and is_file(p))
    found = {file: read_yaml(file) for file in files}
    models = {
        file: source
        for file, source in found.items()
        if isinstance(model := source.get("model"), dict) and "model_config" in model
    }
    if len(models) == 1:
        file, source = next(iter(models.items()))
        return from_mindformers(source, str(file))
    raise ConfigError(
        "several configurations" if models else "missing configuration",
        where=directory,
        value=", ".join(file.name for file in models) or None,
        rule="MindFormers' weights do not say the number of heads, the RoPE base or the experts "
        "of each token: a file beside them must",
        todo="leave the one that belongs to the weights"
        if models
        else "copy the yaml file of the run, or the model's config.json, beside the weights",
    )


def from_mindformers(
    source: Mapping[str, Any], where: str = "mindspore_model.yaml"
) -> tuple[ModelConfig, tuple[str, ...]]:
    """Reads the model in a yaml file of MindFormers 1.x: of a run, or of ``save_pretrained``.

    The dtype of the weights is not said there. What the experts are may stand at the top, as in a
    run's file, or within the model; both must then agree. ``save_pretrained`` leaves it out: such
    a file describes a dense model.

    Args:
        source: the parsed file.
        where: its path, for messages.

    Returns:
        As :func:`~mistral_ms.config.hugging_face.from_hf`, and raises as that does.
    """
    model = mapping(source.get("model"), f"{where}: model")
    arch = mapping(model.get("arch") or {}, f"{where}: model.arch")
    values = mapping(model.get("model_config"), f"{where}: model.model_config")
    where_model = f"{where}: model.model_config"
    kind = values.pop("type", None)
    for key, found, supported in (
        ("model.arch.type", arch.get("type"), CLASSES),
        ("model.model_config.type", kind, TYPES),
    ):
        if found not in (None, *supported):
            raise ConfigError(
                "unsupported architecture",
                where=f"{where}: {key}",
                value=repr(found),
                rule=f"supported: {', '.join(supported)}",
            )
    moe = _experts(values.pop("moe_config", None), source.get("moe_config"), where)
    if kind in ADAPTED:
        return _adapted(values, moe, ADAPTED[kind], where_model)
    longest = values.get("seq_length", SEQ_LENGTH)
    picked = pick(values, MODEL, where_model)
    if picked["num_key_value_heads"] is None:
        picked["num_key_value_heads"] = picked["num_attention_heads"]
    if picked["max_position_embeddings"] is None:
        picked["max_position_embeddings"] = longest
    if picked["pad_token_id"] == NO_PAD:
        picked["pad_token_id"] = None
    _take_fixed(values, FIXED, where_model)
    ignored = sorted(HARMLESS & set(values))
    known = ", ".join(sorted(MODEL))
    refuse_unknown({k: v for k, v in values.items() if k not in ignored}, where_model, known)
    if moe is not None:
        picked["moe"] = moe
    return validate(ModelConfig, picked, where_model), tuple(ignored)


def _adapted(
    values: dict[str, Any], moe: dict[str, Any] | None, kind: str, where: str
) -> tuple[ModelConfig, tuple[str, ...]]:
    """A file for our models in MindFormers' Trainer: Hugging Face's keys and defaults, under
    Hugging Face's names or MindFormers'.
    """
    _take_fixed(values, FIXED, where)
    ignored = HARMLESS & set(values)
    renamed: dict[str, Any] = {"model_type": kind}
    for key in values.keys() - ignored:
        ours = MODEL.get(key, (key,))[0]
        if renamed.setdefault(ours, values[key]) != values[key]:
            rule = f"{key} and {ours} are one setting"
            raise ConfigError(
                "contradiction", where=f"{where}: {key}", value=values[key], rule=rule
            )
    if renamed.get("pad_token_id") == NO_PAD:
        renamed["pad_token_id"] = None
    if renamed.get("max_position_embeddings") is None:
        renamed["max_position_embeddings"] = values.get("seq_length", SEQ_LENGTH)
    if moe is not None:
        take_neutral(moe, {"norm_topk_prob": (True,)}, f"{where}: moe_config")
        renamed |= moe
    config, others = from_hf(renamed, where)
    return config, tuple(sorted({*ignored, *others}))


def _take_fixed(values: dict[str, Any], table: Mapping[str, Fixed], where: str) -> None:
    """Takes the keys of the model out; a value that would change the mathematics is an error."""
    for key, fixed in table.items():
        if not fixed.of_run:
            check_fixed(f"{where}: {key}", values.pop(key, ...), fixed)


def _experts(inner: Any, outer: Any, where: str) -> dict[str, Any] | None:
    """The keys of the experts, in our names; None for a dense model."""
    blocks = [
        mapping(block, f"{where}: {key}")
        for key, block in (("model.model_config.moe_config", inner), ("moe_config", outer))
        if block is not None
    ]
    merged: dict[str, Any] = {}
    for block in blocks:
        for key, value in block.items():
            if key in MOE and merged.get(key, value) != value:
                raise ConfigError(
                    "contradiction",
                    where=f"{where}: moe_config.{key}",
                    value=repr(value),
                    rule=f"model.model_config.moe_config has {merged[key]!r}",
                )
        merged |= block
    if merged.get("expert_num", 1) == 1:  # their word for a dense feed-forward
        return None
    where = f"{where}: moe_config"
    picked = pick(merged, MOE, where)
    _take_fixed(merged, MOE_FIXED, where)
    unknown = {k: v for k, v in merged.items() if k not in MOE_HARMLESS}
    refuse_unknown(unknown, where, ", ".join(sorted(MOE)))
    if picked["num_experts_per_tok"] == 1:  # their router then keeps the probability as it is
        picked["norm_topk_prob"] = False
    return picked


def to_mindformers(config: ModelConfig, use_past: bool = False) -> dict[str, Any]:
    """What ``LlamaForCausalLM`` of MindFormers 1.x needs to be built; the inverse of
    :func:`from_mindformers`, as ``save_pretrained`` lays it out.

    Args:
        config: the model.
        use_past: for inference with a cache; with experts their class then wants the gmm layout.

    Raises:
        ConfigError: a model that the format cannot express.
    """
    todo = "keep the model in the mistral_ms format (--to mindspore), or in hf where that has it"
    refuse_first("MindFormers' format", _not_expressible(config), todo)
    data = config.model_dump(mode="json")
    if data["pad_token_id"] is None:
        data["pad_token_id"] = NO_PAD
    values = {theirs: data[ours] for theirs, (ours, _) in MODEL.items()}
    values |= {
        "type": TYPES[0],
        "seq_length": config.max_position_embeddings,
        "compute_dtype": config.torch_dtype,
        "param_init_type": config.torch_dtype,
        "use_past": use_past,
    }
    if config.moe is not None:
        moe = {theirs: data["moe"][ours] for theirs, (ours, _) in MOE.items()}
        # without a capacity no token is dropped; their default is 1.1
        values["moe_config"] = moe | {"routing_policy": "TopkRouterV2", "capacity_factor": -1.0}
    return {"model": {"arch": {"type": CLASSES[0]}, "model_config": values}}


def _not_expressible(config: ModelConfig) -> list[Inexpressible]:
    """What of a model their class does not have."""
    moe, layers, window = config.moe, config.num_hidden_layers, config.sliding_window
    scaling, ends = config.rope_scaling, config.eos_token_id
    no_key = "LlamaConfig has no key for it"
    rules: list[Inexpressible] = [
        (not config.layer_kinds.default, "layer_kinds", config.layer_kinds, no_key),
        (
            window is not None,
            "sliding_window",
            window,
            f"{no_key}; within the window nothing changes: set sliding_window to null and "
            f"max_position_embeddings to {window} in the configuration of a copy",
        ),
        (config.qk_norm != "none", "qk_norm", config.qk_norm, no_key),
        (config.qkv_bias, "qkv_bias", True, no_key),
        (scaling is not None, "rope_scaling", scaling and scaling.rope_type, no_key),
        (
            config.head_size * config.num_attention_heads != config.hidden_size,
            "head_dim",
            config.head_size,
            f"must be hidden_size / num_attention_heads: {no_key}",
        ),
        (isinstance(ends, tuple), "eos_token_id", ends, "must be one: leave one in config.json"),
    ]
    if moe is None:
        return rules
    K, E, sparse = moe.num_experts_per_tok, moe.num_local_experts, list(config.sparse_layers)
    return [
        *rules,
        (len(sparse) != layers, "moe.sparse_layers", sparse, "all layers are sparse, or none"),
        (not moe.gate.default, "moe.gate", moe.gate.name, f"{no_key}: it is softmax_top_k"),
        *((True, f"moe.{key}", value, no_key) for key, value in moe.added),
        (E == 1, "moe.num_local_experts", E, "one expert is a dense model there"),
        (
            K == 1 and moe.norm_topk_prob,
            "moe.norm_topk_prob",
            True,
            "of one expert for each token it takes the weight as it is",
        ),
    ]
