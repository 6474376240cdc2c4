"""What one micro-batch takes on a stage: a sum over the pieces of the model that are there."""

from __future__ import annotations

from dataclasses import dataclass

from mistral_ms.planner.work import Pass


@dataclass(frozen=True)
class Part:
    """Seconds of a piece of the model for one micro-batch on one card.

    Attributes:
        compute: forward, gradient, and what selective recompute does again.
        all_to_all: of the forward pass; the gradient's is as long.
        tensor: collectives of tensor parallelism, of the forward pass.
        tensor_gradient: likewise, of the gradient.
        accumulate: adding the gradients of weights up over micro-batches.
        dense: elements of weights that data-parallel ranks have alike.
        experts: elements of experts.
        is_layer: whether it is a decoder block, and not an end of the model.
    """

    compute: Pass
    all_to_all: float = 0.0
    tensor: float = 0.0
    tensor_gradient: float = 0.0
    accumulate: float = 0.0
    dense: int = 0
    experts: int = 0
    is_layer: bool = False


class Spent:
    """Adds up what the parts of a stage take.

    Args:
        slowdown: what operators take in multiples of what they take alone.

    Attributes:
        forward: seconds of the forward pass.
        backward: of its gradient.
        parts: of both, by what they are spent on.
    """

    def __init__(self, slowdown: float) -> None:
        self.slowdown = slowdown
        self.forward = self.backward = 0.0
        names = ("matmul", "attention", "memory_bound", "recompute", "all_to_all")
        self.parts = dict.fromkeys((*names, "tensor_parallel", "accumulation"), 0.0)

    def add(self, part: Part, *, again: bool, selective: bool, overlapped: bool) -> None:
        """One part.

        Args:
            part: which.
            again: its forward pass is computed again before its gradient.
            selective: its core of attention and norms are.
            overlapped: two halves of it hide half of the shorter one of computation and exchange.
        """
        slower = self.slowdown
        ahead, back = part.compute.forward, part.compute.backward
        once = part.compute.selective.total * slower if selective else 0.0
        forward = ahead.total * slower
        backward = back.total * slower + once + part.accumulate
        self.parts["matmul"] += (ahead.matmul + back.matmul) * slower
        self.parts["attention"] += (ahead.attention + back.attention) * slower
        self.parts["memory_bound"] += (ahead.memory_bound + back.memory_bound) * slower
        self.parts["recompute"] += once
        self.parts["accumulation"] += part.accumulate
        exposed = part.all_to_all
        if overlapped:
            exposed -= min(part.all_to_all, forward + part.tensor) / 2
        passes = 1
        if again:
            passes = 2
            self.parts["recompute"] += forward
            backward += forward + part.tensor + exposed
        self.parts["all_to_all"] += (passes + 1) * exposed
        self.parts["tensor_parallel"] += passes * part.tensor + part.tensor_gradient
        self.forward += forward + part.tensor + exposed
        self.backward += backward + part.tensor_gradient + exposed
