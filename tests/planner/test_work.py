"""Seconds of layers: their operations against the count that balances pipeline stages, and laws."""

import pytest
from support import configs

from mistral_ms.config import RunConfig
from mistral_ms.parallel.pipeline import layer_costs
from mistral_ms.planner.hardware import GIGA, TERA, load_hardware
from mistral_ms.planner.load import EVEN, Balance
from mistral_ms.planner.work import Work, update_seconds

A2 = load_hardware("atlas_800t_a2")
S, ROWS = 64, 2


def ideal(**compute):
    """A card that is bound by operations alone."""
    peaks = A2.compute.peak_tflops.model_copy(update={"float32": A2.compute.peak_tflops.bfloat16})
    values = {"efficiency": ((1, 1.0),), "memory_gb_per_s": 1e15, "peak_tflops": peaks, **compute}
    return A2.model_copy(update={"compute": A2.compute.model_copy(update=values)})


def run(**changes):
    values = {
        "model": configs.model(moe={"sparse_layers": (1, 3)}),
        "routing": {"policy": "capacity", "capacity_factor": 1.0},
        "training": {
            "max_steps": 1, "seq_length": S, "global_batch_size": ROWS, "dtype": "bfloat16"
        },
        **changes,
    }  # fmt: skip
    return RunConfig(**values)


SHARED = configs.model(
    moe={
        "moe_intermediate_size": 32,
        "n_shared_experts": 2,
        "shared_expert_gate": "softmax_pair",
        "extra_feed_forward": "both",
        "sparse_layers": {"first_k_dense_replace": 1},
    }
)


@pytest.mark.parametrize("model", [configs.model(moe={"sparse_layers": (1, 3)}), SHARED])
@pytest.mark.parametrize("layer", [0, 1])
def test_operations_are_those_that_balance_the_stages(layer, model):
    """Of attention half: a query sees half of the keys on average, kernels skip the others."""
    training, hardware = run(model=model), ideal()
    work = Work(training, hardware, "graph", EVEN)
    found, model = work.layer(layer).forward, training.model
    peak = hardware.compute.peak_tflops.bfloat16 * TERA
    core = 4 * S * model.num_attention_heads * model.head_size
    costs = layer_costs(model, S)
    assert found.matmul * peak == pytest.approx(S * ROWS * (costs.layers[layer] - core))
    attention = found.attention * peak * hardware.compute.attention_forward
    assert attention == pytest.approx(S * ROWS * core / 2)
    assert work.layer(layer).backward.matmul == pytest.approx(2 * found.matmul)
    head = work.head().forward.matmul * peak
    assert head == pytest.approx(S * ROWS * costs.head)


def test_a_window_is_seen_by_late_queries_whole():
    """The mean over queries of min(position, W), as an integral."""
    model = configs.model(moe=None, sliding_window=16)
    narrow = Work(run(model=model), A2, "graph", EVEN).layer(0).forward.attention
    wide = Work(run(model=configs.model(moe=None)), A2, "graph", EVEN).layer(0).forward.attention
    seen = sum(min(query + 0.5, 16) for query in range(S)) / S
    assert narrow / wide == pytest.approx(seen / (S / 2), rel=0.01)


def test_thin_products_are_bound_by_bytes():
    hardware = ideal(memory_gb_per_s=1.0, memory_efficiency=1.0)
    work = Work(run(), hardware, "graph", EVEN)
    V, H, T = work.model.vocab_size, work.model.hidden_size, S * ROWS
    moved = 2 * (T * H + H * V + T * V)
    assert work.head().forward.matmul == pytest.approx(moved / GIGA)


def test_permuting_moves_what_the_ascendc_operators_count():
    """ascend_kernels/README.md: MoeDispatch 214.9 MB; MoeCombine 201.5 MB reads no empty slots.
    T = 8192, H = 4096, C = 2253.
    """
    T, H, R = 8192, 4096, 8 * 2253
    assert pytest.approx(214.9, rel=0.001) == 2 * (T * H + R * H) / 1e6
    assert pytest.approx(201.5, rel=0.07) == 2 * (R * H + T * H) / 1e6


def test_tensor_parallel_cards_share_the_work():
    whole = Work(run(), ideal(), "graph", EVEN).layer(1).forward.matmul
    parallel = {"mp": 2, "devices_per_node": 2}
    half = Work(run(parallel=parallel), ideal(), "graph", EVEN).layer(1).forward.matmul
    router = 2 * S * ROWS * 64 * 8 / (A2.compute.peak_tflops.bfloat16 * TERA)
    assert half - router == pytest.approx((whole - router) / 2)


def test_uneven_experts_take_longer():
    even, uneven = (
        Work(run(), A2, "graph", balance).layer(1).forward.total
        for balance in (EVEN, Balance(slowest=1.5))
    )
    assert uneven > even


@pytest.mark.parametrize("offload", ["none", "host"])
def test_an_update_is_bound_by_memory(offload):
    training = run().training.model_copy(update={"offload_optimizer": offload})
    seconds = update_seconds(1e9, run().model_copy(update={"training": training}), A2)
    if offload == "none":
        assert seconds == pytest.approx(28e9 / (1600e9 * 0.8))
    else:
        assert seconds == pytest.approx(8e9 / 20e9 + 28e9 / 400e9)  # one card alone on its host
