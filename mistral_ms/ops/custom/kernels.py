"""One primitive per operator of ``ascend_kernels``: names, attributes, shapes, data types.

Primitives whose attributes depend on shapes are made where they are called: a graph makes them
once, while it is compiled; in PyNative that costs 0.4 ms a call on a CPU.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import mindspore as ms
from mindspore import Tensor, ops
from mindspore.ops import CustomRegOp

from mistral_ms.ops.custom import library

FLOATS = ("float32", "float16", "bfloat16")
ROWS = "rows"
"""Stands for the data type of token rows in the signature of an operator: any of FLOATS."""


class Kernel(ops.Custom):
    """An operator.

    Args:
        op_type: name of its type.
        inputs: data type of each input by name.
        outputs: the same of each output.
        attrs: its attributes in the order of its definition.
        shapes: shapes of the outputs from those of the inputs.
        dtypes: data types of the outputs from those of the inputs.
    """

    def __init__(
        self,
        op_type: str,
        inputs: dict[str, str],
        outputs: dict[str, str],
        attrs: dict[str, int | bool | float],
        shapes: Callable[..., Any],
        dtypes: Callable[..., Any],
    ) -> None:
        if library.on_ascend():
            registration = _registration(op_type, inputs, outputs, attrs)
            super().__init__(op_type, shapes, dtypes, "aot", reg_info=registration)
        else:
            super().__init__(f"{library.twin_library()}:{op_type}", shapes, dtypes, "aot")
        for name, value in attrs.items():
            # MindSpore takes primitives of equal attributes for the same and reuses their shapes
            self.add_prim_attr(name, value)


class MoeGatingTopK(Kernel):
    """x [T, E], and bias [E] if ``biased`` -> y [T, K], expert_idx [T, K], row_idx [T, K],
    softmax_out [T, E].
    """

    def __init__(
        self,
        k: int,
        renorm: int,
        norm_type: int,
        group_count: int,
        k_group: int,
        group_select_mode: int,
        factor_bits: int,
        biased: bool,
    ) -> None:
        super().__init__(
            "MoeGatingTopK",
            {"x": ROWS, "bias": "float32"} if biased else {"x": ROWS},
            {"y": "float32", "expert_idx": "int32", "row_idx": "int32", "softmax_out": "float32"},
            {
                "k": k,
                "renorm": bool(renorm),
                "norm_type": norm_type,
                "group_count": group_count,
                "k_group": k_group,
                "group_select_mode": group_select_mode,
                "routed_scaling_factor": float_of(factor_bits),
                "out_flag": True,
            },
            lambda x, *_: ([x[0], k], [x[0], k], [x[0], k], x),
            lambda *_: (ms.float32, ms.int32, ms.int32, ms.float32),
        )


class MoeGatingTopKGrad(Kernel):
    """x, expert_idx, dy, d_softmax_out -> dx [T, E]."""

    def __init__(self, k: int, renorm: int, norm_type: int, factor_bits: int) -> None:
        super().__init__(
            "MoeGatingTopKGrad",
            {"x": ROWS, "expert_idx": "int32", "dy": "float32", "d_softmax_out": "float32"},
            {"dx": ROWS},
            {
                "k": k,
                "renorm": bool(renorm),
                "norm_type": norm_type,
                "routed_scaling_factor": float_of(factor_bits),
            },
            lambda x, *_: x,
            lambda x, *_: x,
        )


class MoeExpertCapacity(Kernel):
    """expert_idx [T, K] -> expanded_row_idx [T * K], slot_src [E * C], and counts [E]."""

    def __init__(self, expert_num: int, expert_capacity: int, drop_priority: int) -> None:
        super().__init__(
            "MoeExpertCapacity",
            {"expert_idx": "int32"},
            {
                "expanded_row_idx": "int32",
                "slot_src": "int32",
                "expert_tokens_before_capacity": "int32",
            },
            {
                "expert_num": expert_num,
                "expert_capacity": expert_capacity,
                "drop_priority": drop_priority,
            },
            lambda x, *_: ([x[0] * x[1]], [expert_num * expert_capacity], [expert_num]),
            lambda *_: (ms.int32, ms.int32, ms.int32),
        )


class MoePermute(Kernel):
    """expert_idx [T, K] -> expanded_row_idx [T * K], slot_src [T * K], counts [E] and cumulative
    sums [E]; and [1, 1], which stands for rows that were not given.
    """

    def __init__(self, expert_num: int) -> None:
        super().__init__(
            "MoePermute",
            {"expert_idx": "int32"},
            {
                "expanded_row_idx": "int32",
                "slot_src": "int32",
                "expert_tokens_count": "int32",
                "expert_tokens_cumsum": "int32",
                "expanded_x": "float32",
            },
            {"expert_num": expert_num},
            lambda x, *_: (
                [x[0] * x[1]],
                [x[0] * x[1]],
                [expert_num],
                [expert_num],
                [1, 1],
            ),
            lambda *_: (ms.int32, ms.int32, ms.int32, ms.int32, ms.float32),
        )


class MoeDispatch(Kernel):
    """x [T, H], slot_src [E * C], expanded_row_idx [T * K] -> expanded_x [E, C, H]."""

    def __init__(self, expert_num: int, expert_capacity: int, k: int) -> None:
        super().__init__(
            "MoeDispatch",
            {"x": ROWS, "slot_src": "int32", "expanded_row_idx": "int32"},
            {"expanded_x": ROWS},
            {"expert_num": expert_num, "expert_capacity": expert_capacity, "k": k},
            lambda x, *_: [expert_num, expert_capacity, x[1]],
            lambda x, *_: x,
        )


class MoeDispatchGrad(Kernel):
    """d_expanded_x [E, C, H] or [R, H], expanded_row_idx [T * K] -> dx [T, H]."""

    def __init__(self, k: int) -> None:
        super().__init__(
            "MoeDispatchGrad",
            {"d_expanded_x": ROWS, "expanded_row_idx": "int32"},
            {"dx": ROWS},
            {"k": k},
            lambda x, rows, *_: [rows[0] // k, x[-1]],
            lambda x, *_: x,
        )


class MoeCombine(Kernel):
    """expanded_x [E, C, H] or [R, H], expanded_row_idx [T * K], scales [T, K] -> y [T, H]."""

    def __init__(self) -> None:
        super().__init__(
            "MoeCombine",
            {"expanded_x": ROWS, "expanded_row_idx": "int32", "scales": "float32"},
            {"y": ROWS},
            {},
            lambda x, _rows, scales, *_: [scales[0], x[-1]],
            lambda x, *_: x,
        )


class MoeCombineGrad(Kernel):
    """dy, expanded_x, slot_src, expanded_row_idx, scales -> d_expanded_x, d_scales."""

    def __init__(self) -> None:
        super().__init__(
            "MoeCombineGrad",
            {
                "dy": ROWS,
                "expanded_x": ROWS,
                "slot_src": "int32",
                "expanded_row_idx": "int32",
                "scales": "float32",
            },
            {"d_expanded_x": ROWS, "d_scales": "float32"},
            {},
            lambda _dy, x, _slots, _rows, scales, *_: (x, scales),
            lambda dy, *_: (dy, ms.float32),
        )


class MoeSwiglu(Kernel):
    """gate [R, I], up [R, I], expert_tokens_cumsum [E] -> y [R, I]."""

    def __init__(self) -> None:
        super().__init__(
            "MoeSwiglu",
            {"gate": ROWS, "up": ROWS, "expert_tokens_cumsum": "int32"},
            {"y": ROWS},
            {},
            lambda gate, *_: gate,
            lambda gate, *_: gate,
        )


class MoeSwigluGrad(Kernel):
    """dy, gate, up, expert_tokens_cumsum -> d_gate [R, I], d_up [R, I]."""

    def __init__(self) -> None:
        super().__init__(
            "MoeSwigluGrad",
            {"dy": ROWS, "gate": ROWS, "up": ROWS, "expert_tokens_cumsum": "int32"},
            {"d_gate": ROWS, "d_up": ROWS},
            {},
            lambda dy, *_: (dy, dy),
            lambda dy, *_: (dy, dy),
        )


def bits_of(value: float) -> int:
    """The bits of a float32 as an int32: attributes reach the CPU twin as integers."""
    bits: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return bits


def float_of(bits: int) -> float:
    """The float32 that :func:`bits_of` has taken apart."""
    value: float = struct.unpack("<f", struct.pack("<i", bits))[0]
    return value


def call(primitive: Kernel, attrs: tuple[int, ...], inputs: tuple[Tensor, ...], twin: bool) -> Any:
    """Calls an operator.

    Args:
        primitive: the operator.
        attrs: what it was made with, floats by :func:`bits_of`.
        inputs: the operator's inputs.
        twin: it runs on the CPU twin, whose only way to get attributes is a tensor behind the
            inputs (never empty: operators without attributes ignore its zero).
    """
    if twin:
        return primitive(*inputs, ops.tuple_to_array((*attrs, 0)))
    return primitive(*inputs)


def _registration(
    op_type: str,
    inputs: dict[str, str],
    outputs: dict[str, str],
    attrs: dict[str, int | bool | float],
) -> dict[str, Any]:
    """What MindSpore passes to CANN: names, attributes, and the combinations of data types."""
    info = CustomRegOp(op_type)
    for index, name in enumerate(inputs):
        info = info.input(index, name, "required")
    for index, name in enumerate(outputs):
        info = info.output(index, name, "required")
    for name, value in attrs.items():
        info = info.attr(name, "required", type(value).__name__)
    kinds = (*inputs.values(), *outputs.values())
    for floating in FLOATS if ROWS in kinds else FLOATS[:1]:
        row = ((floating if kind == ROWS else kind, "DefaultFormat") for kind in kinds)
        info = info.dtype_format(*row)
    registration: dict[str, Any] = info.target("Ascend").get_op_info()
    for entry, value in zip(registration["attr"], attrs.values(), strict=True):
        entry["value"] = value  # as it is: the builder of registrations takes only text
    return registration
