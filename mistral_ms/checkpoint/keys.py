"""The key tables: what every format calls each tensor, and how it lays it out.

Our names and shapes are those of the weights' specifications. A foreign format is a table from our
names to its own (``Stored``), with placeholders: ``{layer}`` is a decoder block, ``{expert}`` an
expert. Anything that is more than a name (experts in one tensor, another order of rows) is a
property of the table's entry, so that one piece of code reads and writes them all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from mistral_ms.config.hugging_face_families import FAMILIES
from mistral_ms.weights import ADAPTABLE, MAGNITUDE, A, B

Layout = Literal["plain", "interleaved", "transposed"]


@dataclass(frozen=True)
class Stored:
    """How a format stores one of our tensors.

    Attributes:
        name: its name there. A stacked tensor without ``{expert}`` is stacked there too.
        layout: ``plain`` as ours; ``interleaved``: the two halves of each head's rotary
            dimensions alternate row by row; ``transposed``: the matrix lies on its side.
        part: (i, n): per expert, the i-th of n equal blocks of rows that share a tensor.
        flat: the expert axis is merged into the rows: [E*rows, columns].
    """

    name: str
    layout: Layout = "plain"
    part: tuple[int, int] = (0, 1)
    flat: bool = False


KeyTable = Mapping[str, Stored]


class _Ours(dict[str, Stored]):
    """Every name stands for itself."""

    def __missing__(self, name: str) -> Stored:
        return Stored(name)


OURS: KeyTable = _Ours()

_HF_COMMON: KeyTable = {
    "embed_tokens.weight": Stored("model.embed_tokens.weight"),
    "layers.{layer}.input_layernorm.weight": Stored("model.layers.{layer}.input_layernorm.weight"),
    "layers.{layer}.attention.q_proj.weight": Stored(
        "model.layers.{layer}.self_attn.q_proj.weight"
    ),
    "layers.{layer}.attention.k_proj.weight": Stored(
        "model.layers.{layer}.self_attn.k_proj.weight"
    ),
    "layers.{layer}.attention.v_proj.weight": Stored(
        "model.layers.{layer}.self_attn.v_proj.weight"
    ),
    "layers.{layer}.attention.o_proj.weight": Stored(
        "model.layers.{layer}.self_attn.o_proj.weight"
    ),
    "layers.{layer}.post_attention_layernorm.weight": Stored(
        "model.layers.{layer}.post_attention_layernorm.weight"
    ),
    "layers.{layer}.feed_forward.w1.weight": Stored("model.layers.{layer}.mlp.gate_proj.weight"),
    "layers.{layer}.feed_forward.w2.weight": Stored("model.layers.{layer}.mlp.down_proj.weight"),
    "layers.{layer}.feed_forward.w3.weight": Stored("model.layers.{layer}.mlp.up_proj.weight"),
    "norm.weight": Stored("model.norm.weight"),
    "lm_head.weight": Stored("lm_head.weight"),
}

# transformers 4.x, and what 5.x writes for others to read.
_HF_EXPERT = "model.layers.{layer}.block_sparse_moe.experts.{expert}"
HF: KeyTable = {
    **_HF_COMMON,
    "layers.{layer}.moe.router.weight": Stored("model.layers.{layer}.block_sparse_moe.gate.weight"),
    "layers.{layer}.moe.experts.w1": Stored(f"{_HF_EXPERT}.w1.weight"),
    "layers.{layer}.moe.experts.w2": Stored(f"{_HF_EXPERT}.w2.weight"),
    "layers.{layer}.moe.experts.w3": Stored(f"{_HF_EXPERT}.w3.weight"),
}

# Qwen3-MoE, OLMoE and Dots1, transformers 4.x. What a model has not is not asked for.
_HF_MLP = "model.layers.{layer}.mlp"
HF_MLP: KeyTable = {
    **_HF_COMMON,
    "layers.{layer}.attention.q_norm.weight": Stored(
        "model.layers.{layer}.self_attn.q_norm.weight"
    ),
    "layers.{layer}.attention.k_norm.weight": Stored(
        "model.layers.{layer}.self_attn.k_norm.weight"
    ),
    "layers.{layer}.moe.router.weight": Stored(f"{_HF_MLP}.gate.weight"),
    "layers.{layer}.moe.router.e_score_correction_bias": Stored(
        f"{_HF_MLP}.gate.e_score_correction_bias"
    ),
    "layers.{layer}.moe.experts.w1": Stored(f"{_HF_MLP}.experts.{{expert}}.gate_proj.weight"),
    "layers.{layer}.moe.experts.w2": Stored(f"{_HF_MLP}.experts.{{expert}}.down_proj.weight"),
    "layers.{layer}.moe.experts.w3": Stored(f"{_HF_MLP}.experts.{{expert}}.up_proj.weight"),
    "layers.{layer}.moe.shared_experts.w1.weight": Stored(
        f"{_HF_MLP}.shared_experts.gate_proj.weight"
    ),
    "layers.{layer}.moe.shared_experts.w2.weight": Stored(
        f"{_HF_MLP}.shared_experts.down_proj.weight"
    ),
    "layers.{layer}.moe.shared_experts.w3.weight": Stored(
        f"{_HF_MLP}.shared_experts.up_proj.weight"
    ),
}


# Qwen2-MoE, likewise.
_HF_SHARED = f"{_HF_MLP}.shared_expert"
HF_QWEN2_MOE: KeyTable = {
    **HF_MLP,
    "layers.{layer}.attention.q_proj.bias": Stored("model.layers.{layer}.self_attn.q_proj.bias"),
    "layers.{layer}.attention.k_proj.bias": Stored("model.layers.{layer}.self_attn.k_proj.bias"),
    "layers.{layer}.attention.v_proj.bias": Stored("model.layers.{layer}.self_attn.v_proj.bias"),
    "layers.{layer}.moe.shared_experts.w1.weight": Stored(f"{_HF_SHARED}.gate_proj.weight"),
    "layers.{layer}.moe.shared_experts.w2.weight": Stored(f"{_HF_SHARED}.down_proj.weight"),
    "layers.{layer}.moe.shared_experts.w3.weight": Stored(f"{_HF_SHARED}.up_proj.weight"),
    "layers.{layer}.moe.shared_expert_gate.weight": Stored(f"{_HF_MLP}.shared_expert_gate.weight"),
}


def hf_table(model_type: object) -> KeyTable:
    """The names in the files of a Hugging Face model_type, as transformers 4.x writes them."""
    if model_type == "qwen2_moe":
        return HF_QWEN2_MOE
    return HF_MLP if model_type in FAMILIES else HF


# The names inside the classes of transformers 5.x: gate and up projection in one tensor.
_HF_FUSED_EXPERTS = "model.layers.{layer}.mlp.experts"
HF_FUSED: KeyTable = {
    **_HF_COMMON,
    "layers.{layer}.moe.router.weight": Stored("model.layers.{layer}.mlp.gate.weight"),
    "layers.{layer}.moe.experts.w1": Stored(f"{_HF_FUSED_EXPERTS}.gate_up_proj", part=(0, 2)),
    "layers.{layer}.moe.experts.w2": Stored(f"{_HF_FUSED_EXPERTS}.down_proj"),
    "layers.{layer}.moe.experts.w3": Stored(f"{_HF_FUSED_EXPERTS}.gate_up_proj", part=(1, 2)),
}

# adapters, as PEFT 0.21 writes them beside the classes of transformers 4.x: one for each expert
PEFT: KeyTable = {
    f"layers.{{layer}}.{each.product}.{ours}": Stored(
        f"base_model.model.model.layers.{{layer}}.{each.module}.{theirs}"
    )
    for each in ADAPTABLE.values()
    for ours, theirs in (
        (A, "lora_A.weight"),
        (B, "lora_B.weight"),
        (MAGNITUDE, "lora_magnitude_vector"),
    )
}

_MISTRAL_COMMON: KeyTable = {
    "embed_tokens.weight": Stored("tok_embeddings.weight"),
    "layers.{layer}.input_layernorm.weight": Stored("layers.{layer}.attention_norm.weight"),
    "layers.{layer}.attention.q_proj.weight": Stored(
        "layers.{layer}.attention.wq.weight", "interleaved"
    ),
    "layers.{layer}.attention.k_proj.weight": Stored(
        "layers.{layer}.attention.wk.weight", "interleaved"
    ),
    "layers.{layer}.attention.v_proj.weight": Stored("layers.{layer}.attention.wv.weight"),
    "layers.{layer}.attention.o_proj.weight": Stored("layers.{layer}.attention.wo.weight"),
    "layers.{layer}.post_attention_layernorm.weight": Stored("layers.{layer}.ffn_norm.weight"),
    "layers.{layer}.feed_forward.w1.weight": Stored("layers.{layer}.feed_forward.w1.weight"),
    "layers.{layer}.feed_forward.w2.weight": Stored("layers.{layer}.feed_forward.w2.weight"),
    "layers.{layer}.feed_forward.w3.weight": Stored("layers.{layer}.feed_forward.w3.weight"),
    "norm.weight": Stored("norm.weight"),
    "lm_head.weight": Stored("output.weight"),
}

# consolidated.safetensors and consolidated.00.pth; names of mistral-inference.
_MISTRAL_EXPERT = "layers.{layer}.feed_forward.experts.{expert}"
MISTRAL: KeyTable = {
    **_MISTRAL_COMMON,
    "layers.{layer}.moe.router.weight": Stored("layers.{layer}.feed_forward.gate.weight"),
    "layers.{layer}.moe.experts.w1": Stored(f"{_MISTRAL_EXPERT}.w1.weight"),
    "layers.{layer}.moe.experts.w2": Stored(f"{_MISTRAL_EXPERT}.w2.weight"),
    "layers.{layer}.moe.experts.w3": Stored(f"{_MISTRAL_EXPERT}.w3.weight"),
}

# consolidated.00.pt to consolidated.07.pt, as first published on the hub: each file holds some
# layers whole, experts are stacked along the rows, and w2 is stored transposed per expert.
# Source of the layout: transformers' convert_mixtral_weights_to_hf.py.
_DUMP_MOE = "layers.{layer}.block_sparse_moe"
MISTRAL_DUMP: KeyTable = {
    **_MISTRAL_COMMON,
    "layers.{layer}.moe.router.weight": Stored(f"{_DUMP_MOE}.gate.weight"),
    "layers.{layer}.moe.experts.w1": Stored(f"{_DUMP_MOE}.w1", flat=True),
    "layers.{layer}.moe.experts.w2": Stored(f"{_DUMP_MOE}.w2", "transposed", flat=True),
    "layers.{layer}.moe.experts.w3": Stored(f"{_DUMP_MOE}.w3", flat=True),
}

# MindFormers 1.x: LlamaForCausalLM, with MoEV2 for Mixtral. Rotary rows are as in HF, w1 is the
# gate projection. Source of the names: the parameters of its classes in models/llama and
# modules/transformer/moe.py, the same in 1.7, 1.9 and 2.1.
_MINDFORMERS_COMMON: KeyTable = {
    "embed_tokens.weight": Stored("model.tok_embeddings.embedding_weight"),
    "layers.{layer}.input_layernorm.weight": Stored("model.layers.{layer}.attention_norm.weight"),
    "layers.{layer}.attention.q_proj.weight": Stored("model.layers.{layer}.attention.wq.weight"),
    "layers.{layer}.attention.k_proj.weight": Stored("model.layers.{layer}.attention.wk.weight"),
    "layers.{layer}.attention.v_proj.weight": Stored("model.layers.{layer}.attention.wv.weight"),
    "layers.{layer}.attention.o_proj.weight": Stored("model.layers.{layer}.attention.wo.weight"),
    "layers.{layer}.post_attention_layernorm.weight": Stored(
        "model.layers.{layer}.ffn_norm.weight"
    ),
    "layers.{layer}.feed_forward.w1.weight": Stored("model.layers.{layer}.feed_forward.w1.weight"),
    "layers.{layer}.feed_forward.w2.weight": Stored("model.layers.{layer}.feed_forward.w2.weight"),
    "layers.{layer}.feed_forward.w3.weight": Stored("model.layers.{layer}.feed_forward.w3.weight"),
    "layers.{layer}.moe.router.weight": Stored(
        "model.layers.{layer}.feed_forward.router.dense.weight"
    ),
    "norm.weight": Stored("model.norm_out.weight"),
    "lm_head.weight": Stored("lm_head.weight"),
}

# Training and inference without a cache (MoEV2): the experts as ours.
_MINDFORMERS_EXPERTS = "model.layers.{layer}.feed_forward.ffn"
MINDFORMERS: KeyTable = {
    **_MINDFORMERS_COMMON,
    "layers.{layer}.moe.experts.w1": Stored(f"{_MINDFORMERS_EXPERTS}.w1.weight"),
    "layers.{layer}.moe.experts.w2": Stored(f"{_MINDFORMERS_EXPERTS}.w2.weight"),
    "layers.{layer}.moe.experts.w3": Stored(f"{_MINDFORMERS_EXPERTS}.w3.weight"),
}

# Inference with a cache (MoEInfer, grouped matrix products): each expert's matrix transposed.
MINDFORMERS_GMM: KeyTable = {
    **_MINDFORMERS_COMMON,
    "layers.{layer}.moe.experts.w1": Stored(f"{_MINDFORMERS_EXPERTS}.w1.weight", "transposed"),
    "layers.{layer}.moe.experts.w2": Stored(f"{_MINDFORMERS_EXPERTS}.w2.weight", "transposed"),
    "layers.{layer}.moe.experts.w3": Stored(f"{_MINDFORMERS_EXPERTS}.w3.weight", "transposed"),
}

# Our models under MindFormers' trainer with several processes: the forms of the auto-parallel
# graph, in which the axis that tensor parallelism divides comes last.
_GRAPH_EXPERTS = "layers.{layer}.moe.experts"
MINDFORMERS_GRAPH: KeyTable = _Ours(
    {
        f"{_GRAPH_EXPERTS}.w1": Stored(f"{_GRAPH_EXPERTS}.w1", "transposed", flat=True),
        f"{_GRAPH_EXPERTS}.w2": Stored(f"{_GRAPH_EXPERTS}.w2", flat=True),
        f"{_GRAPH_EXPERTS}.w3": Stored(f"{_GRAPH_EXPERTS}.w3", "transposed", flat=True),
    }
)


def table_of(kind: str, names: Iterable[str], model_type: object) -> KeyTable:
    """The names in the files of a format other than MindFormers'.

    Args:
        kind: the format.
        names: of the tensors in the files.
        model_type: of Hugging Face's configuration.
    """
    if kind == "hf":
        fused = any(name.endswith(".mlp.experts.gate_up_proj") for name in names)
        return HF_FUSED if fused else hf_table(model_type)
    return {"mistral": MISTRAL, "mistral-dump": MISTRAL_DUMP, "mistral_ms": OURS}[kind]
