"""How tokens are routed at run time; the same weights serve every policy."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from mistral_ms.config.base import Frozen
from mistral_ms.config.model import DType


class RoutingConfig(Frozen):
    """The routing policy of all sparse layers.

    Attributes:
        policy: ``dropless`` computes every chosen expert for every token (inference, alignment);
            ``capacity`` gives each expert ceil(capacity_factor * K * T / E) slots, at most T
            (training; GShard, arXiv:2006.16668, section 2.2); ``experts_choose`` lets each expert
            take as many tokens, those that score highest with it (training; Zhou 2022,
            arXiv:2202.09368, section 3.2). That looks at later tokens, too: a decoder cannot
            generate by it.
        capacity_factor: slots of an expert, in multiples of K * T / E. Where experts choose, a
            token has capacity_factor * K experts on average.
        drop_priority: who gets a slot when an expert is full. ``token_major``: earlier tokens
            first, with all their choices; ``choice_major``: all first choices before any second
            choice (GShard, algorithm 1). Where experts choose there is no such order.
        rescale_survivors: divide the weights of the experts that compute a token by their sum.
            Under ``dropless`` those are all that it chose. Off: a dropped choice contributes
            nothing and the residual carries the token.
        router_dtype: dtype of the gate's matrix product; the softmax is always float32.
        aux_loss: ``pooled`` averages over all layers' tokens before multiplying (HF);
            ``per_layer`` multiplies per layer and averages the products.
        kernels: which implementation of gating, slots, dispatch and combine runs. ``reference``:
            plain MindSpore. ``custom``: the operators of ``ascend_kernels``, which must be built.
            ``cann``: CANN's own where MindSpore has one that matches (Ascend only).
    """

    policy: Literal["dropless", "capacity", "experts_choose"] = "dropless"
    capacity_factor: float = Field(default=1.1, gt=0, allow_inf_nan=False)
    drop_priority: Literal["token_major", "choice_major"] = "token_major"
    rescale_survivors: bool = False
    router_dtype: DType = "float32"
    aux_loss: Literal["pooled", "per_layer"] = "pooled"
    kernels: Literal["reference", "custom", "cann"] = "reference"

    @model_validator(mode="after")
    def _consistent(self) -> RoutingConfig:
        if self.policy == "experts_choose" and self.drop_priority != "token_major":
            raise ValueError(
                f"drop_priority ({self.drop_priority}) is an order among choices of tokens: under "
                "policy experts_choose experts take tokens by their scores. Leave it out"
            )
        return self


DROPLESS = RoutingConfig()
