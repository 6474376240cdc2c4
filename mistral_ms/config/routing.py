"""How tokens are routed at run time; the same weights serve every policy."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import Field, model_validator

from mistral_ms.config.base import Frozen
from mistral_ms.config.model import DType

LocalGroup: TypeAlias = Literal["batch", "sequence"] | Annotated[int, Field(ge=1)]
"""The tokens of a local group: all of a dispatch group, those of a sequence, or so many."""


class RoutingConfig(Frozen):
    """The routing policy of all sparse layers.

    Attributes:
        policy: ``dropless`` computes every chosen expert for every token (inference, alignment);
            ``capacity`` gives each expert ceil(capacity_factor * K * T / E) slots, at most T
            (training; GShard, arXiv:2006.16668, section 2.2); ``experts_choose`` lets each expert
            take as many tokens, those that score highest with it (training; Zhou 2022,
            arXiv:2202.09368, section 3.2). That looks at later tokens, too: a decoder cannot
            generate by it. Under ``dropless`` the keys about slots say nothing.
        allow_future: train a decoder whose tokens have experts that later tokens decide about:
            where experts choose, and with gates that balance a whole dispatch group. Its losses
            are then not those of a causal model; evaluation and generation let each token choose.
        capacity_factor: slots of an expert, in multiples of K * T / E. Where experts choose, a
            token has capacity_factor * K experts on average.
        capacity_per: ``choice``: that multiple is of K * T / E; ``token``: of T / E, whatever K.
        capacity_rounding: how the product becomes a whole number: ``ceil``, ``floor``, or
            ``round``, to the nearest one and from a half to the even one.
        min_capacity: an expert has at least so many slots.
        capacity_multiple_of: rounds them up to a multiple. An expert never has more slots than
            there are tokens, multiple or not.
        eval_capacity_factor: ``evaluate`` gives a checkpoint of this training such a capacity,
            and drops in the training's order; None: it drops nothing. Generation never does.
        drop_priority: who gets a slot when an expert is full. ``token_major``: earlier tokens
            first, with all their choices; ``choice_major``: all first choices before any second
            choice (GShard, algorithm 1), earlier tokens first; ``score``: likewise, but the tokens
            with the largest scores first (batch prioritized routing, arXiv:2106.05974);
            ``random``: likewise, in an order that is drawn anew for each step and layer (random
            token selection, arXiv:2109.10465; outside of training: earlier tokens first);
            ``probs``: each expert serves the choices that score highest with it, first or not
            (DeepSpeed's and Megatron's name for it).
            All but ``token_major`` look at later tokens. Where experts choose there is no order.
        capacity_group: the tokens among which slots are shared out, each such local group having
            slots of its own (GShard, section 2.2): ``batch``: a whole dispatch group; ``sequence``:
            each of its rows, which then loses no slot to another one; or so many tokens.
        reroute_rounds: a token whose expert is full tries its next best one, and the next, so many
            times, weighted by the score with the expert that takes it ("no token left behind",
            Switch Transformer, arXiv:2101.03961, appendix B). For one expert a token; later tokens'
            first choices come before that, so it looks ahead.
        rescale_survivors: divide the weights of the experts that compute a token by their sum.
            Under ``dropless`` those are all that it chose. Off: a dropped choice contributes
            nothing and the residual carries the token.
        router_dtype: dtype of the gate's matrix product; the softmax is always float32.
        aux_loss: ``pooled`` averages over all layers' tokens before multiplying (HF);
            ``per_layer`` multiplies per layer and averages the products.
        aux_choices: which choices the load-balancing loss counts: ``all`` (HF), or the ``first``
            of each token (GShard, Switch), whose balanced value is 1 whatever K; or the
            ``top_scores``: the K largest scores, whatever a bias or groups of experts make of them
            (DeepSeek-V3, arXiv:2412.19437, equation 18).
        aux_normalize: divide by the number of choices that are counted for each token, so that a
            balanced router scores 1, not K.
        aux_scope: the tokens over which the load-balancing loss takes means before it multiplies
            them: ``batch``: all of a dispatch group; ``sequence``: those of each row (DeepSeek-V3,
            equations 17 to 20); or so many tokens (GShard's groups). Its value is the mean over
            these groups, weighted by their tokens.
        kernels: which implementation of gating, slots, dispatch and combine runs. ``reference``:
            plain MindSpore. ``custom``: the operators of ``ascend_kernels``, which must be built.
            ``cann``: CANN's own where MindSpore has one that matches (Ascend only).
    """

    policy: Literal["dropless", "capacity", "experts_choose"] = "dropless"
    allow_future: bool = False
    capacity_factor: float = Field(default=1.1, gt=0, allow_inf_nan=False)
    capacity_per: Literal["choice", "token"] = "choice"
    capacity_rounding: Literal["ceil", "floor", "round"] = "ceil"
    min_capacity: int = Field(default=1, ge=1)
    capacity_multiple_of: int = Field(default=1, ge=1)
    eval_capacity_factor: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    drop_priority: Literal["token_major", "choice_major", "score", "random", "probs"] = (
        "token_major"
    )
    capacity_group: LocalGroup = "batch"
    reroute_rounds: int = Field(default=0, ge=0)
    rescale_survivors: bool = False
    router_dtype: DType = "float32"
    aux_loss: Literal["pooled", "per_layer"] = "pooled"
    aux_choices: Literal["all", "first", "top_scores"] = "all"
    aux_normalize: bool = False
    aux_scope: LocalGroup = "batch"
    kernels: Literal["reference", "custom", "cann"] = "reference"

    @model_validator(mode="after")
    def _consistent(self) -> RoutingConfig:
        if self.policy == "experts_choose" and self.drop_priority != "token_major":
            raise ValueError(
                f"drop_priority ({self.drop_priority}) is an order among choices of tokens: under "
                "policy experts_choose experts take tokens by their scores. Leave it out"
            )
        if self.policy != "capacity" and self.eval_capacity_factor is not None:
            raise ValueError(
                f"eval_capacity_factor ({self.eval_capacity_factor:g}) needs policy capacity, not "
                f"{self.policy}: evaluation would drop choices as no training did. Leave it out"
            )
        if self.policy == "experts_choose" and self.aux_choices != "all":
            raise ValueError(
                f"aux_choices ({self.aux_choices}) is about choices of tokens: under policy "
                "experts_choose the load-balancing loss counts the tokens that experts take. "
                "Leave it out"
            )
        return self

    @model_validator(mode="after")
    def _local_groups(self) -> RoutingConfig:
        if self.capacity_group != "batch" and self.policy == "dropless":
            raise ValueError(
                f"capacity_group ({self.capacity_group}) shares out slots, which policy dropless "
                "has not: set policy=capacity, or leave it out"
            )
        if self.capacity_group != "batch" and self.kernels != "reference":
            raise ValueError(
                f"capacity_group ({self.capacity_group}) needs kernels reference, not "
                f"{self.kernels}: the operators count slots over a whole dispatch group"
            )
        if self.aux_scope != "batch" and self.aux_loss == "pooled":
            raise ValueError(
                f"aux_scope ({self.aux_scope}) multiplies means of each local group, aux_loss "
                "pooled those of all layers: set aux_loss=per_layer"
            )
        if self.aux_scope != "batch" and self.policy == "experts_choose":
            raise ValueError(
                f"aux_scope ({self.aux_scope}) is about choices of tokens: under policy "
                "experts_choose the load-balancing loss is that of the batch. Leave it out"
            )
        return self

    @model_validator(mode="after")
    def _rerouting(self) -> RoutingConfig:
        if not self.reroute_rounds:
            return self
        given = f"reroute_rounds ({self.reroute_rounds})"
        if self.policy != "capacity":
            raise ValueError(f"{given} needs policy capacity, not {self.policy}: no expert is full")
        if self.drop_priority in ("score", "random", "probs"):
            raise ValueError(
                f"{given} serves earlier tokens first, drop_priority ({self.drop_priority}) does "
                "not: set drop_priority=token_major"
            )
        if self.kernels != "reference":
            raise ValueError(f"{given} needs kernels reference, not {self.kernels}")
        return self

    def broken_groups(self, rows: int, columns: int) -> str | None:
        """The rule that is broken where a dispatch group is not made of whole local groups.

        Args:
            rows: sequences of a dispatch group.
            columns: tokens of each.
        """
        for key in ("capacity_group", "aux_scope"):
            size = getattr(self, key)
            if isinstance(size, int) and rows * columns % size:
                return (
                    f"routing.{key} ({size}) must divide the tokens of a dispatch group: {rows} "
                    f"sequences of {columns} tokens"
                )
        return None

    @property
    def by_sequence(self) -> bool:
        """Whether a layer must know how long the sequences are."""
        return "sequence" in (self.capacity_group, self.aux_scope)

    def relative_capacity(self, top_k: int) -> float | None:
        """Slots of an expert in multiples of an even share of all choices, before they are rounded;
        None where choices do not compete for them.

        Args:
            top_k: K.
        """
        if self.policy != "capacity":
            return None
        return self.capacity_factor / (top_k if self.capacity_per == "token" else 1)

    @property
    def evaluation(self) -> RoutingConfig:
        """How a model that was trained so is evaluated."""
        if self.eval_capacity_factor is None:
            return DROPLESS
        return self.model_copy(update={"capacity_factor": self.eval_capacity_factor})


DROPLESS = RoutingConfig()
