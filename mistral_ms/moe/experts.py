"""All experts of a layer, stacked, and the routed region around them."""

from __future__ import annotations

from typing import Any

from mindspore import Tensor, nn, ops

from mistral_ms.config import ModelConfig
from mistral_ms.layers.parameter import weight
from mistral_ms.moe.dispatcher import Dispatcher, PackedDispatcher, kept_choices, masked
from mistral_ms.moe.routing import Routing
from mistral_ms.ops import cpu, reference, select, select_cpu
from mistral_ms.ops.reference_cells import ReferenceBatchedLinear

_concat = ops.Concat(0)
_transpose = ops.Transpose()
_zeros_like = ops.ZerosLike()


class FrozenRows(nn.Cell):
    """A stacked weight as it is; the gradient of its first experts is exactly zero.

    Each weight needs an instance of its own: MindSpore 2.9 compiles calls of one instance with
    weights of the same shape as if they had one weight.

    Args:
        number: how many.
    """

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def construct(self, weight_E: Tensor) -> Tensor:
        """[E, ...]."""
        return weight_E

    def bprop(self, weight_E: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        """That of the other experts alone."""
        if self.number == weight_E.shape[0]:
            return (_zeros_like(dout),)
        return (_concat((_zeros_like(dout[: self.number]), dout[self.number :])),)


class Experts(nn.Cell):
    """E SwiGLU feed-forwards as three stacked weights; each expert is one slice.

    The first ones get no gradient where the settings of the model's gate say so.

    Args:
        config: sizes.
        local_experts: L, how many this process holds; all of them when None.
        dtype: dtype of the weights.
        packed: whether rows come packed, with group sizes, or padded, as many for every expert.
        first_expert: the number of the first one that is held.

    Attributes:
        w1_linear: multiplies by w1; ``w3_linear`` and ``w2_linear`` likewise.
    """

    def __init__(
        self,
        config: ModelConfig,
        local_experts: int | None = None,
        dtype: str = "float32",
        packed: bool = False,
        first_expert: int = 0,
    ) -> None:
        super().__init__()
        assert config.moe is not None
        L = config.moe.num_local_experts if local_experts is None else local_experts
        self.hold(L, config.hidden_size, config.expert_size, dtype)
        self.frozen = min(L, max(0, config.moe.gate.frozen - first_expert))
        self.held_w1, self.held_w2, self.held_w3 = (FrozenRows(self.frozen) for _ in range(3))
        self.packed = packed
        self.swiglu = select.swiglu(select.dense_kernels())
        self.w1_linear, self.w3_linear, self.w2_linear = (self.product(dtype) for _ in range(3))

    def hold(self, L: int, H: int, I: int, dtype: str) -> None:  # noqa: E741
        """Makes the weights."""
        self.w1 = weight(L, I, H, dtype=dtype)
        self.w3 = weight(L, I, H, dtype=dtype)
        self.w2 = weight(L, H, I, dtype=dtype)

    def product(self, dtype: str) -> nn.Cell:
        """Multiplies rows by one of them."""
        if self.packed:
            return select.grouped_linear(select.dense_kernels(), dtype)
        return ReferenceBatchedLinear()

    def compute(self, rows: Tensor, group_sizes_L: Tensor | None = None) -> Tensor:
        """w2(silu(w1 x) * w3 x) of each row x by its expert.

        Args:
            rows: packed [R, H], or padded [L, C, H].
            group_sizes_L: int32, packed rows of each expert.

        Returns:
            The results, as the rows lie.
        """
        w1, w2, w3 = self.w1, self.w2, self.w3
        if self.frozen > 0:
            w1, w2, w3 = self.held_w1(w1), self.held_w2(w2), self.held_w3(w3)
        if self.packed:
            gate = self.w1_linear(rows, w1, group_sizes_L)
            up = self.w3_linear(rows, w3, group_sizes_L)
            return self.w2_linear(self.swiglu(gate, up), w2, group_sizes_L)
        gate, up = self.w1_linear(rows, w1), self.w3_linear(rows, w3)
        return self.w2_linear(self.swiglu(gate, up), w2)


class TransposedExperts(nn.Cell):
    """The same with weights that are handed in and all lie as [L, H, I].

    Args:
        dtype: dtype of the weights.
        packed: see :class:`Experts`.
        keeps: see :func:`~mistral_ms.ops.select.batched_swiglu`.
    """

    def __init__(self, dtype: str, packed: bool, keeps: bool = True) -> None:
        super().__init__()
        self.packed, kernels = packed, select.dense_kernels()
        if packed:
            self.grouped_swiglu = select.grouped_swiglu(kernels, dtype)
        else:
            self.batched_swiglu = select.batched_swiglu(kernels, keeps)

    def construct(
        self,
        rows: Tensor,
        w1_LHI: Tensor,
        w3_LHI: Tensor,
        w2_LHI: Tensor,
        group_sizes_L: Tensor | None,
    ) -> Tensor:
        """See :meth:`Experts.compute`."""
        if self.packed:
            return self.grouped_swiglu(rows, w1_LHI, w3_LHI, w2_LHI, group_sizes_L)
        return reference.batched_linear(self.batched_swiglu(rows, w1_LHI, w3_LHI), w2_LHI)


class AdaptedProduct(nn.Cell):
    """y = W x + s B (A x) of each row x by its expert, all three handed in; without an adapter W x.

    Args:
        dtype: of the matrices.
        packed: see :class:`Experts`.
        scaling: s; None: there is no adapter.
        turned: W and B lie with their outputs last.
    """

    def __init__(self, dtype: str, packed: bool, scaling: float | None, turned: bool) -> None:
        super().__init__()
        self.packed, self.scaling, self.turned = packed, scaling, turned
        kernels = select.dense_kernels()
        # each weight needs an instance of its own, see FrozenRows
        self.base, self.low_a, self.low_b = (
            select.grouped_linear(kernels, dtype) if packed else ReferenceBatchedLinear()
            for _ in range(3)
        )

    def construct(
        self,
        rows: Tensor,
        weight_L: Tensor,
        a_LrI: Tensor,
        b_L: Tensor,
        group_sizes_L: Tensor | None,
    ) -> Tensor:
        """Packed [R, I] -> [R, O], or padded [L, C, I] -> [L, C, O].

        Args:
            rows: of tokens.
            weight_L: [L, O, I], or [L, I, O].
            a_LrI: [L * r, I].
            b_L: [L * O, r], or [L * r, O].
            group_sizes_L: int32, packed rows of each expert.
        """
        y = self.times(self.base, rows, self.upright(weight_L), group_sizes_L)
        if self.scaling is None:
            return y
        L = weight_L.shape[0]
        a = a_LrI.reshape(L, -1, a_LrI.shape[-1])
        b = self.upright(b_L.reshape(L, -1, b_L.shape[-1]))
        low = self.times(self.low_a, rows, a, group_sizes_L)
        return y + self.scaling * self.times(self.low_b, low, b, group_sizes_L)

    def upright(self, stacked: Tensor) -> Tensor:
        """With the outputs before the inputs."""
        return _transpose(stacked, (0, 2, 1)) if self.turned else stacked

    def times(
        self, product: nn.Cell, rows: Tensor, stacked: Tensor, group_sizes_L: Tensor | None
    ) -> Tensor:
        """Rows by their expert's matrix."""
        if self.packed:
            return product(rows, stacked, group_sizes_L)
        return product(rows, stacked)


class AdaptedTransposedExperts(nn.Cell):
    """:class:`TransposedExperts` with adapters that are handed in.

    Args:
        dtype: of the matrices.
        packed: see :class:`Experts`.
        scalings: s of w1, w3 and w2; None of one that has no adapter.
    """

    def __init__(
        self, dtype: str, packed: bool, scalings: tuple[float | None, float | None, float | None]
    ) -> None:
        super().__init__()
        kernels = select.dense_kernels()
        self.w1_linear, self.w3_linear, self.w2_linear = (
            AdaptedProduct(dtype, packed, scaling, turned)
            for scaling, turned in zip(scalings, (True, True, False), strict=True)
        )
        self.packed = packed
        self.swiglu = select.packed_swiglu(kernels) if packed else select.swiglu(kernels)

    def construct(
        self,
        rows: Tensor,
        w1_LHI: Tensor,
        w3_LHI: Tensor,
        w2_LHI: Tensor,
        group_sizes_L: Tensor | None,
        adapters: tuple[Tensor, ...],
    ) -> Tensor:
        """See :meth:`Experts.compute`; ``adapters`` are A [L * r, inputs] and B of w1, w3 and w2:
        [L * r, I], [L * r, I] and [L * H, r]; anything where there is none.
        """
        a1, b1, a3, b3, a2, b2 = adapters
        gate = self.w1_linear(rows, w1_LHI, a1, b1, group_sizes_L)
        up = self.w3_linear(rows, w3_LHI, a3, b3, group_sizes_L)
        hidden = self.swiglu(gate, up, group_sizes_L) if self.packed else self.swiglu(gate, up)
        return self.w2_linear(hidden, w2_LHI, a2, b2, group_sizes_L)


class RoutedExperts(Experts):
    """The routed region: dispatch, experts, combine. The one place that a layout replaces.

    Args:
        config: sizes.
        dispatcher: brings rows to experts and back; injected.
        local_experts: L, experts held here; all when None.
        dtype: dtype of the weights.
        forward_only: nobody asks for gradients.
        first_expert: the number of the first one that is held.
    """

    def __init__(
        self,
        config: ModelConfig,
        dispatcher: Dispatcher,
        local_experts: int | None = None,
        dtype: str = "float32",
        forward_only: bool = False,
        first_expert: int = 0,
    ) -> None:
        super().__init__(config, local_experts, dtype, dispatcher.packed, first_expert)
        self.dispatcher = dispatcher
        self.fused: Any = None  # a Cell, where there is one
        if (
            forward_only
            and type(dispatcher) is PackedDispatcher
            and not dispatcher.routing.rescale_survivors
        ):
            self.fused = self.fused_experts(dtype)

    def fused_experts(self, dtype: str) -> nn.Cell | None:
        """All experts of a few tokens in one operator, where there is one."""
        return select_cpu.fused_experts(select.dense_kernels(), dtype)

    def compute_few(
        self, x_TH: Tensor, experts_TK: Tensor, weights_TK: Tensor, valid_T: Tensor
    ) -> Tensor:
        """[T, H] by that operator."""
        return self.fused(x_TH, experts_TK, weights_TK, valid_T, self.w1, self.w3, self.w2)

    def construct(
        self,
        x_TH: Tensor,
        routing: Routing,
        valid_T: Tensor,
        priority_TK: Tensor | None = None,
        columns: int = 1,
        mask_TK: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """[T, H] -> [T, H], and which choices were computed, see
        :func:`~mistral_ms.moe.kept_choices`; a token whose every choice is dropped gets zero.
        ``priority_TK`` and ``columns`` as in :meth:`~mistral_ms.moe.Dispatcher.plan`, ``mask_TK``
        as in :meth:`~mistral_ms.moe.Gate.output_mask`.
        """
        weights_TK, experts_TK, _, _, _ = routing
        T, K = experts_TK.shape
        if self.fused is not None and T * K <= cpu.FEW_CHOICES:
            if mask_TK is not None:
                weights_TK = weights_TK * mask_TK
            y_TH = self.compute_few(x_TH, experts_TK, weights_TK, valid_T)
            chosen_TK = ops.cast(experts_TK < self.dispatcher.num_experts, valid_T.dtype)
            return y_TH, chosen_TK * valid_T.reshape(T, 1)
        plan = self.dispatcher.plan(routing, valid_T, priority_TK, columns)
        if mask_TK is not None:
            plan = masked(plan, mask_TK)
        rows, group_sizes_L = self.dispatcher.dispatch(x_TH, plan)
        y = self.compute(rows, group_sizes_L)
        return self.dispatcher.combine(y, plan), kept_choices(plan)
