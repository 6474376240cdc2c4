"""The auto-parallel graph inside MindFormers' steps, compiled for ranks of Ascend."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from support.mindformers_target import MICRO, WIDE, E, H

from mistral_ms.checkpoint.load import set_values
from mistral_ms.ops.modes import graph_mode
from mistral_ms.parallel.dryrun.ir import read
from mistral_ms.parallel.dryrun.process import Compiler, Request
from mistral_ms.parallel.dryrun.standins import find_runtime, why_impossible
from mistral_ms.parallel.graph.storage import GraphStorage

C, HALF = 7, 2  # ceil(1.1 * 2 * S / E)


@pytest.fixture(scope="module")
def graph(tmp_path_factory):
    """Compiled for rank 2 of four, in the last stage."""
    pytest.importorskip("mindformers", reason="MindFormers is not installed")
    if reason := why_impossible():
        pytest.skip(reason)
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    environ = {k: v for k, v in os.environ.items() if k != "ASCEND_HOME_PATH"}
    environ |= {"PYTHONPATH": path, "MISTRAL_MS_CACHE": str(tmp_path_factory.mktemp("cache"))}
    request = Request(2, 4, target="support.mindformers_target:build")
    with (
        Compiler(find_runtime(environ), environ) as compiler,
        compiler.compiled(request, tmp_path_factory.mktemp("logs"), 300) as compiled,
    ):
        return read(compiled.graph.read_text(errors="replace"), 2, 4, compiled.groups)


def test_each_micro_batch_has_two_exchanges_each_way(graph):
    found, neighbours = Counter(), Counter()
    for each in graph.communication:
        if each.operator == "AlltoAll":
            found[str(each.phase), each.ranks, each.nbytes] += each.times
        if each.operator in ("Send", "Receive"):
            neighbours[each.operator, str(each.phase), each.peer] += each.times
    size = E * C * H * HALF
    assert found == {
        ("forward", (2, 3), size): 2 * MICRO,
        ("backward", (2, 3), size): 2 * MICRO,
    }
    assert neighbours == {("Receive", "forward", 0): MICRO, ("Send", "backward", 0): MICRO}


def test_the_norm_is_of_all_stages(graph):
    """Sums of one number over the world."""
    assert any(
        each.operator == "AllReduce" and each.ranks == (0, 1, 2, 3) and each.nbytes == 4
        for each in graph.communication
    )


def test_a_rank_holds_its_experts(graph):
    assert graph.parameters["layers.1.moe.experts.w1"].shape == (E // 2 * H, WIDE)
    assert not any(name.startswith("layers.0.") for name in graph.parameters)


def test_inputs_are_those_of_the_whole_batch():
    """Against loops; padding at the end, its id inside, and labels that do not count."""
    pytest.importorskip("mindformers", reason="MindFormers is not installed")
    from mistral_ms.mindformers.graph import WholeBatch

    ids = np.array([[5, 6, 0, 7, 8], [9, 4, 3, 0, 0], [3, 3, 3, 3, 3]], np.int32)
    labels = ids.copy()
    labels[2, :3] = -100
    inputs = Tensor(np.float32(1024.0)), Tensor(ids), Tensor(labels)
    tokens, targets, positions, segments, scales, random = (
        each.asnumpy() for each in WholeBatch(4, 0, -100)(*inputs)
    )
    assert np.array_equal(tokens, ids[:, :-1])
    counted = present = 0
    for row in range(3):
        length = 1 + max(i for i in range(4) if ids[row, i])
        for i in range(4):
            expected = labels[row, i + 1] if ids[row, i] else -100
            assert targets[row, i] == expected
            assert positions[row, i] == (i if i < length else -1)
            counted += expected != -100
            present += i < length
    assert np.allclose(scales, [[1 / counted, 1 / present, 1024.0]] * 3, rtol=1e-6)
    assert not segments.any() and not random.any()
    assert random.shape == scales.shape == (3, 3)


def test_router_losses_follow_the_loss_scale(monkeypatch):
    """One process on the CPU: the norm of all gradients, the router's among them, against
    PyNative's of the ordinary objective, whatever the scale.
    """
    pytest.importorskip("mindformers", reason="MindFormers is not installed")
    from mindformers.core.lr import CosineWithWarmUpLR
    from mindformers.core.optim import AdamW

    from mistral_ms.mindformers import MixtralConfig, MoETrainOneStepCell, modeling

    experts = dict(expert_num=4, num_experts_chosen=2, routing_policy="TopkRouterV2")
    config = MixtralConfig(
        batch_size=3, seq_length=8, hidden_size=32, intermediate_size=48, num_layers=2,
        num_heads=2, n_kv_heads=1, vocab_size=64, pad_token_id=0, initializer_range=0.2,
        moe_config=dict(**experts, aux_loss_factor=0.9, z_loss_factor=0.1, enable_sdrop=True),
    )  # fmt: skip
    ids = np.random.default_rng(0).integers(1, 64, (3, 9)).astype(np.int32)
    ids[1, -4:] = 0
    alone = modeling.MixtralForCausalLM(config)
    alone.set_train()
    tokens, labels, positions = alone.next_tokens(Tensor(ids))
    weights = alone.language_model.weights()
    gradient = ms.value_and_grad(alone.objective, None, tuple(weights.values()), has_aux=True)
    (_, parts), gradients = gradient(tokens, labels, positions)
    squares = {
        name: float((each.asnumpy().astype(np.float64) ** 2).sum())
        for name, each in zip(weights, gradients, strict=True)
    }
    monkeypatch.setattr(modeling, "is_divided", lambda: True)
    divided = modeling.MixtralForCausalLM(config)
    run = divided.run_config
    storage = GraphStorage(run.model, run.parallel)
    for name, parameter in divided.weights().items():
        parameter.init_data()
        set_values(parameter, storage.to_parameter(name, weights[name].asnumpy()))
    for buffer in divided.net.metrics_buffers().values():
        buffer.init_data()
    rate = CosineWithWarmUpLR(learning_rate=1e-30, warmup_steps=0, total_steps=10)
    optimizer = AdamW(list(divided.weights().values()), learning_rate=rate)
    step = MoETrainOneStepCell(
        divided, optimizer, use_clip_grad=True, scale_sense=Tensor(1.0, ms.float32)
    )
    step.set_train()
    for scale in (1.0, 65536.0):
        step.set_sense_scale(Tensor(scale, ms.float32))
        with graph_mode():
            loss, overflow, used, _, norm = step(Tensor(ids))
        assert float(used.asnumpy()) == scale
        assert not overflow.asnumpy()
        assert float(loss.asnumpy()) == pytest.approx(float(parts[0].asnumpy()), rel=1e-5)
        assert float(norm.asnumpy()[0]) == pytest.approx(sum(squares.values()) ** 0.5, rel=1e-5)
        for weight, square in zip(
            optimizer.parameters, step.clip_grad_norm.norm.squares, strict=True
        ):
            if weight.name.endswith("router.weight"):
                assert float(square.asnumpy()[0]) == pytest.approx(squares[weight.name], rel=1e-4)
