"""The planner's bytes against those that a training step counts, and that the graph stores."""

import math

import pytest
from dryrun.rehearsal import UnansweredGroups
from dryrun.small_runs import small_run

from mistral_ms.config import RunConfig
from mistral_ms.parallel.context import ParallelContext
from mistral_ms.parallel.pipeline import stages_of
from mistral_ms.parallel.storage import GraphStorage
from mistral_ms.planner.memory import card_memory, layer_memories, parameters
from mistral_ms.training import TrainStep, make_objective
from mistral_ms.weights import specs

LAYOUTS = [
    ({"dp": 1}, {"offload_optimizer": "host"}),
    ({"dp": 1}, {"dtype": "float32"}),
    ({"dp": 4, "ep": 2, "optimizer_parallel": True}, {}),
    ({"dp": 2, "ep": 2, "pp": 2, "mp": 2, "optimizer_parallel": True}, {"dtype": "float32"}),
    ({"dp": 2, "ep": 2, "pp": 2, "pp_interleave_num": 2, "optimizer_parallel": True}, {}),
]


FINE = {
    "moe_intermediate_size": 32,
    "n_shared_experts": 2,
    "shared_expert_gate": "sigmoid",
    "extra_feed_forward": "after",
    "sparse_layers": {"first_k_dense_replace": 1},
}


def counted(run, rank):
    """What the step of a rank that is alone keeps; nothing is compiled or sent."""
    context = ParallelContext(run.parallel, rank)
    context.groups = UnansweredGroups(context.topology, rank)
    model = context.build_stage(run.model, run.routing, run.training.dtype)
    objective = make_objective(
        model, run.training, pooled_aux=run.routing.aux_loss == "pooled", parallel_context=context
    )
    return TrainStep(objective, run.training, parallel_context=context).memory()


@pytest.mark.parametrize(("parallel", "training"), LAYOUTS, ids=str)
def test_the_fullest_card_of_each_stage(parallel, training):
    values = small_run(parallel, micro=2, **training)
    if "mp" in parallel:  # shared and fine-grained experts, a dense layer, norms of heads
        values["model"] |= {"num_hidden_layers": 3, "layer_types": None, "qk_norm": "head"}
        values["model"]["moe"] |= FINE
    if chunks := parallel.get("pp_interleave_num"):
        values["model"] |= {"num_hidden_layers": chunks * parallel["pp"], "layer_types": None}
    run = RunConfig(**values)
    stage_size, pp = run.parallel.dp * run.parallel.mp, run.parallel.pp
    parts = stages_of(run.model, pp * run.parallel.pp_interleave_num)
    layers, weights = layer_memories(run, fused="none"), specs(run.model)
    for stage in range(pp):
        reports = [
            counted(run, stage * stage_size + number)
            for number in range(0, stage_size, run.parallel.mp)  # tensor ranks hold equal parts
        ]
        here = parts[stage::pp]
        held = parameters(run.model, run.parallel, here, weights, "explicit")
        ours = card_memory(run, here, held, layers, execution="explicit", fused="none")
        assert ours.weights == max(report.device_weights for report in reports)
        assert ours.gradients == max(report.device_gradients for report in reports)
        assert ours.optimizer == max(report.device_optimizer for report in reports)
        assert ours.host_optimizer == max(report.host_optimizer for report in reports)
        assert ours.micro_batch_gradients == 4 * max(report.parameters for report in reports)


@pytest.mark.parametrize(
    "parallel",
    [
        {"dp": 4, "ep": 4, "pp": 2},
        {"dp": 8, "ep": 2, "mp": 2, "optimizer_parallel": True},
        {"dp": 16, "ep": 8, "optimizer_parallel": True},  # halves of an expert
        {"dp": 4, "ep": 2, "mp": 2, "pp": 2, "optimizer_parallel": True},
    ],
    ids=str,
)
def test_the_graph_stores_what_is_planned(parallel):
    """The part of every weight that a checkpoint takes from the first rank of each stage, and the
    tied embedding on the first stage alone.
    """
    run = RunConfig(**small_run(parallel, tied=True))
    weights, stage_size = specs(run.model), run.parallel.dp * run.parallel.mp
    for stage in stages_of(run.model, run.parallel.pp):
        storage = GraphStorage(run.model, run.parallel, stage.number * stage_size)
        parts = [storage.local_slice(name) for name in storage.specs]
        stored = sum(math.prod(cut.stop - cut.start for cut in part) for part in parts)
        found = parameters(run.model, run.parallel, (stage,), weights, "graph")
        assert found.kept == found.owned == stored
