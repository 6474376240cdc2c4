"""Operations and bytes of a small graph, counted by hand, and what a plan makes of them.

The operations of a compiled step are compared with its sizes in test_live.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from mistral_ms.config import RunConfig
from mistral_ms.errors import DryrunError
from mistral_ms.parallel.dryrun.cost import costs
from mistral_ms.parallel.dryrun.ir import read
from mistral_ms.parallel.dryrun.peak import peak
from mistral_ms.planner import load_hardware
from mistral_ms.planner.compiled import step_cost
from mistral_ms.planner.compiled_report import cost_figure, sentences, tables

X, W = "<Tensor[BFloat16], (8, 16)>", "<Tensor[BFloat16], (4, 16)>"
Y, WIDE = "<Tensor[BFloat16], (8, 4)>", "<Tensor[Float32], (8, 4)>"
Q, K = "<Tensor[BFloat16], (2, 6, 12)>", "<Tensor[BFloat16], (2, 6, 4)>"
PAIR = "<Tuple[Tensor[Float32]*2,Tensor[BFloat16]], TupleShape((2, 6, 8), (2, 6, 8), (2, 6, 12))>"
SUMS, OTHER = "Ref[Tensor[Float32]], (4, 16), ref_key=accu_grads.w", "<Int64, NoShape>"
TEXT = f"""\
# IR entry: @2_Step
%para1_ids: <Tensor[Int32], (8)> : [8]
%para2_w: <Ref[Tensor[Float32]], (4, 16), ref_key=w>  :  has_default
%para3_accu_grads.w: <{SUMS}>  :  has_default
subgraph @1_▸Layer(%para4_x, %para5_w) {{
  %0(a) = PrimFunc_MatMul(%para4_x, %para5_w, Bool(0), Bool(1)) {{instance name: product}}
      : ({X}, {W}, <Bool, NoShape>, <Bool, NoShape>) -> ({Y})
  %1(b) = PrimFunc_Cast(%0, I64(43))
      : ({Y}, {OTHER}) -> ({WIDE})
  %2(c) = PrimFunc_Mul(%1, %1)
      : ({WIDE}, {WIDE}) -> ({WIDE})
  %3(d) = PrimFunc_Reshape(%2, (I64(32)))
      : ({WIDE}, {OTHER}) -> (<Tensor[Float32], (32)>)
  %4(e) = PrimFunc_ReduceSum(%3, (), Bool(0))
      : (<Tensor[Float32], (32)>) -> (<Tensor[Float32], ()>)
  %5(f) = Partial(@3_◂Layer, %1)
      : (<Func, NoShape>, {WIDE}) -> (<Func, NoShape>)
  %6(g) = MakeTuple(%4, %5)
      : (<Tensor[Float32], ()>, <Func, NoShape>) -> (<Tuple[Tensor[Float32],Func], TupleShape((), NoShape)>)
  Return(%6)
}}
subgraph @3_◂Layer(%para6_kept, %para7_dout) {{
  %0(a) = PrimFunc_Transpose(%para6_kept, (I64(1), I64(0)))
      : ({WIDE}, {OTHER}) -> (<Tensor[Float32], (4, 8)>)
  %1(b) = PrimFunc_Gather(%para3_accu_grads.w, %para1_ids, I64(0), I64(0))
      : (<Ref[Tensor[Float32]], (100, 16)>, <Tensor[Int32], (8)>, {OTHER}) -> (<Tensor[Float32], (8, 16)>)
  %2(c) = PrimFunc_BatchMatMul(%0, %1, Bool(0), Bool(0)) {{instance name: gradient}}
      : (<Tensor[Float32], (4, 8)>, <Tensor[Float32], (8, 16)>) -> (<Tensor[Float32], (4, 16)>)
  %3(d) = PrimFunc_AssignAdd(%para3_accu_grads.w, %2) {{instance name: add}}
      : (<{SUMS}>, <Tensor[Float32], (4, 16)>) -> (<{SUMS}>)
  Return(%3)
}}
subgraph @2_Step() {{
  %0(w) = PrimFunc_Cast(%para2_w, I64(45))
      : (<Ref[Tensor[Float32]], (4, 16), ref_key=w>, {OTHER}) -> ({W})
  %1(x) = PrimFunc_Zeros((I64(8), I64(16)), I64(45))
      : ({OTHER}) -> ({X})
  %2(m) = call @1_▸Layer(%1, %0)
      : ({X}, {W}) -> (<Tuple[Tensor[Float32],Func], TupleShape((), NoShape)>)
  %3(n) = call @1_▸Layer(%1, %0)
      : ({X}, {W}) -> (<Tuple[Tensor[Float32],Func], TupleShape((), NoShape)>)
  %4(o) = TupleGetItem(%2, I64(1))
      : (<Tuple[Tensor[Float32],Func], TupleShape((), NoShape)>, {OTHER}) -> (<Func, NoShape>)
  %5(p) = %4[@Partial(@3_◂Layer)](%1)
      : ({X}) -> (<{SUMS}>)
  %6(q) = %3[@Partial(@3_◂Layer)](%1)
      : ({X}) -> (<{SUMS}>)
  %7(r) = PrimFunc_FlashAttentionScore(%1, %1, %1, None, I64(3), F32(1), I64(2)) {{instance name: at}}
      : ({Q}, {K}, {K}, <None, NoShape>) -> ({PAIR})
  %8(s) = AllReduce(%7) {{instance name: sum}} primitive_attrs: {{group: "hccl_world_group"}}
      : (<Tensor[Float32], (6)>) -> (<Tensor[Float32], (6)>)
  %9(t) = Adam(%para2_w, %para2_w, %para2_w, %0, %6) {{instance name: adam}}
      : (<Ref[Tensor[Float32]], (4, 16)>, <Ref[Tensor[Float32]], (4, 16)>, <Ref[Tensor[Float32]], (4, 16)>, <Tensor[Float32], ()>, <Tensor[Float32], (4, 16)>) -> (<Tuple[Tensor[Float32]*3], TupleShape((4, 16), (4, 16), (4, 16))>)
  Return(%9)
}}
"""  # noqa: E501
RUN = RunConfig.model_validate({
    "model": {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32,
              "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 2},
    "training": {"max_steps": 1, "seq_length": 8, "global_batch_size": 8,
                 "gradient_accumulation_steps": 4, "dtype": "bfloat16"},
    "parallel": {"dp": 1, "pp": 2},
})  # fmt: skip
MATRIX = 4 * 16 * 4
"""Bytes of [4, 16] in float32."""
WANTED = {
    # operator: kind, times, operations, bytes read, written, and what a fused chain spares
    "MatMul": ("matmul", 2, 2 * 8 * 4 * 16, (8 * 16 + 4 * 16) * 2, 8 * 4 * 2, 0),
    "BatchMatMul": ("matmul", 2, 2 * 4 * 16 * 8, (4 * 8 + 8 * 16) * 4, MATRIX, 0),
    "Mul": ("elementwise", 2, 0, 2 * 128, 128, 128),  # what it reads twice is one tensor
    "ReduceSum": ("reduction", 2, 0, 128, 4, 0),
    "Transpose": ("copy", 2, 0, 128, 128, 0),
    "Gather": ("permutation", 2, 0, 8 * 16 * 4 + 8 * 4, 8 * 16 * 4, 0),  # not the whole table
    "AssignAdd": ("accumulation", 2, 0, 2 * MATRIX, MATRIX, 0),
    "Zeros": ("copy", 1, 0, 0, 8 * 16 * 2, 0),
    # a query sees 1 to 6 keys, 21 in all; two products of 12 numbers
    "FlashAttentionScore": (
        "attention", 1, 2 * 2 * 2 * 21 * 12, 2 * 6 * (12 + 4 + 4) * 2,
        2 * 2 * 6 * 8 * 4 + 2 * 6 * 12 * 2, 0,
    ),
    "Adam": ("optimizer", 1, 0, 4 * MATRIX + 4, 3 * MATRIX, 0),
}  # fmt: skip


def test_operations_and_bytes():
    found = costs(TEXT)
    casts = {(cost.written, times) for cost, times in found.items() if cost.operator == "Cast"}
    assert casts == {(4 * 16 * 2, 1), (128, 2)}
    others = {
        cost.operator: (cost.kind, times, cost.flops, cost.read, cost.written, cost.chained)
        for cost, times in found.items()
        if cost.operator != "Cast"
    }
    assert others == WANTED


def test_bytes_at_once():
    """When the first gradient multiplies: x and the rounded weight, what both micro-batches keep,
    and two factors and their product.
    """
    found = peak(TEXT)
    assert (found.kept, found.at_once) == (128, 2)
    assert found.total == 8 * 16 * 2 + 4 * 16 * 2 + 2 * 128 + (128 + 8 * 16 * 4 + MATRIX)


@pytest.mark.parametrize(
    "change",
    [(W, "<Tensor[BFloat16], (4, 15)>"), (Q, "<Tensor[BFloat16], (2, 3, 6, 4, 1)>")],
)
def test_what_does_not_fit_together_is_refused(change):
    with pytest.raises(DryrunError, match=r"^unknown operator: "):
        costs(TEXT.replace(*change))


def test_a_shape_of_run_time_is_said():
    text = TEXT.replace(
        "(<Tensor[Float32], (32)>) -> (<Tensor[Float32], ()>)",
        "(<Tensor[Float32], (-1)>) -> (<Tensor[Float32], ()>)",
    )
    assert [cost.operator for cost in costs(text) if cost.unknown] == ["ReduceSum"]


def test_the_step_is_the_sum_of_its_parts():
    """Seconds from the rates by hand, and a share of the peak that no bound can exceed."""
    hardware, operators = load_hardware("atlas_800t_a2"), costs(TEXT)
    found = step_cost(RUN, hardware, operators, read(TEXT, 0, 2, {}), peak(TEXT), 0)
    kinds = {each.kind: each for each in found.classes}
    stream = 1600e9 * 0.8
    assert kinds["copy"].seconds == pytest.approx((2 * 256 + 256) / stream)
    assert kinds["elementwise"].seconds_fused == pytest.approx(2 * 256 / stream)
    assert found.minimum == pytest.approx(kinds["matmul"].seconds + kinds["attention"].seconds)
    (link,) = found.links
    # both ranks are on one node: a ring of two, both ways, parts of 12 bytes on one of seven links
    assert (link.count, link.bytes_inside, link.bytes_between) == (1, 24, 0)
    assert link.seconds == pytest.approx(2 * 10e-6 + 24 / (196e9 * 0.65 / 7))
    once = kinds["optimizer"].seconds
    stage = sum(each.seconds for each in found.classes) - once + link.seconds
    assert found.seconds() == pytest.approx(stage * (1 + 1 / 4) + once)
    assert 0 < found.utilization() < found.utilization(fused=True) < 1
    layer = 2 * 16 * (4 * 16) + 4 * 4 * 16 + 6 * 16 * 32  # four keys on average
    assert found.model_flops == 3 * 64 * (4 * layer + 2 * 16 * 64) / 2
    values = found.values()
    shares = [each["share"] for each in (*values["operators"], *values["communication"])]
    assert sum(shares) == pytest.approx((stage + once) / found.seconds())
    assert values["largest"][0]["bytes"] == 2 * (2 * 8 * 16 * 4 + 8 * 4)  # the gather
    first, links, most = tables(found)
    assert (len(first.rows), len(links.rows), len(most.rows)) == (9, 1, 9)
    text = " ".join(sentences(replace(found, unknown=3), RUN, hardware))
    assert "never run on an NPU" in text
    assert "3 operators" in text
    assert b"<svg" in cost_figure(found, "a rank", "svg")
