"""What every key of a Hugging Face ``config.json`` means here.

A key is *understood* (``HF_KEYS``, ``HF_MOE_KEYS`` and what :mod:`mistral_ms.config.hugging_face`
reads itself), *neutral* (``HF_NEUTRAL``: it would change the mathematics, and only the values that
do not are accepted) or *harmless* (``HF_HARMLESS``: nothing that a model computes depends on it).
Every other key is refused by name.

Sources: ``PretrainedConfig``, ``MistralConfig``, ``MixtralConfig`` and ``MinistralConfig`` of
transformers 4.57, those of 5.x, and the keys of related families that derivatives carry along.
"""

from __future__ import annotations

from typing import Any

# key in config.json -> (our key, HF's default when the key is absent; ... = must be there)
HF_KEYS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", ...),
    "hidden_size": ("hidden_size", ...),
    "intermediate_size": ("intermediate_size", ...),
    "num_hidden_layers": ("num_hidden_layers", ...),
    "num_attention_heads": ("num_attention_heads", ...),
    "num_key_value_heads": ("num_key_value_heads", 8),
    "head_dim": ("head_dim", None),
    "max_position_embeddings": ("max_position_embeddings", 4096 * 32),
    "rms_norm_eps": ("rms_norm_eps", ...),
    "rope_theta": ("rope_theta", ...),
    "sliding_window": ("sliding_window", ...),
    "tie_word_embeddings": ("tie_word_embeddings", False),
    "initializer_range": ("initializer_range", 0.02),
    "torch_dtype": ("torch_dtype", "float32"),
    "bos_token_id": ("bos_token_id", 1),
    "eos_token_id": ("eos_token_id", 2),
    "pad_token_id": ("pad_token_id", None),
}
HF_MOE_KEYS: dict[str, tuple[str, Any]] = {
    "num_local_experts": ("num_local_experts", ...),
    "num_experts_per_tok": ("num_experts_per_tok", 2),
    "router_aux_loss_coef": ("router_aux_loss_coef", 0.001),
}

# What HF's own classes assume where "..." above has a default of the class
# (MistralConfig: window 4096; MixtralConfig: none). Published files state these keys; a file that
# does not is read as transformers would read it.
_DENSE = {"rope_theta": 10000.0, "sliding_window": 4096, "rms_norm_eps": 1e-6}
HF_CLASS_DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": _DENSE,
    "ministral": _DENSE,
    "mixtral": {"rope_theta": 1e6, "sliding_window": None, "rms_norm_eps": 1e-5},
}

# The classes of each model_type that compute what we compute. Ministral is Mistral with
# layer_types; transformers 4.57 takes it for a "mistral" that has them, too.
ARCHITECTURES: dict[str, tuple[str, ...]] = {
    "mistral": ("MistralForCausalLM", "MistralModel", "MinistralForCausalLM"),
    "ministral": ("MinistralForCausalLM", "MinistralModel"),
    "mixtral": ("MixtralForCausalLM", "MixtralModel"),
}

# key -> the values that mean what we implement
_OFF = (False, None)
_NONE_OR_0 = (0, None, False)
_NONE_OR_1 = (1, None)
HF_NEUTRAL: dict[str, tuple[Any, ...]] = {
    # activations, biases, norms
    "hidden_act": ("silu", "swish"),
    "hidden_activation": ("silu", "swish", None),
    "attention_bias": _OFF,
    "mlp_bias": _OFF,
    "bias": _OFF,
    "use_bias": _OFF,
    "qkv_bias": _OFF,
    "attention_out_bias": _OFF,
    "norm_type": ("rms_norm", "rms", "rmsnorm", None),
    "use_qk_norm": _OFF,
    "qk_norm": _OFF,
    "qk_layernorm": _OFF,
    "swiglu_limit": (None,),
    # attention
    "is_causal": (True, None),
    "is_decoder": _OFF,
    "is_encoder_decoder": _OFF,
    "add_cross_attention": _OFF,
    "cross_attention_hidden_size": (None,),
    "tie_encoder_decoder": _OFF,
    "pruned_heads": ({}, [], None),
    "parallel_attn": _OFF,
    "clip_qkv": (None,),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "query_pre_attn_scalar": (None,),
    "attention_chunk_size": (None,),
    "use_sliding_window": (True, None),
    "max_window_layers": (None,),
    # positions
    "alibi": _OFF,
    "position_embedding_type": ("rope", "rotary", "absolute", None),  # absolute: BERT's default
    "partial_rotary_factor": _NONE_OR_1,
    "rotary_pct": _NONE_OR_1,
    "rotary_dim": (None,),
    "rope_local_base_freq": (None,),
    "rope_interleaved": _OFF,
    "no_rope_layers": ([], None),
    "original_max_position_embeddings": (None,),
    # multipliers
    "logits_scaling": _NONE_OR_1,
    "logit_scale": _NONE_OR_1,
    "embedding_multiplier": _NONE_OR_1,
    "residual_multiplier": _NONE_OR_1,
    "attention_multiplier": (None,),
    "scale_emb": _NONE_OR_1,
    "scale_depth": (None,),
    # experts
    "router_jitter_noise": _NONE_OR_0,
    "norm_topk_prob": (True, None),
    "n_shared_experts": _NONE_OR_0,
    "num_shared_experts": _NONE_OR_0,
    "shared_expert_intermediate_size": _NONE_OR_0,
    "moe_intermediate_size": (None,),
    "routed_scaling_factor": _NONE_OR_1,
    "scoring_func": ("softmax", None),
    "first_k_dense_replace": _NONE_OR_0,
    "moe_layer_freq": _NONE_OR_1,
    "decoder_sparse_step": _NONE_OR_1,
    "mlp_only_layers": ([], None),
    "n_group": _NONE_OR_1,
    "topk_group": _NONE_OR_1,
    "num_nextn_predict_layers": _NONE_OR_0,
    # the numbers in the files
    "compression_config": (None,),
    "pretraining_tp": _NONE_OR_1,
}

# Keys without effect on what a model computes, by the reason.
_REASONS: dict[str, tuple[str, ...]] = {
    "says where the file comes from": (
        "_name_or_path",
        "name_or_path",
        "_commit_hash",
        "transformers_version",
        "unsloth_version",
        "unsloth_fixed",
        "transformers.js_config",
        "finetuning_task",
        "task_specific_params",
    ),
    "chooses how transformers computes the same": (
        "use_cache",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "attn_implementation",
        "_flash_attn_2_enabled",
        "use_flash_attention",
        "experts_implementation",
        "_experts_implementation",
        "chunk_size_feed_forward",
        "torchscript",
        "use_bfloat16",
        "gradient_checkpointing",
    ),
    "chooses what transformers returns": (
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "output_scores",
        "return_dict_in_generate",
    ),
    "belongs to other heads than the language model's": (
        "id2label",
        "label2id",
        "num_labels",
        "problem_type",
        "tf_legacy_loss",
    ),
    "of transformers' training; a training here has no dropout": ("attention_dropout",),
    "belongs to the tokenizer": (
        "tokenizer_class",
        "prefix",
        "sep_token_id",
        "cls_token_id",
        "unk_token_id",
        "decoder_start_token_id",
        "model_max_length",
        "tokenizer_model_max_length",
        "tokenizer_padding_side",
    ),
    "a generation setting, which config.json no longer decides": (
        "max_length",
        "min_length",
        "max_new_tokens",
        "do_sample",
        "early_stopping",
        "num_beams",
        "num_beam_groups",
        "diversity_penalty",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
        "repetition_penalty",
        "length_penalty",
        "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size",
        "bad_words_ids",
        "num_return_sequences",
        "exponential_decay_length_penalty",
        "suppress_tokens",
        "begin_suppress_tokens",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "remove_invalid_values",
    ),
}
HF_HARMLESS: dict[str, str] = {key: why for why, keys in _REASONS.items() for key in keys}

# What a dense model may say of experts that it has not.
HF_DENSE_NEUTRAL: dict[str, tuple[Any, ...]] = {"num_local_experts": _NONE_OR_0}
HF_DENSE_HARMLESS = ("num_experts_per_tok", "router_aux_loss_coef")
