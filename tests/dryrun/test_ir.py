"""Reading a graph's text: a step of two micro-batches on the second of two stages, shortened from
what MindSpore 2.9.0 wrote for rank 8 of 16. The answers are counted by hand."""

from __future__ import annotations

import pytest

from mistral_ms.config.layout import Sizes
from mistral_ms.errors import DryrunError
from mistral_ms.parallel.dryrun.explain import first_line, place
from mistral_ms.parallel.dryrun.ir import Communication, TensorType, read
from mistral_ms.parallel.dryrun.process import last_graph
from mistral_ms.parallel.dryrun.report import group_name, report, sent, summary
from mistral_ms.parallel.topology import Topology, Traffic

ROWS = "(<Tensor[BFloat16], (8, 4, 16)>) -> (<Tensor[BFloat16], (8, 4, 16)>)"
EXCHANGE = 'primitive_attrs: {group: "8-16", group_rank_ids: (8, 9, 10, 11, 12, 13, 14, 15)}'
TEXT = f"""\
# IR entry: @3_Step_construct_1
# Params:
%para1_ids: <Tensor[Int32], (16, 256)> : [16, 256]
%para2_layers.2.moe.w1: <Ref[Tensor[BFloat16]], (16, 8), ref_key=layers.2.moe.w1>  :  has_default
%para3_adam_m.layers.2.moe.w1: <Ref[Tensor[Float32]], (16, 8), ref_key=adam_m>  :  has_default
%para4_adam_v.layers.2.moe.w1: <Ref[Tensor[Float32]], (16, 8), ref_key=adam_v>  :  has_default
%para5_accu_grads.layers.2.moe.w1: <Ref[Tensor[Float32]], (16, 8), ref_key=a>  :  has_default

subgraph @1_▸Layer(%para10_x) {{
  %0(CNode_1) = AlltoAll(%para10_x) {{instance name: redistribution_op_1}} {EXCHANGE} cnode_attrs: {{checkpoint: Bool(1)}}
      : {ROWS}
      # Fullname with scope: (Default/net-PipelineCell/AlltoAll-op0)
  %1(CNode_2) = Partial(@2_◂Layer, %0) cnode_attrs: {{checkpoint: Bool(1)}}
      : (<Tensor[BFloat16], (8, 4, 16)>) -> (<Func, NoShape>)
  Return(%1) cnode_attrs: {{checkpoint: Bool(1)}}
}}

subgraph @2_◂Layer(%para11_dout) {{
  %0(CNode_3) = AlltoAll(%para11_dout) {{instance name: redistribution_op_1}} {EXCHANGE} cnode_attrs: {{duplicated: Bool(1)}}
      : {ROWS}
      # Fullname with scope: (Default/net-PipelineCell/AlltoAll-op0)
  %1(CNode_4) = AlltoAll(%0) {{instance name: gradredistribution_op_1}} {EXCHANGE} cnode_primal_attrs: {{forward_node_name: "AlltoAll_1"}}
      : {ROWS}
      # Fullname with scope: (Gradients/Default/net-PipelineCell/Grad_AlltoAll/AlltoAll-op0)
  Return(%1)
}}

subgraph @3_Step_construct_1() {{
  %0(CNode_5) = Receive(Tensor(shape=[1], dtype=BFloat16, value=[0])) {{instance name: Receive}} primitive_attrs: {{shape: [256, 64], group: "2-16Send", group_rank_ids: (0, 8), src_rank: I64(0), src_global_rank: I64(0), sr_tag: I64(0)}} cnode_attrs: {{micro: I64(0), is_bp: Bool(0)}}
      : (<Tensor[BFloat16], (1), value=...>) -> (<Tensor[BFloat16], (256, 64)>)
      # Fullname with scope: (Default/Receive-op0)
  %1(CNode_6) = call @1_▸Layer(%0) cnode_attrs: {{micro: I64(0)}}
      : {ROWS}
  %2(CNode_7) = call @1_▸Layer(%0) cnode_attrs: {{micro: I64(1)}}
      : {ROWS}
  %3(CNode_8) = %1[@Partial(@2_◂Layer)](%0) cnode_attrs: {{is_bp: Bool(1)}}
      : {ROWS}
  %4(CNode_9) = %2[@Partial(@2_◂Layer)](%0) cnode_attrs: {{is_bp: Bool(1)}}
      : {ROWS}
  %5(out) = Send(%4) primitive_attrs: {{shape: [256, 64], dest_rank: I64(0), dst_global_rank: I64(0), group: "2-16Send", group_rank_ids: (0, 8)}} cnode_attrs: {{is_bp: Bool(1)}}
      : (<Tensor[BFloat16], (256, 64)>) -> (<Tensor[BFloat16], (256, 64)>)
      # Fullname with scope: (Gradients/Default/Grad_Receive/Send-op0)
  %6(mine) = AllReduce(%5) {{instance name: add_up}} primitive_attrs: {{group: "ours", group_rank_ids: (8, 9, 10, 11, 12, 13, 14, 15), op: "sum"}}
      : (<Tensor[Float32], (6)>) -> (<Tensor[Float32], (6)>)
      # Fullname with scope: (Default/optimizer-Clip/AllReduce-op0)
  %7(w) = PrimFunc_AdamWeightDecay(%para2_layers.2.moe.w1, %6) {{instance name: opt}} primitive_attrs: {{primitive_target: "CPU"}}
      : (<Tensor[Float32], (16, 8)>) -> (<Tensor[Float32], (16, 8)>)
  Return(%7)
}}
"""  # noqa: E501
TOPOLOGY = Topology(Sizes(8, 1, 2, 8))


def graph(text=TEXT, groups=None):
    return read(text, 8, 16, {"ours": (8, 12)} if groups is None else groups)


def test_phases_executions_peers_and_bytes():
    stage = tuple(range(8, 16))
    rows, states = 8 * 4 * 16 * 2, 256 * 64 * 2
    found = [
        (each.operator, each.phase, each.ranks, each.nbytes, each.times, each.peer)
        for each in graph().communication
    ]
    assert found == [
        ("AlltoAll", "forward", stage, rows, 2, None),
        ("AlltoAll", "recompute", stage, rows, 2, None),
        ("AlltoAll", "backward", stage, rows, 2, None),
        ("Receive", "forward", (0, 8), states, 1, 0),
        ("Send", "backward", (0, 8), states, 1, 0),
        ("AllReduce", "optimizer", (8, 12), 24, 1, None),  # not what the text says
    ]


def test_parameters_and_the_host():
    one = graph()
    assert one.parameter_bytes == 16 * 8 * 2
    assert one.optimizer_bytes == 2 * 16 * 8 * 4
    assert one.gradient_bytes == 16 * 8 * 4
    assert one.on_host == {"AdamWeightDecay": 1}


def test_the_report():
    found = report(graph(), TOPOLOGY, 8, 1.5, micro_batches=2)
    assert (found["rank"], found["stage"], found["compile_seconds"]) == (8, 1, 1.5)
    assert found["alltoall_per_moe_layer"] == {"forward": 1, "backward": 1}
    lines = [(line["group"], line["inter_node"]) for line in found["communication"]]
    assert lines == [("expert", False)] * 3 + [("neighbours", True)] * 2 + [("other", False)]
    # six exchanges with seven neighbours; one Send; a ring of two, both ways
    row, states = 4 * 16 * 2, 256 * 64 * 2
    assert found["sent"] == {
        "messages_inside": 6 * 7 + 2,
        "messages_between": 1,
        "bytes_inside": 6 * 7 * row + 2 * 12,
        "bytes_between": states,
    }
    both = summary([found, found])
    assert both["sent"]["bytes_between"] == 2 * states
    assert both["max_parameter_bytes"] == 256


@pytest.mark.parametrize(
    "change",
    [
        ('group: "ours", group_rank_ids: ', 'group: "strange", others: '),
        (" = AllReduce(", " = NeighborExchangeV2("),
        (" = call @1_▸Layer(", " = called @1_▸Layer("),  # never executed
        ("(<Tensor[Float32], (6)>) -> (<Tensor[Float32], (6)>)", "unreadable"),
    ],
)
def test_what_cannot_be_read_is_not_left_out(change):
    text = TEXT.replace(*change)
    assert text != TEXT
    with pytest.raises(DryrunError, match=r"^unknown communication: "):
        graph(text)


def operator(name, ranks, given, peer=None):
    kind = TensorType("Float32", given)
    return Communication(name, "forward", "g", ranks, kind, kind, 1, peer, "")


@pytest.mark.parametrize(
    ("each", "wanted"),
    [
        (operator("AllGather", (7, 8), (4,)), Traffic(0, 1, 0, 16)),
        (operator("ReduceScatter", (8, 9), (2, 4)), Traffic(1, 0, 16, 0)),
        (operator("Broadcast", (8, 9, 10), (4,)), Traffic(2, 0, 32, 0)),
        (operator("Broadcast", (7, 8), (4,)), Traffic()),  # the first one sends
        (operator("Receive", (0, 8), (4,), 0), Traffic()),
    ],
)
def test_what_one_operator_sends(each, wanted):
    assert sent(each, TOPOLOGY, 8) == wanted


def test_the_name_that_says_most():
    topology = Topology(Sizes(16, 2, 1, 8))
    expert, data = (17, 19, 21, 23, 25, 27, 29, 31), tuple(range(1, 32, 2))
    assert group_name(operator("AlltoAll", expert, (8,)), topology, 19) == "expert"
    assert group_name(operator("AlltoAll", (17, 19, 21, 23), (8,)), topology, 19) == "expert_node"
    assert group_name(operator("AlltoAll", (19, 27), (8,)), topology, 19) == "expert_cross"
    assert group_name(operator("AllReduce", data, (8,)), topology, 19) == "data"
    assert group_name(operator("AllReduce", (3, 19), (8,)), topology, 19) == "expert_data"
    assert group_name(operator("AllReduce", (2, 19), (8,)), topology, 19) == "other"


def test_the_newest_graph(tmp_path):
    for name in ("09_validate_0099.ir", "12_validate_0100.ir", "13_task_emit_0101.ir"):
        (tmp_path / name).touch()
    assert last_graph(tmp_path).name == "12_validate_0100.ir"
    with pytest.raises(DryrunError, match="no graph"):
        last_graph(tmp_path / "nowhere")


def test_a_message_of_the_compiler():
    message = """\
----------------------------------------------------
- Framework Error Message:
----------------------------------------------------
For 'MatMul', the shapes differ.

# 0 In file /project/target.py:7, 8~33/        y = f(x)
# 1 In file /mindspore/ops.py:9, 8~33/        return g(x)
(See file 'analyze_fail.ir')
mindspore/ccsrc/x.cc:12 Infer"""
    assert first_line(message) == "For 'MatMul', the shapes differ."
    assert place(message, [["/mindspore/nn.py", 3, ""]], "target:build") == "/project/target.py:7"
    stack = [["/project/target.py", 2, "a"], ["/mindspore/nn.py", 3, "b"]]
    assert place("no account", stack, "target:build") == "/project/target.py:2"
    assert place("no account", stack, "else:build") is None
