"""ColossalAI's way to make a sparse layer: ``SparseMLP`` of its first MoE interface.

A thin adapter for code that is moved here; what differs is in ``docs/moe_cells.md``.
"""

from __future__ import annotations

from typing import Any, Literal

from mindspore import Tensor, nn

from mistral_ms.config import RoutingConfig
from mistral_ms.config.base import validate
from mistral_ms.errors import ConfigError
from mistral_ms.mixtures.experts import check_sizes
from mistral_ms.mixtures.moeify import registered_gate
from mistral_ms.mixtures.routed import RoutedFeedForward

_ACTIVATIONS = {"gelu": nn.GELU, "relu": nn.ReLU, "silu": nn.SiLU}


class MLPExpert(nn.Cell):
    """One expert: two layers without bias; gated: three, silu or another of ``wi_gate`` times
    ``wi_up``.

    Args:
        hidden_size: H.
        intermediate_size: I.
        activation: gelu, relu or silu.
        gated: three matrices.
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, activation: str, gated: bool
    ) -> None:
        super().__init__()
        H, I = hidden_size, intermediate_size  # noqa: E741
        self.gated = gated
        self.wi = nn.Dense(H, I, has_bias=False)
        if gated:
            self.wi_up = nn.Dense(H, I, has_bias=False)
        self.wo = nn.Dense(I, H, has_bias=False)
        self.activation = _ACTIVATIONS[activation]()

    def construct(self, x_RH: Tensor) -> Tensor:
        """[R, H] -> [R, H]."""
        inner = self.activation(self.wi(x_RH))
        if self.gated:
            inner = inner * self.wi_up(x_RH)
        return self.wo(inner)


class SparseMLP(RoutedFeedForward):
    """Top-1 or Top-2 experts with a capacity.

    Args:
        num_experts: E.
        hidden_size: H.
        intermediate_size: I.
        router_top_k: K.
        router_capacity_factor_train: multiple of K T / E in training.
        router_capacity_factor_eval: outside of it.
        router_min_capacity: an expert has at least so many slots; their number is even.
        router_noisy_policy: ``Jitter``: in training the gate's input is multiplied by numbers of
            0.99 to 1.01; theirs multiplies the logits. None: no noise.
        router_drop_tks: False: outside of training nothing is dropped; training always drops.
        router_norm: both weights of Top-2 are divided by their sum.
        router_loss: coefficient of the load-balancing loss, which is added in the backward pass;
            theirs is collected by a global manager.
        mlp_activation: gelu, relu or silu.
        mlp_gated: experts have three matrices.
        seed: of the gate; experts are as ``nn.Dense`` draws them.

    Raises:
        ConfigError: a size below 1, an unknown activation or noise, or ``router_norm`` of Top-1,
            whose weight would be 1 whatever the gate says.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        router_top_k: Literal[1, 2] = 1,
        router_capacity_factor_train: float = 1.25,
        router_capacity_factor_eval: float = 2.0,
        router_min_capacity: int = 4,
        router_noisy_policy: Literal["Jitter"] | None = None,
        router_drop_tks: bool = True,
        router_norm: bool = False,
        router_loss: float = 0.01,
        mlp_activation: str = "gelu",
        mlp_gated: bool = False,
        seed: int = 0,
    ) -> None:
        check_sizes(num_experts=num_experts, intermediate_size=intermediate_size)
        if mlp_activation not in _ACTIVATIONS:
            raise ConfigError(
                "unknown activation",
                where="mlp_activation",
                value=mlp_activation,
                rule=", ".join(_ACTIVATIONS),
            )
        if router_noisy_policy not in (None, "Jitter"):
            raise ConfigError(
                "unknown noise",
                where="router_noisy_policy",
                value=router_noisy_policy,
                rule="None or Jitter; Gaussian noise is not here",
            )
        H, E, K = hidden_size, num_experts, router_top_k
        slots = {
            "policy": "capacity",
            "capacity_rounding": "floor",
            "capacity_multiple_of": 2,
            "min_capacity": router_min_capacity,
            "drop_priority": "choice_major",
        }
        train, outside = (
            validate(RoutingConfig, {**slots, "capacity_factor": f}, "SparseMLP")
            for f in (router_capacity_factor_train, router_capacity_factor_eval)
        )
        noise = {"router_jitter_noise": 0.0 if router_noisy_policy is None else 0.01}
        gate: dict[str, Any] = {"name": "switch_top_1", **noise}
        if K == 2:
            gate = {"name": "gshard_top_2", "second_policy": "all", **noise}
        super().__init__(
            [MLPExpert(H, intermediate_size, mlp_activation, mlp_gated) for _ in range(E)],
            registered_gate(gate, H, E, K, router_norm, train, seed),
            train,
            packed=False,
            losses={"aux": router_loss} if router_loss else {},
            seed=seed,
            eval_routing=outside if router_drop_tks else RoutingConfig(),
        )
