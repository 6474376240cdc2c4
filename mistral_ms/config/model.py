"""The architecture of a model: everything that decides its tensors and its mathematics.

How tokens are routed at run time (dropless or with a capacity) is not architecture: the same
weights serve both. That lives in :mod:`mistral_ms.config.routing`.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mistral_ms.config.base import Frozen
from mistral_ms.config.lora import LoraConfig
from mistral_ms.config.moe import MOST_ROWS, MoEArchitecture
from mistral_ms.config.placement import Placement
from mistral_ms.config.rope_scaling import RopeScaling

DType = Literal["float32", "float16", "bfloat16"]
LayerType = Literal["full_attention", "sliding_attention"]

# What no model comes near, see mistral_ms.config.moe. The largest published ones have 126 layers.
MOST_LAYERS = 1024
MOST_EXPERTS_IN_ALL = 1 << 16
MOST_HEADS = 1 << 14
LONGEST_SEQUENCE = (1 << 31) - 1  # positions are int32


class LayerKinds(Frozen):
    """Which kind of layer stands at each place of a decoder block.

    Kinds beside the default ones are made known by
    :func:`mistral_ms.weights.register_layer`; Hugging Face's and Mistral's formats have none.

    Attributes:
        attention: of every block.
        dense: in the place of the feed-forward where a block has no experts.
        sparse: in its place where a block has experts.
    """

    attention: str = "attention"
    dense: str = "feed_forward"
    sparse: str = "moe"

    @property
    def default(self) -> bool:
        """Whether all are those of Mistral and Mixtral."""
        return self == LayerKinds()

    def __str__(self) -> str:
        return ", ".join((self.attention, self.dense, self.sparse))


class ModelConfig(Frozen):
    """One Mistral or Mixtral model. Names are those of Hugging Face's config.json.

    Attributes:
        vocab_size: V.
        hidden_size: H.
        intermediate_size: I, of the dense feed-forward, and of each expert unless ``moe`` says
            another width.
        num_hidden_layers: decoder blocks.
        num_attention_heads: N query heads.
        num_key_value_heads: G key/value heads; divides N (GQA; 1 is multi-query).
        head_dim: D; hidden_size / num_attention_heads when not given.
        max_position_embeddings: the longest sequence of the model; with some kinds of
            ``rope_scaling`` the longest before scaling, see :attr:`longest_sequence`.
        rms_norm_eps: epsilon inside the square root of RMSNorm.
        rope_theta: base of the rotary frequencies.
        rope_scaling: how they are changed for longer contexts; None = not at all.
        sliding_window: a query sees the last so many positions, itself included; None = all.
        layer_types: which layers have the sliding window, where some have it and some have not;
            None: all have it (if there is one).
        tie_word_embeddings: the output head shares the embedding's weight.
        qk_norm: RMSNorm of queries and keys before they are rotated. ``head``: of each head, all
            heads with one weight (Qwen3, Dots1); ``full``: over all heads together (OLMoE).
        qkv_bias: queries, keys and values have biases (Qwen2-MoE; HF's key).
        initializer_range: standard deviation of freshly drawn weights.
        initializer_scale: where it is given, matrices but the embedding are drawn from a normal
            distribution that is cut off at two deviations of sqrt(initializer_scale / inputs): 1.0
            is usual, 0.1 the Switch Transformer's (arXiv:2101.03961, section 2.4).
        torch_dtype: dtype the published weights are stored in (HF's key).
        moe: the sparse layers; None for a dense model.
        layer_kinds: which kinds of layers the blocks hold.
        lora: adapters, which are trained while everything else is frozen; None: there are none.
    """

    vocab_size: int = Field(ge=1, le=MOST_ROWS)
    hidden_size: int = Field(ge=1, le=MOST_ROWS)
    intermediate_size: int = Field(ge=1, le=MOST_ROWS)
    num_hidden_layers: int = Field(ge=1, le=MOST_LAYERS)
    num_attention_heads: int = Field(ge=1, le=MOST_HEADS)
    num_key_value_heads: int = Field(ge=1, le=MOST_HEADS)
    head_dim: int | None = Field(default=None, ge=2, le=MOST_ROWS)
    max_position_embeddings: int = Field(default=32768, ge=1, le=LONGEST_SEQUENCE)
    rms_norm_eps: float = Field(default=1e-5, gt=0, allow_inf_nan=False)
    rope_theta: float = Field(default=1e6, gt=0, allow_inf_nan=False)
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = Field(default=None, ge=1, le=LONGEST_SEQUENCE)
    layer_types: tuple[LayerType, ...] | None = None
    tie_word_embeddings: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    qkv_bias: bool = False
    initializer_range: float = Field(default=0.02, ge=0, allow_inf_nan=False)
    initializer_scale: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    torch_dtype: DType = "bfloat16"
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = None
    moe: MoEArchitecture | None = None
    layer_kinds: LayerKinds = LayerKinds()
    lora: LoraConfig | None = None

    @model_validator(mode="after")
    def _consistent(self) -> ModelConfig:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if heads % kv_heads:
            raise ValueError(
                f"num_key_value_heads ({kv_heads}) must divide num_attention_heads ({heads})"
            )
        if self.head_dim is None and self.hidden_size % heads:
            raise ValueError(
                f"num_attention_heads ({heads}) must divide hidden_size ({self.hidden_size}) "
                "unless head_dim is given"
            )
        if self.head_size % 2:
            raise ValueError(f"head_dim ({self.head_size}) must be even: RoPE rotates pairs")
        if self.moe is not None and isinstance(self.moe.sparse_layers, tuple):
            layers = self.moe.sparse_layers
            outside = [i for i in layers if not 0 <= i < self.num_hidden_layers]
            if outside or not layers or len(set(layers)) != len(layers):
                raise ValueError(
                    f"sparse_layers {list(layers)} must be distinct layer indices between 0 and "
                    f"{self.num_hidden_layers - 1}, at least one"
                )
        if self.moe is not None:
            experts = self.moe.num_local_experts * self.num_hidden_layers
            if experts > MOST_EXPERTS_IN_ALL:
                raise ValueError(
                    f"num_local_experts ({self.moe.num_local_experts}) times num_hidden_layers "
                    f"({self.num_hidden_layers}) must not exceed {MOST_EXPERTS_IN_ALL}"
                )
        if self.shared_expert_size > MOST_ROWS:
            raise ValueError(
                f"the shared experts' width ({self.shared_expert_size}) must not exceed {MOST_ROWS}"
            )
        counts = None if self.moe is None else self.moe.layer_experts
        if counts is not None and len(counts) != len(self.sparse_layers):
            raise ValueError(
                f"num_local_experts {list(counts)} must have a number for each of the "
                f"{len(self.sparse_layers)} sparse layers {list(self.sparse_layers)}"
            )
        if self.moe is not None and not self.sparse_layers:
            raise ValueError(
                f"sparse_layers {self.moe.sparse_layers} leaves none of the "
                f"{self.num_hidden_layers} layers sparse: leave moe out for a dense model"
            )
        return self

    @model_validator(mode="after")
    def _attention_of_layers(self) -> ModelConfig:
        types = self.layer_types
        if types is None:
            return self
        if len(types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(types)} entries, num_hidden_layers is "
                f"{self.num_hidden_layers}"
            )
        if len(set(types)) < 2:
            raise ValueError(
                f"layer_types says {types[0]} for every layer: leave it out, and let "
                "sliding_window alone say whether there is a window"
            )
        if self.sliding_window is None:
            raise ValueError("layer_types has sliding_attention: sliding_window must be given")
        return self

    @model_validator(mode="after")
    def _rotary_scaling(self) -> ModelConfig:
        scaling = self.rope_scaling
        if scaling is not None and scaling.rope_type == "yarn" and self.rope_theta <= 1:
            raise ValueError(f"yarn rope_scaling needs rope_theta above 1: {self.rope_theta:g}")
        if scaling is None or scaling.rope_type != "dynamic":
            return self
        original = scaling.original_max_position_embeddings
        if original not in (None, self.max_position_embeddings):
            raise ValueError(
                f"rope_scaling.original_max_position_embeddings ({original}) must equal "
                f"max_position_embeddings ({self.max_position_embeddings}) under dynamic scaling, "
                "which begins there"
            )
        if self.head_size < 4:
            raise ValueError(f"dynamic rope_scaling needs head_dim of 4 or more: {self.head_size}")
        return self

    @property
    def head_size(self) -> int:
        """D: head_dim, or hidden_size / num_attention_heads."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def expert_size(self) -> int:
        """I of each expert of a sparse layer."""
        given = None if self.moe is None else self.moe.moe_intermediate_size
        return given or self.intermediate_size

    def of_layer(self, layer: int) -> ModelConfig:
        """The same with as many experts as this sparse layer has; itself where all have as many."""
        if self.moe is None or self.moe.layer_experts is None or not self.is_sparse(layer):
            return self
        count = self.moe.layer_experts[self.sparse_layers.index(layer)]
        own = {"num_local_experts": count, "layer_experts": None}
        return self.model_copy(update={"moe": self.moe.model_copy(update=own)})

    @property
    def expert_counts(self) -> tuple[int, ...]:
        """The number of experts of each sparse layer."""
        if self.moe is None:
            return ()
        each = (self.moe.num_local_experts,) * len(self.sparse_layers)
        return self.moe.layer_experts or each

    @property
    def shared_expert_size(self) -> int:
        """I of the feed-forward that all tokens of a sparse layer visit; 0 where there is none."""
        if self.moe is None:
            return 0
        each = self.moe.n_shared_experts * self.expert_size
        return self.moe.shared_expert_intermediate_size or each

    @property
    def extra_feed_forwards(self) -> tuple[str, ...]:
        """The sides of a sparse layer that a dense feed-forward stands on, in their order."""
        given = "none" if self.moe is None else self.moe.extra_feed_forward
        return tuple(side for side in ("before", "after") if given in (side, "both"))

    @property
    def longest_sequence(self) -> int:
        """The longest sequence the model may see, scaling of its positions included.

        The factor applies to the original length where one is stated; files that state none
        (``linear``, ``dynamic``, early ``yarn``) have it in max_position_embeddings.
        """
        stated, scaling = self.max_position_embeddings, self.rope_scaling
        if scaling is None:
            return stated
        original = scaling.original_max_position_embeddings or stated
        return max(stated, int(scaling.factor * original))

    @property
    def length_rule(self) -> str:
        """Why a sequence may not be longer, for messages."""
        rule = f"max_position_embeddings is {self.max_position_embeddings}"
        if self.longest_sequence == self.max_position_embeddings:
            return rule
        return f"{rule}, with rope_scaling the model has {self.longest_sequence} positions"

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The different sliding windows of the layers: one, or none and one."""
        return (self.sliding_window,) if self.layer_types is None else (None, self.sliding_window)

    def window_of(self, layer: int) -> int | None:
        """The sliding window of decoder block ``layer``; None = it sees all positions."""
        types = self.layer_types
        full = types is not None and types[layer] == "full_attention"
        return None if full else self.sliding_window

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """Indices of the layers that hold experts, ascending."""
        if self.moe is None:
            return ()
        pattern = self.moe.sparse_layers
        if pattern == "all":
            return tuple(range(self.num_hidden_layers))
        if pattern == "every_other":
            return tuple(range(1, self.num_hidden_layers, 2))
        if isinstance(pattern, Placement):
            return tuple(filter(pattern.is_sparse, range(self.num_hidden_layers)))
        return tuple(sorted(int(i) for i in pattern))

    def is_sparse(self, layer: int) -> bool:
        """Whether decoder block ``layer`` holds experts instead of one feed-forward."""
        return layer in self.sparse_layers

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """All tokens that end a text."""
        if self.eos_token_id is None:
            return ()
        ids = self.eos_token_id
        return ids if isinstance(ids, tuple) else (ids,)
