"""What a compiled step keeps for its gradients and multiplies, against what a plan says of a layer.

The graph is compiled at sizes at which tables of positions and slots are small beside states.
"""

from __future__ import annotations

import pytest

from mistral_ms.config import RunConfig, expert_capacity
from mistral_ms.parallel.dryrun.cost import costs
from mistral_ms.parallel.dryrun.live import kept
from mistral_ms.parallel.pipeline import stages_of
from mistral_ms.planner.memory import layer_memories, parameters
from mistral_ms.weights import specs

T, H, V, HALF, FLOAT = 1024, 512, 64, 2, 4
MARGIN = 0.02
"""Of what is counted: tables of slots and positions, masks, and the router's third table of scores,
which no plan has; they do not grow with the width of a model."""


def run(recompute):
    return {
        "model": {
            "vocab_size": V, "hidden_size": H, "intermediate_size": 1792, "num_hidden_layers": 1,
            "num_attention_heads": 8, "num_key_value_heads": 2, "moe": {"num_local_experts": 8},
        },
        "routing": {"policy": "capacity", "aux_loss": "per_layer"},
        "training": {"max_steps": 1, "seq_length": T, "global_batch_size": 8, "dtype": "bfloat16",
                     "router_aux_loss_coef": 0.01},
        "parallel": {"dp": 8, "ep": 8, "recompute": recompute},
    }  # fmt: skip


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_layer_keeps_what_is_planned(compile_run, recompute):
    """Beside the layer the ends keep what the last norm got and gave, and probabilities."""
    values = run(recompute)
    text, _ = compile_run(values, 3)
    config = RunConfig.model_validate(values)
    found = kept(text)
    (layer,) = layer_memories(config, fused="all")
    ends = 2 * T * H * HALF + T * V * FLOAT
    planned = layer.kept(recompute, in_graph=True) + ends
    assert found.activations == pytest.approx(planned, rel=MARGIN)
    assert found.activations >= planned  # what is planned is there
    assert products(text) == operations(config, again=recompute == "full")
    side_by_side = {
        cost.shapes for cost in costs(text) if cost.operator == "Concat" and cost.moved > 8 * T * H
    }
    wanted = (
        "1, 2256, 1792] -> BFloat16 [1, 2256"
        if recompute == "none"
        else f"1, {H}, 1792] -> BFloat16 [1, {H}"
    )
    assert side_by_side == {f"BFloat16 [{wanted}, 3584]"}
    [stage] = stages_of(config.model, 1)
    held = parameters(config.model, config.parallel, (stage,), specs(config.model), "graph")
    assert found.weights == held.rounded * HALF


def products(text):
    """Operations of matrix products."""
    return sum(cost.flops * times for cost, times in costs(text).items() if cost.kind == "matmul")


def operations(config, again):
    """The same by sizes: a gradient has two products for each one. Of a layer that is computed
    again MindSpore leaves out, in a graph without stages, values, o_proj and w2.
    """
    experts = config.model.moe.num_local_experts
    slots = experts * expert_capacity(T, experts, 2, config.routing, T)  # as many as it receives
    router, matrix = 2 * T * H * experts, 2 * slots * H * config.model.intermediate_size
    queries, keys = 2 * T * H * H, 2 * T * H * (H // 4)
    layer = 2 * queries + 2 * keys + router + 3 * matrix
    repeated = queries + keys + router + 2 * matrix if again else 0
    return 3 * (layer + 2 * T * H * V) + repeated


TWO = "<Tuple[Tensor[Float16],Tensor[Float32]], TupleShape((16), (1))>"
LINES = """# IR entry: @root
%para1_tokens: <Tensor[Int32], (4)> : [4]
%para2_w: <Ref[Tensor[Float32]], (4, 4), ref_key=w>
subgraph @root() {{
  %0(a) = PrimFunc_Cast(%para2_w, I64(42)) {{}}
      : (<Ref[Tensor[Float32]], (4, 4)>) -> (<Tensor[Float16], (4, 4)>)
      # Fullname with scope: (Default/Cast-op0)
  %1(b) = PrimFunc_Gather(%0, %para1_tokens, I64(0)) {{}}
      : (<Tensor[Float16], (4, 4)>, <Tensor[Int32], (4)>) -> (<Tensor[Float16], (4, 4)>)
      # Fullname with scope: (Default/Gather-op0)
  %2(c) = PrimFunc_Reshape(%1, (I64(16))) {{}}
      : (<Tensor[Float16], (4, 4)>) -> (<Tensor[Float16], (16)>)
      # Fullname with scope: (Default/Reshape-op0)
  %3(d) = PrimFunc_RmsNorm(%2) {{}}
      : (<Tensor[Float16], (16)>) -> ({two})
      # Fullname with scope: (Default/RmsNorm-op0)
  %4(e) = TupleGetItem(%3, I64(1)) {{}}
      : ({two}) -> (<Tensor[Float32], (1)>)
      # Fullname with scope: (Gradients/Default/TupleGetItem-op0)
  %5(f) = PrimFunc_RmsNormGrad({read}) {{}} cnode_primal_attrs: {{forward_node_name: "N"}}
      : (<Tensor[Float16], (16)>, <Tensor[Float32], (1)>) -> (<Tensor[Float16], (16)>)
      # Fullname with scope: (Gradients/Default/RmsNormGrad-op0)
  Return(%5)
}}
"""


@pytest.mark.parametrize(
    ("read", "activations", "weights"),
    [("%2, %4", 32 + 4, 0), ("%1, %2", 32, 0), ("%4, %0", 4, 32), ("%para1_tokens, %4", 4, 0)],
)
def test_what_is_read(read, activations, weights):
    """A view is its original; of several results one; a copy of a weight is not the batch's;
    the batch itself is not counted.
    """
    found = kept(LINES.format(read=read, two=TWO))
    assert (found.activations, found.weights) == (activations, weights)
