"""The sparse layers of a model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from mistral_ms.config.base import Frozen, nested
from mistral_ms.config.gates import GateSettings, SoftmaxTopKSettings, gate_settings
from mistral_ms.config.placement import Placement

# What no model comes near: a damaged file must not make us build fifty million layers. The largest
# published ones have 2048 experts and a vocabulary of 262144.
MOST_EXPERTS = 4096
MOST_ROWS = 1 << 24  # of a matrix

SHAPE_KEYS = (
    "moe_intermediate_size",
    "n_shared_experts",
    "shared_expert_intermediate_size",
    "shared_expert_gate",
    "cmr_gate_drop",
    "cmr_gate_loss_p",
    "moe_token_dropout",
    "extra_feed_forward",
    "layer_experts",
)
"""Keys of :class:`MoEArchitecture` that Mixtral's configuration has not."""


class MoEArchitecture(Frozen):
    """The sparse layers of a model.

    Attributes:
        num_local_experts: experts per sparse layer (E); or a list, with a number for each of them
            (the pyramid of DeepSpeed-MoE, arXiv:2201.05596, section 4.1). Then this becomes the
            largest, and the list ``layer_experts``.
        layer_experts: experts of each sparse layer, in their order; None: they have as many.
        num_experts_per_tok: experts that each token visits (K).
        sparse_layers: which layers are sparse: all, every other one (layers 1, 3, ... as in
            GShard and Switch), an explicit list of layer indices, or a rule by the keys of
            DeepSeek and Qwen, see :class:`~mistral_ms.config.placement.Placement`.
        moe_intermediate_size: width of each expert, where it is not that of a dense feed-forward
            (fine-grained experts: DeepSeekMoE, arXiv:2401.06066, section 3.1).
        n_shared_experts: experts that every token visits beside the chosen ones (section 3.2
            there). They are one feed-forward, as wide as all of them together.
        shared_expert_intermediate_size: its width; n_shared_experts times that of an expert when
            not given.
        shared_expert_gate: how its result joins that of the chosen experts. ``none``: added
            (DeepSeek). ``sigmoid``: times the sigmoid of a learned product with the token, added
            (Qwen2-MoE). ``softmax_pair``: both are weighted by a softmax over two learned logits
            (the residual mixture of DeepSpeed-MoE, arXiv:2201.05596, section 4.1). ``cmr``: the
            chosen experts have the share g, the shared ones 1 - g, with g the sigmoid of a learned
            product plus a bias (conditional routing, NLLB-MoE, arXiv:2207.04672).
        cmr_gate_drop: in training g is zero with this probability, and divided by 1 minus it
            otherwise, for each token (fairseq's key and dropout).
        cmr_gate_loss_p: the mean share of the chosen experts that the router loss ``cmr`` wants
            (fairseq's key).
        moe_token_dropout: in training each result of a chosen expert is left out with this
            probability, for each token and expert, the rest as it is; otherwise it is multiplied
            by 1 minus it (expert output masking, NLLB-MoE; HF's key).
        extra_feed_forward: dense feed-forwards, as wide as those of layers without experts, beside
            those in the same block, each with a norm and a residual of its own: ``after`` the
            experts (OpenMoE, arXiv:2402.01739), ``before`` them, or ``both`` (ST-MoE,
            arXiv:2202.08906, tried one on either side).
        norm_topk_prob: divide the K chosen probabilities by their sum (Mixtral does).
        gate: which gate routes the tokens, by its name or with its settings; see
            ``mistral_ms.moe.gates``.
        router_aux_loss_coef: the coefficient the model was published with (HF's key).
    """

    num_local_experts: int = Field(ge=1, le=MOST_EXPERTS)
    layer_experts: tuple[Annotated[int, Field(ge=1, le=MOST_EXPERTS)], ...] | None = None
    num_experts_per_tok: int = Field(default=2, ge=1)
    sparse_layers: Literal["all", "every_other"] | Placement | tuple[int, ...] = "all"
    moe_intermediate_size: int | None = Field(default=None, ge=1, le=MOST_ROWS)
    n_shared_experts: int = Field(default=0, ge=0, le=MOST_EXPERTS)
    shared_expert_intermediate_size: int | None = Field(default=None, ge=1, le=MOST_ROWS)
    shared_expert_gate: Literal["none", "sigmoid", "softmax_pair", "cmr"] = "none"
    cmr_gate_drop: float = Field(default=0.0, ge=0, lt=1)
    cmr_gate_loss_p: float = Field(default=1.0, ge=0, le=1)
    moe_token_dropout: float = Field(default=0.0, ge=0, lt=1)
    extra_feed_forward: Literal["none", "before", "after", "both"] = "none"
    norm_topk_prob: bool = True
    gate: SerializeAsAny[GateSettings] = SoftmaxTopKSettings()
    router_aux_loss_coef: float = Field(default=0.001, ge=0, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _pyramid(cls, values: Any) -> Any:
        counts = values.get("num_local_experts") if isinstance(values, Mapping) else None
        if not isinstance(counts, list | tuple):
            return values
        if not counts or not all(isinstance(n, int) and not isinstance(n, bool) for n in counts):
            raise ValueError(
                f"num_local_experts {list(counts)} must be a number, or one for each sparse layer"
            )
        given = {"num_local_experts": max(counts)}
        if len(set(counts)) > 1:
            given["layer_experts"] = tuple(counts)
        return {**values, **given}

    @field_validator("gate", mode="before")
    @classmethod
    def _known_gate(cls, value: Any) -> GateSettings:
        return gate_settings(value)

    @field_validator("sparse_layers", mode="before")
    @classmethod
    def _placement(cls, value: Any) -> Any:
        return nested(Placement, value) if isinstance(value, Mapping) else value

    @model_validator(mode="after")
    def _top_k_fits(self) -> MoEArchitecture:
        if self.num_experts_per_tok > self.num_local_experts:
            raise ValueError(
                f"num_experts_per_tok ({self.num_experts_per_tok}) must not exceed "
                f"num_local_experts ({self.num_local_experts})"
            )
        counts = self.layer_experts
        if counts is not None and (
            max(counts, default=0) != self.num_local_experts
            or min(counts) < self.num_experts_per_tok
            or len(set(counts)) == 1
        ):
            raise ValueError(
                f"layer_experts {list(counts)} must differ, the largest of them must be "
                f"num_local_experts ({self.num_local_experts}), and none may be less than "
                f"num_experts_per_tok ({self.num_experts_per_tok})"
            )
        return self

    @model_validator(mode="after")
    def _shared_expert_is_there(self) -> MoEArchitecture:
        for key, plain in (("cmr_gate_drop", 0.0), ("cmr_gate_loss_p", 1.0)):
            if getattr(self, key) != plain and self.shared_expert_gate != "cmr":
                raise ValueError(
                    f"{key} ({getattr(self, key):g}) needs shared_expert_gate cmr, not "
                    f"{self.shared_expert_gate}"
                )
        if self.n_shared_experts:
            return self
        for key in ("shared_expert_intermediate_size", "shared_expert_gate"):
            if getattr(self, key) not in (None, "none"):
                raise ValueError(
                    f"{key} ({getattr(self, key)}) needs n_shared_experts of 1 or more"
                )
        return self

    @property
    def added(self) -> tuple[tuple[str, Any], ...]:
        """What it has that Mixtral's sparse layers have not: keys and values."""
        plain = MoEArchitecture.model_fields
        return tuple(
            (key, getattr(self, key))
            for key in SHAPE_KEYS
            if getattr(self, key) != plain[key].default
        )
