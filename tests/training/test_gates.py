"""A gate that nothing but this file knows: it has a setting, a trained vector beside the matrix,
noise, state, and a loss of its own.
"""

from contextlib import nullcontext
from functools import cache
from typing import ClassVar

import numpy as np
import pytest
from mindspore import ops
from pydantic import Field
from support.configs import TINY
from support.configs import model as small_model
from support.training import run_steps

from mistral_ms.checkpoint import convert, open_checkpoint
from mistral_ms.config import (
    DROPLESS,
    GateSettings,
    ParallelConfig,
    RoutingConfig,
    RunConfig,
    TrainingConfig,
)
from mistral_ms.datasets import InMemorySequences
from mistral_ms.errors import ConfigError
from mistral_ms.models import CausalLM, Objective
from mistral_ms.moe import Gate, register_gate
from mistral_ms.parallel.context import ParallelContext
from mistral_ms.training import TrainStep, make_objective
from mistral_ms.training import step as training_step
from mistral_ms.training.graph_step import GraphTrainStep
from mistral_ms.training.identity import Identity
from mistral_ms.training.metrics import make_record
from mistral_ms.training.state import restore, take_snapshot
from mistral_ms.weights import ParamSpec, gate_matrix

pytestmark = pytest.mark.slow
_sum = ops.ReduceSum()


class ToySettings(GateSettings):
    name: str = "toy_pressure"
    rate: float = Field(default=0.1, gt=0)


def spread(sums, pooled):
    """The mean square of the noisy logits."""
    _, _, _, _, tokens_L, (squares_LE,), _ = sums
    return _sum(squares_LE) / (_sum(tokens_L) * squares_LE.shape[-1])


@register_gate(ToySettings)
class ToyGate(Gate):
    """Top-K of noisy logits less a pressure that grows with the load."""

    statistics = ("squares",)
    losses: ClassVar = {"spread": spread}

    @classmethod
    def specs(cls, config):
        E = config.moe.num_local_experts
        return (
            *gate_matrix(config),
            ParamSpec("offset", ("E",), (E,), decay=False, init="zeros"),
            ParamSpec("pressure", ("E",), (E,), decay=False, init="zeros", kind="buffer"),
        )

    def route(self, x_TH, weights, state, context):
        weight_EH, offset_E = weights
        (pressure_E,) = state
        logits_TE = self.logits(x_TH, weight_EH) + offset_E
        noisy_TE = logits_TE if context is None else logits_TE + self.normal(context)
        _, experts_TK = ops.TopK(sorted=True)(ops.stop_gradient(noisy_TE - pressure_E), self.top_k)
        scores_TE = ops.Softmax(-1)(logits_TE)
        weights_TK = ops.GatherD()(scores_TE, 1, experts_TK)
        return weights_TK, experts_TK, scores_TE, logits_TE, (noisy_TE * noisy_TE,)

    def next_state(self, state, routed_E):
        excess_E = routed_E / np.float32(routed_E.mean()) - np.float32(1)
        return {"pressure": state["pressure"] + np.float32(self.moe.gate.rate) * excess_E}


GATE = {"name": "toy_pressure", "rate": 0.5}
CONFIG = small_model(**TINY | {"num_hidden_layers": 1}, moe={"gate": GATE})
PRESSURE, OFFSET = "layers.0.moe.router.pressure", "layers.0.moe.router.offset"
STEPS, SAVED = 4, 2


def training(micro_batches):
    return TrainingConfig(
        max_steps=STEPS, seq_length=8, global_batch_size=4,
        gradient_accumulation_steps=micro_batches, seed=11,
        router_aux_loss_coef=0.0, router_losses={"spread": 0.01}, lr_scheduler_type="constant",
    )  # fmt: skip


def fresh(micro_batches, seed):
    net = CausalLM(CONFIG, DROPLESS)
    net.initialize(seed)
    config = training(micro_batches)
    return TrainStep(make_objective(net, config), config)


def sequences():
    return InMemorySequences(np.random.default_rng(3).integers(3, 48, 61).tolist(), 8, 4, 0)


def values(update):
    return {
        name: parameter.asnumpy().copy()
        for name, parameter in {**update.held(), **update.state()}.items()
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A training with two micro-batches: its steps, its values at the end, and a checkpoint after
    two steps with the values then.
    """
    update, path = fresh(2, 0), tmp_path_factory.mktemp("gates") / "checkpoint"
    results = run_steps(update, sequences(), SAVED)
    between = values(update)
    identity = Identity(CONFIG, DROPLESS, training(2), ParallelConfig(), "digest")
    take_snapshot(update, identity).write(path, {})
    results += [update(sequences().batch(step)) for step in range(SAVED, STEPS)]
    return results, values(update), path, between


def test_state_follows_the_counts_of_the_whole_batch(saved):
    results, after, _, between = saved
    pressure = np.zeros(8, np.float32)
    for step, result in enumerate(results):
        assert result.routed_LE.sum() == 2 * sequences().batch(step).present
        excess = result.routed_LE[0] / np.float32(result.routed_LE[0].mean()) - np.float32(1)
        pressure = pressure + np.float32(0.5) * excess
        if step == SAVED - 1:
            np.testing.assert_array_equal(between[PRESSURE], pressure)
    np.testing.assert_array_equal(after[PRESSURE], pressure)
    assert np.abs(after[OFFSET]).min() > 0
    assert not any(name.endswith(f".{PRESSURE}") for name in after), "no optimizer state"


def test_its_loss_is_in_the_total_and_reported_by_name(saved):
    for result in saved[0]:
        spread_loss = result.router_losses["spread"]
        assert 0.5 < spread_loss < 2, "the noise has variance one, the logits are small"
        # The sum is one of float32.
        assert result.loss == pytest.approx(result.lm_loss + 0.01 * spread_loss, rel=1e-6)
    record = make_record(1, 0.1, 32, 1.0, saved[0][0])
    assert record.router_losses == saved[0][0].router_losses


def test_resume_and_micro_batches_draw_the_same(saved):
    """The training goes on from its checkpoint with its batches whole: bits are restored, choices
    are the same, and the rest is rounded otherwise.
    """
    results, after, path, between = saved
    update = fresh(1, 1)
    restore(update, path)
    for name, value in values(update).items():
        assert value.tobytes() == between[name].tobytes(), name
    for step in range(SAVED, STEPS):
        result, want = update(sequences().batch(step)), results[step]
        np.testing.assert_array_equal(result.routed_LE, want.routed_LE)
        # Means of two micro-batches against one sum: float32 rounds them otherwise.
        assert result.lm_loss == pytest.approx(want.lm_loss, rel=1e-5)
        assert result.router_losses["spread"] == pytest.approx(want.router_losses["spread"], 1e-5)
    np.testing.assert_array_equal(values(update)[PRESSURE], after[PRESSURE])


def graph_step(config, routing, training, seed=0):
    run = RunConfig(
        model=config,
        routing=routing,
        training=training,
        parallel={"execution": "graph"},
    )
    update = GraphTrainStep(run, ParallelContext(run.parallel), segmented=False)
    update.storage.initialize(update.held(), seed)
    return update


LOSSES = ("loss", "lm_loss", "z_loss")


def assert_same(mine, wanted, losses=LOSSES):
    """Equal choices; losses as float32 sums of another order round them."""
    np.testing.assert_array_equal(mine.routed_LE, wanted.routed_LE)
    np.testing.assert_array_equal(mine.kept_LE, wanted.kept_LE)
    for name in losses:
        assert getattr(mine, name) == pytest.approx(getattr(wanted, name), rel=2e-5), name
    assert mine.router_losses == pytest.approx(wanted.router_losses, rel=2e-5)


def test_the_auto_parallel_graph_trains_with_it(saved):
    """Its batches are whole; but for the load-balancing loss, groups add up to the same."""
    update = graph_step(CONFIG, DROPLESS, training(1))
    for mine, wanted in zip(run_steps(update, sequences(), STEPS), saved[0], strict=True):
        assert_same(mine, wanted)
    np.testing.assert_array_equal(values(update)[PRESSURE], saved[1][PRESSURE])


GATES = {
    "sigmoid_top_k": ({"n_group": 4, "topk_group": 2}, {}, 1),
    "noisy_top_k": ({}, {"importance": 0.1, "load": 0.1}, 2),
    "gshard_top_2": ({"router_jitter_noise": 0.1}, {}, 1),
}
"""Settings, losses, layers, of which the last is sparse."""
ROUTINGS = {"gshard_top_2": {"drop_priority": "random", "aux_choices": "first"}}
"""What else a routing says: all that is drawn in training is drawn alike."""


@pytest.mark.parametrize("name", GATES)
def test_each_gate_in_the_auto_parallel_graph(name, monkeypatch):
    """Compiled, against the explicit path step by step, with capacities that drop choices."""
    settings, losses, layers = GATES[name]
    moe = {"gate": {"name": name, **settings}, "sparse_layers": [layers - 1]}
    config = small_model(**TINY | {"num_hidden_layers": layers}, moe=moe)
    routing = RoutingConfig(
        policy="capacity", capacity_factor=0.9, aux_loss="per_layer", **ROUTINGS.get(name, {})
    )
    changes = {"router_losses": losses, "router_aux_loss_coef": 0.02, "router_z_loss_coef": 0.001}
    wanted_training = training(1).model_copy(update=changes)
    net = CausalLM(config, routing)
    net.initialize(0)
    objective = make_objective(net, wanted_training, pooled_aux=False)
    explicit = TrainStep(objective, wanted_training)
    graph = graph_step(config, routing, wanted_training)
    results = run_steps(graph, sequences(), 3)
    monkeypatch.setattr(training_step, "graph_mode", nullcontext)
    expected = run_steps(explicit, sequences(), 2)
    of_layers = explicit.layer_statistics(sequences().batch(2))[1:]
    expected += run_steps(explicit, sequences(), 1)
    for mine, wanted in zip(results, expected, strict=True):
        assert_same(mine, wanted, (*LOSSES, "aux_loss"))
        assert mine.kept_LE.sum() < mine.routed_LE.sum()
        assert tuple(mine.router_losses) == tuple(losses)
    # in another order again, after updates that differ in the last bit
    assert graph.gradient_norms() == pytest.approx(wanted.gradient_norms, rel=1e-4)
    for mine, wanted in zip(graph.layer_statistics(sequences().batch(2)), of_layers, strict=True):
        assert (mine["name"], mine["not_finite"]) == (wanted["name"], wanted["not_finite"])
        assert mine["mean"] == pytest.approx(wanted["mean"], rel=1e-4)
    for weight, parameter in graph.held().items():
        mine = graph.storage.from_parameter(weight, parameter.asnumpy())
        wanted = explicit.held()[weight].asnumpy()
        if weight.endswith("e_score_correction_bias"):
            np.testing.assert_array_equal(mine, wanted)
            assert np.abs(mine).max() > 0
        else:  # Adam makes differences of gradients near its eps visible
            assert np.abs(mine - wanted).max() <= 2e-4 * np.abs(wanted).max(), weight


def test_conversion(saved, tmp_path):
    _, _, path, between = saved
    convert(path, tmp_path / "half", "mindspore", dtype="fp16")
    with open_checkpoint(tmp_path / "half") as source:
        assert source.config.moe.gate == ToySettings(rate=0.5)
        for name in (PRESSURE, OFFSET):
            want = between[name].astype(np.float16)
            np.testing.assert_array_equal(source.read(name, "float16"), want)
    for target in ("hf", "mistral"):
        with pytest.raises(ConfigError, match=r"not expressible.*model\.moe\.gate: toy_pressure: "):
            convert(path, tmp_path / target, target)


@cache
def built(gate):
    moe = {"gate": gate} if gate else None
    return CausalLM(small_model(**TINY | {"num_hidden_layers": 1}, moe=moe), DROPLESS)


@pytest.mark.parametrize(
    ("gate", "losses", "message"),
    [
        ("softmax_top_k", {"spread": 0.1}, r"unknown router loss.*spread.*there are: aux, z"),
        ("toy_pressure", {"spraed": 0.1}, r"unknown router loss.*spraed.*perhaps spread"),
        (None, {"spread": 0.1}, "a dense model has no router"),
    ],
)
def test_losses_that_are_not_there(gate, losses, message):
    with pytest.raises(ConfigError, match=message):
        Objective(built(gate), router_losses=losses)


@pytest.mark.parametrize(
    ("losses", "message"),
    [
        ({"aux": 0.1}, r"the coefficient of aux is training\.router_aux_loss_coef"),
        ({"load": -1}, "load: -1 must be 0 or more"),
        ({"load": float("inf")}, "must be 0 or more, and finite"),
    ],
)
def test_impossible_coefficients(losses, message):
    with pytest.raises(ValueError, match=message):
        TrainingConfig(max_steps=1, seq_length=8, global_batch_size=1, router_losses=losses)


def test_the_place_of_a_row_is_that_in_the_global_batch():
    batch = sequences().batch(0)
    rows = [part.rows_B.tolist() for half in batch.split(2) for part in half.split(2)]
    assert rows == [[0], [1], [2], [3]]
    assert batch.of_rows(np.array([2, 0])).rows_B.tolist() == [2, 0]
