"""Whether two configurations are of the same model."""

from __future__ import annotations

from typing import Any

from mistral_ms.config.model import ModelConfig
from mistral_ms.errors import ConfigError

_BESIDES = (
    "torch_dtype",
    "initializer_range",
    "initializer_scale",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
"""Says how a model is stored, drawn or ended, not what it computes."""


def _plain_experts(model: ModelConfig) -> dict[str, Any]:
    """What the sparse layers of Mixtral say of their shape."""
    return {
        "moe_intermediate_size": model.intermediate_size,
        "n_shared_experts": 0,
        "shared_expert_intermediate_size": 0,
        "shared_expert_gate": "none",
        "cmr_gate_drop": 0.0,
        "cmr_gate_loss_p": 1.0,
        "moe_token_dropout": 0.0,
        "extra_feed_forward": "none",
        "layer_experts": None,
    }


def computation(model: ModelConfig) -> dict[str, Any]:
    """What decides a model's tensors and mathematics, one way of saying it for each model."""
    values = model.model_dump(mode="json", exclude=set(_BESIDES))
    values["head_dim"] = model.head_size
    if model.moe is not None:
        values["moe"]["sparse_layers"] = list(model.sparse_layers)
        del values["moe"]["router_aux_loss_coef"]
        values["moe"] |= {
            "moe_intermediate_size": model.expert_size,
            "n_shared_experts": min(1, model.shared_expert_size),  # as one feed-forward
            "shared_expert_intermediate_size": model.shared_expert_size,
        }
        for key, plain in _plain_experts(model).items():
            if values["moe"][key] == plain:
                del values["moe"][key]  # as where nothing was said of it
        for key in model.moe.gate.of_training:
            del values["moe"]["gate"][key]
        if model.moe.gate.default:
            del values["moe"]["gate"]  # as where nothing was said of it
    if model.qk_norm == "none":
        del values["qk_norm"]  # likewise
    if model.lora is None:
        del values["lora"]  # likewise
    if not model.qkv_bias:
        del values["qkv_bias"]  # likewise
    if model.layer_kinds.default:
        values["layer_kinds"] = None  # as where nothing was said of them
    return values


def check_same_model(model: ModelConfig, found: ModelConfig, checkpoint: str, todo: str) -> None:
    """Refuses a checkpoint whose weights a run would use for other mathematics.

    Args:
        model: of the run.
        found: of the checkpoint.
        checkpoint: which, for the message.
        todo: what to do about it, likewise.

    Raises:
        ConfigError: names the first key that differs.
    """
    ours, theirs = computation(model), computation(found)
    for key in dict.fromkeys((*ours, *theirs)):
        if ours.get(key) != theirs.get(key):
            raise ConfigError(
                "checkpoint of another model",
                where=f"model.{key}",
                value=ours.get(key),
                rule=f"{checkpoint} has {theirs.get(key)}",
                todo=todo,
            )
