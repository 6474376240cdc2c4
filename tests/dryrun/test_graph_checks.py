"""What the compiler would refuse without saying why is a ConfigError before it runs."""

from types import SimpleNamespace

import pytest
from support import configs

from mistral_ms.config import MoEArchitecture, RunConfig
from mistral_ms.config.layout import Sizes
from mistral_ms.errors import ConfigError, DryrunError, TopologyError
from mistral_ms.parallel import graph
from mistral_ms.parallel.dryrun.servers import check_servers
from mistral_ms.parallel.graph import layer_factory
from mistral_ms.parallel.graph.checks import check_run, check_sparse_layer
from mistral_ms.parallel.graph.sparse_region import gate_parameters
from mistral_ms.parallel.topology import Topology


def run(**changes):
    training = {
        "max_steps": 1,
        "seq_length": 16,
        "global_batch_size": 32,
        "gradient_accumulation_steps": 4,
    }
    return RunConfig(
        model=configs.model(**{"num_attention_heads": 4, **changes.pop("model", {})}),
        routing={"policy": "capacity", "aux_loss": "per_layer", **changes.pop("routing", {})},
        training={**training, **changes.pop("training", {})},
        parallel={"dp": 2, "ep": 2, "pp": 4, **changes.pop("parallel", {})},
    )


REFUSED = {
    "couples the layers of all pipeline stages": {"routing": {"aux_loss": "pooled"}},
    "a pipeline of 4 stages needs": {"training": {"gradient_accumulation_steps": 2}},
    "pipeline is 1f1b": {"parallel": {"pipeline_scheduler": "gpipe"}},
    "stages are one run of layers each": {"parallel": {"pp": 2, "pp_interleave_num": 2}},
    "norms and residuals divide them": {
        "parallel": {"mp": 2},
        "training": {"seq_length": 7, "global_batch_size": 8},
    },
    "dp \\* mp \\* pp = 6: MindSpore divides a graph among 2, 4, or a multiple of 8": {
        "parallel": {"dp": 2, "pp": 3},
        "training": {"global_batch_size": 24},
    },
    "model.head_dim: 24: FlashAttentionScore takes heads of a multiple of 16": {
        "model": {"head_dim": 24}
    },
    "stage 2 of 4 is all frozen": {
        "training": {"param_groups": [{"pattern": "layers.2.*", "frozen": True}]}
    },
    "a weight that no two ranks hold alike has none": {
        "parallel": {"dp": 8, "ep": 8, "pp": 1, "optimizer_parallel": True}
    },
    "takes its batch at once": {"parallel": {"dp": 1, "ep": 1, "pp": 1}},
}


def test_a_legal_run_passes():
    check_run(run(), 4)


@pytest.mark.parametrize("message", REFUSED)
def test_refused(message):
    with pytest.raises(ConfigError, match=message):
        check_run(run(**REFUSED[message]), 4)


@pytest.mark.parametrize(
    "parallel",
    [
        {"dp": 8, "ep": 4, "pp": 1, "optimizer_parallel": True},
        {"dp": 8, "ep": 8, "pp": 1},
        {"dp": 2, "ep": 2, "pp": 4, "optimizer_parallel": True},
    ],
    ids=str,
)
def test_gradients_are_added_up_for_shards_that_are_there(parallel):
    """The first one compiles without a pipeline; the refused one did not."""
    check_run(run(parallel=parallel), 4)


@pytest.mark.parametrize("parallel", [{"dp": 2, "pp": 1}, {"dp": 4, "pp": 1, "ep": 4}, {"dp": 6}])
def test_two_four_and_multiples_of_eight_devices_are_enough(parallel):
    check_run(run(parallel=parallel, training={"global_batch_size": 48}), 4)


def test_one_process_has_no_fused_attention_to_please():
    alone = {"dp": 1, "ep": 1, "pp": 1}
    check_run(
        run(model={"head_dim": 24}, parallel=alone, training={"gradient_accumulation_steps": 1}), 4
    )


def test_as_many_processes_as_the_layout_has(monkeypatch):
    monkeypatch.setattr(layer_factory, "get_group_size", lambda: 16)
    monkeypatch.setattr(layer_factory, "get_rank", lambda: 0)
    with pytest.raises(TopologyError, match=r"= 8\) must be the number of processes \(16\)"):
        graph.build(run())


def test_a_region_takes_gates_of_few_parameters():
    gate = SimpleNamespace(weights_and_state=lambda: ((None,) * 5, (None,) * 4))
    with pytest.raises(ConfigError, match=r"model\.moe\.gate: 9 parameters: .* at most 7"):
        gate_parameters(gate)


def test_each_stage_needs_a_layer():
    with pytest.raises(ConfigError, match="every one of the 4 pipeline stages holds a layer"):
        check_run(run(), 2)


@pytest.mark.parametrize(
    ("parallel", "rule"),
    [
        ({"mp": 4}, "must divide num_key_value_heads"),
        ({"dp": 16, "ep": 16}, "must divide num_local_experts"),
    ],
)
def test_layouts_that_do_not_divide_the_model_are_refused_by_the_configuration(parallel, rule):
    with pytest.raises(ConfigError, match=rule):
        run(parallel={"pp": 2, **parallel}, training={"global_batch_size": 64})


@pytest.mark.parametrize(
    ("sizes", "ranks"),
    [
        (Sizes(12, 1, 2, 1), "data group of ranks 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11"),
        (Sizes(6, 1, 4, 1), "data group of ranks 0, 1, 2, 3, 4, 5"),
        (Sizes(8, 3, 1, 1), "tensor group of ranks 0, 1, 2"),
        (Sizes(24, 1, 1, 3), "expert_data group of ranks 0, 3, 6, 9, 12, 15, 18, 21"),
    ],
)
def test_layouts_that_stand_ins_cannot_compile_are_refused_before_they_are_asked(sizes, ranks):
    with pytest.raises(DryrunError, match=f"^no dry run: parallel: {ranks}: without CANN "):
        check_servers(Topology(sizes))


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes(8, 1, 3, 8), Sizes(4, 1, 6, 1), Sizes(3, 8, 1, 1), Sizes(24, 1, 2, 1),
        Sizes(8, 1, 4, 8), Sizes(32, 1, 1, 8), Sizes(16, 2, 1, 8), Sizes(2, 2, 2, 2),
    ],
)  # fmt: skip
def test_layouts_that_compiled_are_not_refused(sizes):
    check_servers(Topology(sizes))


def test_gates_by_ids_have_no_stages():
    experts = dict(num_local_experts=4, num_experts_per_tok=1, norm_topk_prob=False)
    moe = MoEArchitecture(gate="hash_top_1", **experts)
    check_sparse_layer(moe, 1)
    with pytest.raises(ConfigError, match=r"hash_top_1 .*parallel\.pp 2"):
        check_sparse_layer(moe, 2)
