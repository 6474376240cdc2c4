"""What the keys of MindFormers' model and expert configurations mean here.

A key of ``model_config`` is one of the *model*, under MindFormers' name or Hugging Face's (see
:mod:`mistral_ms.config.hugging_face_keys`), *ours* (read under MindFormers' trainer), *theirs*
(read by MindFormers' trainer and generator), *fixed* (accepted with the values that mean what is
computed here), or *without effect*. Every other key is refused by name. Two readers use these
tables: :mod:`mistral_ms.config.mindformers_yaml` of checkpoints, to which the settings of a run
say nothing, and :mod:`mistral_ms.mindformers` of runs.

Sources: ``LlamaConfig``, ``MoEConfig`` and ``TransformerOpParallelConfig`` of MindFormers 1.7, 1.9
and 2.1, and the configuration files of ``research/mixtral`` in 1.7.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from mistral_ms.config.tables import is_one_of
from mistral_ms.errors import ConfigError


class Fixed(NamedTuple):
    """A key that must have a value that changes nothing.

    Attributes:
        allowed: the values.
        reason: why no other.
        of_run: it says how a run is done: to whoever reads weights alone any value is the same.
    """

    allowed: tuple[Any, ...]
    reason: str
    of_run: bool = False


def check_fixed(where: str, value: Any, fixed: Fixed) -> None:
    """Raises for a value that would change what is computed; ``...`` is an absent key.

    Raises:
        ConfigError: names the key, the reason, and what is allowed.
    """
    if value is ... or is_one_of(value, fixed.allowed):
        return
    allowed = ", ".join(map(repr, fixed.allowed))
    raise ConfigError(
        "unsupported value",
        where=where,
        value=repr(value),
        rule=fixed.reason,
        todo=f"set {allowed}",
    )


MODEL: Mapping[str, tuple[str, Any]] = {
    "hidden_size": ("hidden_size", ...),
    "intermediate_size": ("intermediate_size", ...),
    "num_layers": ("num_hidden_layers", ...),
    "num_heads": ("num_attention_heads", ...),
    "n_kv_heads": ("num_key_value_heads", None),
    "vocab_size": ("vocab_size", ...),
    "max_position_embedding": ("max_position_embeddings", None),
    "rms_norm_eps": ("rms_norm_eps", 1e-5),
    "theta": ("rope_theta", 10000.0),
    "tie_word_embeddings": ("tie_word_embeddings", False),
    "bos_token_id": ("bos_token_id", 1),
    "eos_token_id": ("eos_token_id", 2),
    "pad_token_id": ("pad_token_id", 0),
}
"""Their name of a key of the model -> ours, and what ``LlamaConfig`` assumes where it is silent."""
MOE: Mapping[str, tuple[str, Any]] = {
    "expert_num": ("num_local_experts", ...),
    "num_experts_chosen": ("num_experts_per_tok", 1),
    "norm_topk_prob": ("norm_topk_prob", True),
}
"""The same of ``moe_config`` and ``MoEConfig``."""

RENAMED: Mapping[str, str] = {
    **{theirs: ours for theirs, (ours, _) in MODEL.items() if theirs != ours},
    "init_method_std": "initializer_range",
}

# What a configuration says that states nothing: the first eight are those of Hugging Face's
# MixtralConfig and MistralConfig; see HF_CLASS_DEFAULTS for the rest of theirs.
ARCHITECTURE_DEFAULTS: Mapping[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

SEQ_LENGTH = 2048
"""Their default of ``seq_length``."""
OURS_OF_RUN: Mapping[str, Any] = {
    "batch_size": 1,
    "seq_length": SEQ_LENGTH,
    "ignore_token_id": -100,
    "compute_dtype": "float32",
    "param_init_type": "float32",
    "use_past": False,
    "seed": 0,
    "router_z_loss_coef": 0.0,
    "weights_from": None,
    "capacity_multiple_of": 1,
}
OURS: Mapping[str, Any] = {
    **OURS_OF_RUN,
    "num_local_experts": None,
    "num_experts_per_tok": None,
    "router_aux_loss_coef": None,
}
"""Read here, with their defaults. The experts of ``moe_config`` count where it has any."""

THEIRS: Mapping[str, Any] = {
    "block_size": 16,
    "num_blocks": 512,
    "is_dynamic": False,
    "max_decode_length": 1024,
    "do_sample": False,
    "top_k": 1,
    "top_p": 1.0,
    "temperature": 1.0,
    "repetition_penalty": 1.0,
    "input_sliced_sig": False,
}
"""Read by MindFormers' generator, with the defaults that make it greedy."""

BASE_ATTRIBUTES = frozenset(
    {
        "checkpoint_name_or_path",
        "pretrained_model_dir",
        "mindformers_version",
        "is_sample_acceleration",
        "quantization",
        "pet_config",
        "parallel_config",
        "moe_config",
        "dataset_config",
        "calculate_per_token_loss",
        "generation_config",
        "type",
        "text_config",
        "vision_config",
        "head_config",
        "name_or_path",
    }
)
"""What MindFormers' own base class, or its trainer, keeps with a configuration."""

_OFF = (False, None)
_ONE = (1, None)
FIXED: Mapping[str, Fixed] = {
    "is_dynamic": Fixed(
        (False,), "shapes are static; prompts are padded to few widths", of_run=True
    ),
    "extend_method": Fixed(("None", None, ""), "longer contexts are rope_scaling here"),
    "scaling_factor": Fixed(_ONE, "longer contexts are rope_scaling here"),
    "qkv_has_bias": Fixed(_OFF, "Mistral's projections have no bias"),
    "attn_proj_has_bias": Fixed(_OFF, "Mistral's projections have no bias"),
    "qkv_concat": Fixed(_OFF, "projections are stored apart, as in Hugging Face's files"),
    "offset": Fixed((0, None), "the stages of a pipeline hold equal runs of layers", of_run=True),
    "pp_interleave_num": Fixed(_ONE, "the graph's stages are one run of layers each", of_run=True),
    "fine_grain_interleave": Fixed(
        _ONE, "micro_batch_interleave_num hides communication here", of_run=True
    ),
    "ffn_dim_multiplier": Fixed((None,), "intermediate_size says it", of_run=True),
    "use_rope_slice": Fixed(_OFF, "rotary rows are gathered by position", of_run=True),
    "use_ring_attention": Fixed(_OFF, "there is no context parallelism", of_run=True),
    "use_eod_attn_mask_compression": Fixed(
        _OFF, "attention does not end at end-of-text tokens", of_run=True
    ),
    "parallel_optimizer": Fixed(_OFF, "parallel.enable_parallel_optimizer says it", of_run=True),
    "quant_config": Fixed((None,), "quantised weights are not supported"),
    "quantization": Fixed((None,), "quantised weights are not supported"),
    "quantization_config": Fixed((None,), "quantised weights are not supported"),
    "pet_config": Fixed((None,), "low-rank adapters are not supported"),
    "llm_backend": Fixed((None, ""), "the model's own code computes"),
    "parallel_decoding_params": Fixed((None,), "one token is generated at a time"),
    "chunk_prefill": Fixed(
        _OFF, "prompts are prefilled whole under MindFormers' generator", of_run=True
    ),
    "return_hidden_states": Fixed(_OFF, "the model gives losses or logits"),
    "calculate_per_token_loss": Fixed(
        _OFF, "the loss is a mean over the counted tokens", of_run=True
    ),
    "pipeline_stage": Fixed((None,), "parallel_config.pipeline_stage says it", of_run=True),
    "text_config": Fixed((None,), "a language model alone"),
    "vision_config": Fixed((None,), "a language model alone"),
    "head_config": Fixed((None,), "a language model alone"),
}

WITHOUT_EFFECT: Mapping[str, str] = {
    "multiple_of": "rounds an intermediate_size that is not given",
    "use_flash_attention": "the device decides which attention runs",
    "use_attn_mask_compression": "how a mask is stored",
    "fused_rms_norm": "the device decides which norm runs",
    "rmsnorm_compute_2d": "how a norm is laid out",
    "disable_lazy_inline": "the pipeline needs lazy inline and sets it",
    "layernorm_compute_type": "norms are computed in float32",
    "softmax_compute_type": "softmax is computed in float32",
    "rotary_dtype": "rotary positions are computed in float32",
    "residual_dtype": "states have the dtype of the computation",
    "embedding_init_type": "the embedding has the dtype of the weights",
}

MOE_READ = frozenset(
    {
        "expert_num",
        "num_experts_chosen",
        "capacity_factor",
        "enable_sdrop",
        "aux_loss_factor",
        "z_loss_factor",
        "router_dense_type",
        "norm_topk_prob",
        "group_wise_a2a",
        "use_fused_ops_topkrouter",
    }
)
"""Keys of ``moe_config`` that are read here."""

_PERMUTES = "the dispatcher decides how rows are permuted"
MOE_FIXED: Mapping[str, Fixed] = {
    "routing_policy": Fixed(("TopkRouterV2",), "TopkRouterV1 drops other tokens, and is not here"),
    "topk_method": Fixed(("greedy", None), "experts are not chosen by groups"),
    "topk_group": Fixed((None, 1), "experts are not chosen by groups"),
    "n_group": Fixed((None, 1), "experts are not chosen by groups"),
    "routed_scaling_factor": Fixed((1.0,), "Mixtral's weights add up to one"),
    "use_gating_sigmoid": Fixed(_OFF, "Mixtral's gate is a softmax"),
    "balance_via_topk_bias": Fixed(
        _OFF, "a bias that balances adds parameters to Mixtral", of_run=True
    ),
    "shared_expert_num": Fixed((0, None), "Mixtral has no shared experts"),
    "use_shared_expert_gating": Fixed(_OFF, "Mixtral has no shared experts"),
    "moe_shared_expert_overlap": Fixed(_OFF, "Mixtral has no shared experts", of_run=True),
    "enable_cold_hot_expert": Fixed(_OFF, "experts stay where they are", of_run=True),
    "hot_expert_num": Fixed((0,), "experts stay where they are", of_run=True),
    "save_token_distribution": Fixed(
        _OFF, "the callback RouterMonitor shows the load", of_run=True
    ),
    "callback_moe_droprate": Fixed(
        _OFF, "the callback RouterMonitor shows what is dropped", of_run=True
    ),
    "comp_comm_parallel": Fixed(
        _OFF, "micro_batch_interleave_num hides communication here", of_run=True
    ),
    "use_allgather_dispatcher": Fixed(_OFF, "rows travel by AlltoAll", of_run=True),
    "enable_deredundency": Fixed(_OFF, "rows travel by AlltoAll", of_run=True),
    "expert_model_parallel": Fixed(
        (None,), "experts are divided as the rest of the layer", of_run=True
    ),
    "aux_loss_types": Fixed(
        ([], None), "aux_loss_factor weighs the load-balancing loss", of_run=True
    ),
    "aux_loss_factors": Fixed(
        ([], None), "aux_loss_factor weighs the load-balancing loss", of_run=True
    ),
    "dispatch_global_max_bs": Fixed((0,), "rows travel by AlltoAll", of_run=True),
}

MOE_WITHOUT_EFFECT: Mapping[str, str] = {
    "use_gmm": _PERMUTES,
    "enable_gmm_safe_tokens": _PERMUTES,
    "use_fused_ops_permute": _PERMUTES,
    "ep_extend_tp": "of inference on Ascend",
    "expert_group_size": "the batch of a data-parallel rank is one group",
    "comp_comm_parallel_degree": "of comp_comm_parallel",
    "cur_layer": "of enable_cold_hot_expert",
    "update_step": "of enable_cold_hot_expert",
    "cold_token_percent": "of enable_cold_hot_expert",
    "moe_module_name": "of enable_cold_hot_expert",
    "max_router_load": "a buffer of theirs",
    "npu_nums_per_device": "of enable_deredundency",
    "first_k_dense_replace": "of models with dense layers",
    "moe_intermediate_size": "of models with shared experts",
    "topk_bias_update_rate": "of balance_via_topk_bias",
}

RECOMPUTE_FIXED: Mapping[str, Fixed] = {
    "parallel_optimizer_comm_recompute": Fixed(_OFF, "weights are gathered once a step"),
    "mp_comm_recompute": Fixed(
        (True, None), "a block is computed again with what its tensor-parallel ranks exchange"
    ),
    "select_comm_recompute": Fixed(_OFF, "a block's exchanges are computed again with it"),
    "select_recompute_exclude": Fixed(_OFF, "operators are not named one by one"),
    "select_comm_recompute_exclude": Fixed(_OFF, "operators are not named one by one"),
}
"""Keys of ``recompute_config`` beside ``recompute`` and ``select_recompute``. One more says
nothing, ``recompute_slice_activation``: what is kept of a block is divided among the
tensor-parallel ranks whatever it is.
"""

OF_OTHER_FILES = frozenset({
    "model_type", "model_name", "architectures", "auto_register", "auto_map", "max_new_tokens",
    "max_length", "min_length", "num_beams", "is_encoder_decoder", "tokenizer_class",
    "transformers_version", "torch_dtype", "return_dict", "start_stage", "stage_num",
    "runner_config", "parallel_decoding", "use_kvcache_op", "init_method_std",
})  # fmt: skip
"""What ``save_pretrained`` and older versions write beside the model, without effect on it."""
MOE_OF_OTHER_FILES = frozenset({"return_extra_loss"})
"""The same of ``moe_config``."""


def _of_run(fixed: Mapping[str, Fixed]) -> frozenset[str]:
    return frozenset(key for key, each in fixed.items() if each.of_run)


HARMLESS = (
    _of_run(FIXED)
    | (OURS_OF_RUN.keys() | THEIRS.keys() | WITHOUT_EFFECT.keys() | BASE_ATTRIBUTES) - FIXED.keys()
    | OF_OTHER_FILES
)
"""Keys without effect on what the weights are and compute: of the run, generation, precision."""
MOE_HARMLESS = (
    _of_run(MOE_FIXED) | MOE_READ - MOE.keys() | MOE_WITHOUT_EFFECT.keys() | MOE_OF_OTHER_FILES
)
"""The same of ``moe_config``."""
