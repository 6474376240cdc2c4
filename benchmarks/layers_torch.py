"""A sparse layer in PyTorch: Hugging Face's block, the loop over experts, bare products."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.drawn import moe_rows, moe_weights
from benchmarks.peer import Work, repeated

Case = Mapping[str, Any]
torch.set_num_threads(os.cpu_count() or 1)


def _frozen(case: Case) -> str:
    return json.dumps({key: value for key, value in case.items() if key != "tokens"})


@functools.lru_cache(maxsize=1)  # the last one's memory is free again
def _hugging_face_block(sizes: str) -> nn.Module:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    case = json.loads(sizes)
    block = MixtralSparseMoeBlock(
        MixtralConfig(
            hidden_size=case["hidden"],
            intermediate_size=case["intermediate"],
            num_local_experts=case["experts"],
            num_experts_per_tok=case["top_k"],
        )
    )
    return _filled(block, moe_weights(case))


def _filled(block: nn.Module, drawn: Mapping[str, np.ndarray]) -> nn.Module:
    state = {"gate.weight": torch.from_numpy(drawn["gate"])}
    for w in ("w1", "w2", "w3"):
        for e, values in enumerate(drawn[w]):
            state[f"experts.{e}.{w}.weight"] = torch.from_numpy(values)
    block.load_state_dict(state)
    return block


class _Expert(nn.Module):
    """SwiGLU."""

    def __init__(self, H: int, I: int) -> None:  # noqa: E741
        super().__init__()
        self.w1, self.w3 = nn.Linear(H, I, bias=False), nn.Linear(H, I, bias=False)
        self.w2 = nn.Linear(I, H, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[rows, H] -> [rows, H]."""
        return self.w2(nn.functional.silu(self.w1(x)) * self.w3(x))


class _Naive(nn.Module):
    """Top-K of the logits, softmax over the K, and a loop that visits every expert."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        H, I, E = case["hidden"], case["intermediate"], case["experts"]  # noqa: E741
        self.gate = nn.Linear(H, E, bias=False)
        self.experts = nn.ModuleList(_Expert(H, I) for _ in range(E))
        self.top_k = case["top_k"]

    def forward(self, x_TH: torch.Tensor) -> torch.Tensor:
        """[T, H] -> [T, H]."""
        logits_TK, chosen_TK = torch.topk(self.gate(x_TH), self.top_k)
        weights_TK = torch.softmax(logits_TK, -1)
        y_TH = torch.zeros_like(x_TH)
        for number, expert in enumerate(self.experts):
            tokens, choices = torch.where(chosen_TK == number)
            y_TH[tokens] += weights_TK[tokens, choices, None] * expert(x_TH[tokens])
        return y_TH


@functools.lru_cache(maxsize=1)  # the last one's memory is free again
def _naive_layer(sizes: str) -> nn.Module:
    case = json.loads(sizes)
    return _filled(_Naive(case), moe_weights(case))


def _work(
    forward: Callable[[torch.Tensor], torch.Tensor],
    gate: torch.Tensor,
    block: nn.Module,
    case: Case,
) -> Work:
    x_TH, dy_TH = map(torch.from_numpy, moe_rows(case))
    x_TH.requires_grad_()

    @torch.no_grad()
    def only_forward() -> torch.Tensor:
        return forward(x_TH)

    def both() -> None:
        forward(x_TH).backward(dy_TH)
        for tensor in (x_TH, *block.parameters()):
            tensor.grad = None

    y_TH = only_forward().numpy()
    forward(x_TH).backward(dy_TH)
    assert x_TH.grad is not None and gate.grad is not None
    outputs = {"y": y_TH, "dx": x_TH.grad.numpy().copy(), "gate": gate.grad.numpy().copy()}
    first, second = repeated(only_forward), repeated(both)
    return Work(lambda: {"forward": first(), "forward and backward": second()}, outputs)


def hugging_face(case: Case) -> Work:
    """MixtralSparseMoeBlock of transformers."""
    block = _hugging_face_block(_frozen(case))

    def forward(x_TH: torch.Tensor) -> torch.Tensor:
        y_1TH, _ = block(x_TH[None])
        return y_1TH[0]

    return _work(forward, block.gate.weight, block, case)


def naive(case: Case) -> Work:
    """The loop, as one writes it first."""
    layer = _naive_layer(_frozen(case))
    return _work(layer, layer.gate.weight, layer, case)


def products(case: Case) -> Work:
    """The layer's matrix products alone, all experts with the same number of rows.

    Forward: three batched products; backward: two for each of them. Results have their places
    beforehand.
    """
    E, H, I = case["experts"], case["hidden"], case["intermediate"]  # noqa: E741
    rows = max(1, case["tokens"] * case["top_k"] // E)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(shape)

    x, h, w_in, w_out = tensor(E, rows, H), tensor(E, rows, I), tensor(E, I, H), tensor(E, H, I)
    x2, h2, d_in, d_out = map(torch.empty_like, (x, h, w_in, w_out))
    into = w_in.transpose(1, 2), w_out.transpose(1, 2)

    def forward() -> None:
        torch.bmm(x, into[0], out=h2)
        torch.bmm(x, into[0], out=h2)
        torch.bmm(h, into[1], out=x2)

    def both() -> None:
        forward()
        torch.bmm(x, w_out, out=h2)
        torch.bmm(x.transpose(1, 2), h, out=d_out)
        for _ in range(2):
            torch.bmm(h, w_in, out=x2)
            torch.bmm(h.transpose(1, 2), x, out=d_in)

    first, second = repeated(forward), repeated(both)
    flops = 6.0 * E * rows * H * I
    return Work(
        lambda: {"forward": first(), "forward and backward": second()},
        facts={"flops": flops, "flops_with_backward": 3 * flops},
    )
