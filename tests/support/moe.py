"""Sparse layers with given weights, and Hugging Face's sparse block with a capacity."""

from __future__ import annotations

import numpy as np
import torch
from mindspore import Tensor
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from mistral_ms.config import DROPLESS, ModelConfig, MoEArchitecture, RoutingConfig
from mistral_ms.moe import MoELayer
from support.hf import STACKED, hf_experts
from support.routing import expert_choice_oracle, slots_oracle


def moe_config(H=6, I=10, E=4, K=2, normalize=True) -> ModelConfig:  # noqa: E741
    return ModelConfig(
        vocab_size=8,
        hidden_size=H,
        intermediate_size=I,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        moe=MoEArchitecture(num_local_experts=E, num_experts_per_tok=K, norm_topk_prob=normalize),
    )


def moe_layer(
    config: ModelConfig, routing: RoutingConfig = DROPLESS, seed: int = 0
) -> tuple[MoELayer, dict[str, np.ndarray]]:
    """A layer with random weights (router logits of size 2), and those weights."""
    layer, rng = MoELayer(config, routing), np.random.default_rng(seed)
    weights = {}
    for name, parameter in layer.parameters_and_names():
        size = 2 if name.startswith("router") else 1
        values = rng.normal(0, size / np.sqrt(parameter.shape[-1]), parameter.shape)
        weights[name] = values.astype(np.float32)
        parameter.set_data(Tensor(weights[name]))
    return layer, weights


def hf_block(config: ModelConfig, weights: dict[str, np.ndarray]) -> MixtralSparseMoeBlock:
    """Hugging Face's block with the same weights."""
    assert config.moe is not None
    block = MixtralSparseMoeBlock(
        MixtralConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_local_experts=config.moe.num_local_experts,
            num_experts_per_tok=config.moe.num_experts_per_tok,
        )
    )
    state = {"gate.weight": weights["router.weight"]}
    experts = {w: weights[f"experts.{w}"] for w in ("w1", "w2", "w3")}
    state |= hf_experts("experts", experts)
    block.load_state_dict({k: torch.tensor(v) for k, v in state.items()})
    return block


def hf_states(found: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    """What Hugging Face's block gives: states, beside logits in version 4."""
    return found[0] if isinstance(found, tuple) else found


def _logits(block: MixtralSparseMoeBlock, x_TH: torch.Tensor) -> torch.Tensor:
    """Of the block's gate [T, E]; version 5 gives weights and choices, too."""
    return hf_states(block.gate(x_TH))


def _expert(block: MixtralSparseMoeBlock, e: int, x: torch.Tensor) -> torch.Tensor:
    """What one of the block's experts makes of rows [..., H]."""
    if not STACKED:
        return block.experts[e](x)
    w1, w3 = block.experts.gate_up_proj[e].chunk(2)
    up = torch.nn.functional.silu(x @ w1.T) * (x @ w3.T)
    return up @ block.experts.down_proj[e].T


class CapacityBlock(torch.nn.Module):
    """Hugging Face's block with a capacity: choices without a slot are left out.

    Args:
        block: the block whose gate and experts are used.
        valid_T: 0 for padding.
        capacity: slots per expert.
        choice_major: the order in which slots are given.
        rescale: divide the surviving weights by their sum.
    """

    def __init__(
        self,
        block: MixtralSparseMoeBlock,
        valid_T: np.ndarray,
        capacity: int,
        choice_major: bool = False,
        rescale: bool = False,
    ) -> None:
        super().__init__()
        self.block = block
        self.valid_T, self.capacity = valid_T, capacity
        self.choice_major, self.rescale = choice_major, rescale
        self.routed: np.ndarray | None = None
        self.kept: np.ndarray | None = None
        self.logits: torch.Tensor | None = None

    def forward(self, hidden: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        x_TH = hidden.reshape(-1, hidden.shape[-1])
        self.logits = logits_TE = _logits(self.block, x_TH)
        weights_TK, chosen_TK = torch.topk(torch.softmax(logits_TE, -1), self.block.top_k, -1)
        weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        E, chosen = logits_TE.shape[-1], chosen_TK.numpy()
        kept_TK = slots_oracle(chosen, self.valid_T, E, self.capacity, self.choice_major).kept_TK
        self.routed = np.bincount(chosen[self.valid_T > 0].ravel(), minlength=E)
        self.kept = np.bincount(chosen[kept_TK > 0].ravel(), minlength=E)
        rows = []
        for t in range(x_TH.shape[0]):
            kept = [k for k in range(self.block.top_k) if kept_TK[t, k]]
            total = weights_TK[t, kept].sum() if self.rescale and kept else 1.0
            row = torch.zeros_like(x_TH[t])
            for k in kept:
                y = _expert(self.block, chosen[t, k], x_TH[t])
                row = row + weights_TK[t, k] / total * y
            rows.append(row)
        states = torch.stack(rows).reshape(hidden.shape)
        return states if STACKED else (states, logits_TE)


class ExpertChoiceBlock(torch.nn.Module):
    """Hugging Face's gate and experts, where each expert takes its best tokens.

    Args:
        block: the block whose gate and experts are used.
        valid_T: 0 for padding.
        capacity: tokens of each expert.
        rescale: divide the weights of a token's experts by their sum.
    """

    def __init__(
        self, block: MixtralSparseMoeBlock, valid_T: np.ndarray, capacity: int, rescale: bool
    ) -> None:
        super().__init__()
        self.block, self.valid_T = block, valid_T
        self.capacity, self.rescale = capacity, rescale

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        x_TH = hidden.reshape(-1, hidden.shape[-1])
        logits_TE = _logits(self.block, x_TH)
        scores_TE = torch.softmax(logits_TE, -1)
        taken = expert_choice_oracle(scores_TE.detach().numpy(), self.valid_T, self.capacity)
        weights_TE = scores_TE * torch.tensor(taken.kept_TK)
        if self.rescale:
            total_T1 = weights_TE.sum(-1, keepdim=True)
            weights_TE = weights_TE / torch.where(total_T1 > 0, total_T1, torch.ones_like(total_T1))
        y_TH = torch.zeros_like(x_TH)
        for e in range(logits_TE.shape[-1]):
            y_TH = y_TH + weights_TE[:, e : e + 1] * _expert(self.block, e, x_TH)
        return y_TH.reshape(hidden.shape)
