"""Experts that every token visits, and how their result joins that of the chosen ones."""

from __future__ import annotations

from typing import Literal

from mindspore import Tensor, nn, ops

from mistral_ms.config import ModelConfig
from mistral_ms.layers import FeedForward, GatedLinear, Linear
from mistral_ms.layers.parameter import weight
from mistral_ms.moe.losses import RouterSums
from mistral_ms.ops import reference
from mistral_ms.weights import shared_gate_specs, swiglu_specs

SharedGate = Literal["none", "sigmoid", "softmax_pair", "cmr"]

_sigmoid = ops.Sigmoid()
_softmax = ops.Softmax(-1)
_abs = ops.Abs()
_sum = ops.ReduceSum()


def joined(
    kind: SharedGate,
    x_TH: Tensor,
    routed_TH: Tensor,
    shared_TH: Tensor,
    weights: tuple[Tensor, ...],
) -> Tensor:
    """What a sparse layer with shared experts gives: [T, H].

    Args:
        kind: ``moe.shared_expert_gate``. ``none``: the sum (DeepSeekMoE, arXiv:2401.06066,
            equation 9). ``sigmoid``: routed + sigmoid(w x) * shared (Qwen2-MoE). ``softmax_pair``:
            c = softmax(W x + b), c_0 * routed + c_1 * shared (DeepSpeed-MoE). Not ``cmr``, which
            has :func:`cmr_share`.
        x_TH: the layer's input.
        routed_TH: of the chosen experts.
        shared_TH: of the shared ones.
        weights: those of :func:`~mistral_ms.weights.shared_gate_specs`.
    """
    if kind == "none":
        return routed_TH + shared_TH
    if kind == "sigmoid":
        return routed_TH + _sigmoid(_product(x_TH, weights[0])) * shared_TH
    shares_T2 = _softmax(_product(x_TH, weights[0]) + ops.cast(weights[1], x_TH.dtype))
    return shares_T2[:, :1] * routed_TH + shares_T2[:, 1:] * shared_TH


class SharedExpertGate(nn.Cell):
    """Joins both results by weights of its own, see :func:`joined`.

    Args:
        config: sizes and the kind.
        dtype: dtype of the weights.
    """

    def __init__(self, config: ModelConfig, dtype: str = "float32") -> None:
        super().__init__()
        assert config.moe is not None
        self.kind: SharedGate = config.moe.shared_expert_gate
        names = []
        for spec in shared_gate_specs(config):
            names.append(spec.name)
            setattr(self, spec.name, weight(*spec.shape, dtype=dtype))
        self.weight_names = tuple(names)

    def held(self) -> tuple[Tensor, ...]:
        """Its weights, in the order of their specifications."""
        found: tuple[Tensor, ...] = ()
        for name in self.weight_names:
            found = (*found, getattr(self, name))
        return found

    def construct(
        self,
        x_TH: Tensor,
        routed_TH: Tensor,
        shared_TH: Tensor,
        share_T1: Tensor | None = None,
    ) -> Tensor:
        """Three times [T, H] -> [T, H].

        Args:
            x_TH: the layer's input.
            routed_TH: of the chosen experts.
            shared_TH: of the shared ones.
            share_T1: of the chosen experts, where the kind is ``cmr``.
        """
        if share_T1 is not None:
            return share_T1 * routed_TH + (1.0 - share_T1) * shared_TH
        return joined(self.kind, x_TH, routed_TH, shared_TH, self.held())


def cmr_share(x_TH: Tensor, weights: tuple[Tensor, ...]) -> Tensor:
    """[T, 1]: sigmoid(w x + b), the share of the chosen experts in conditional routing (NLLB-MoE,
    arXiv:2207.04672).
    """
    weight_1H, bias_1 = weights
    return _sigmoid(_product(x_TH, weight_1H) + ops.cast(bias_1, x_TH.dtype))


def _product(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """With a small matrix, which may be of another dtype than the activations."""
    return reference.linear(x_TI, ops.cast(weight_OI, x_TI.dtype))


def cmr_loss(sums: RouterSums, pooled: bool) -> Tensor:
    """|mean share - budget|, the mean over layers; the last term holds the shares less the budget.
    fairseq divides once by the tokens of all layers; ``pooled`` changes nothing.
    """
    over_LE, tokens_L = sums[5][-1], sums[4]
    mean_L = over_LE[:, 0] / ops.maximum(tokens_L, ops.ones_like(tokens_L))
    return _sum(_abs(mean_L)) / mean_L.shape[0]


def local_shared_experts(config: ModelConfig, dtype: str) -> FeedForward:
    """The shared experts of a layer as one feed-forward on one device.

    Args:
        config: sizes.
        dtype: dtype of the weights.
    """
    linears = {}
    for spec in swiglu_specs(config, config.shared_expert_size):
        output_size, input_size = spec.shape
        linears[spec.name.removesuffix(".weight")] = Linear(input_size, output_size, dtype)
    return FeedForward(linears, GatedLinear(dtype))
