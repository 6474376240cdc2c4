"""Optimizers in whole trainings: a new one in one file, Muon, parameter groups, both ways."""

import numpy as np
import pytest
from mindspore import ops
from support.training import as_reported, bits, run_steps

from mistral_ms.config import OptimizerConfig, ParallelConfig, RoutingConfig, RunConfig
from mistral_ms.errors import CheckpointError, TrainingError
from mistral_ms.optimizers import Rule, register
from mistral_ms.parallel.context import ParallelContext
from mistral_ms.training.graph_step import GraphTrainStep
from mistral_ms.training.identity import Identity
from mistral_ms.training.optimizer import weight_of
from mistral_ms.training.state import restore, take_snapshot

pytestmark = pytest.mark.usefixtures("strict_graphs")

FIRST, STEPS = 3, 6


class LionConfig(OptimizerConfig, extra="forbid"):
    """Settings of an optimizer that the package does not have (arXiv:2302.06675)."""

    beta1: float = 0.9
    beta2: float = 0.99


class Lion(Rule):
    """Everything that there is to say of a new optimizer."""

    def __init__(self, settings, decays, on_host):
        super().__init__(settings, decays, on_host)
        self.beta1, self.beta2 = settings.beta1, settings.beta2
        self.mul, self.add, self.sub = map(self.kernel, (ops.Mul(), ops.Add(), ops.Sub()))
        self.sign = self.kernel(ops.Sign())

    @classmethod
    def state_names(cls, settings):
        return ("exp_avg",)

    @classmethod
    def coefficients(cls, settings, updates, rate, weight_decay):
        return rate, 1.0 - rate * weight_decay

    def mixed(self, mean, gradient, beta):
        return self.add(self.mul(mean, beta), self.mul(gradient, 1.0 - beta))

    def construct(self, weight, gradient, state, coefficients):
        rate, left = coefficients
        step = self.sign(self.mixed(state[0], gradient, self.beta1))
        weight = self.sub(self.mul(weight, left), self.mul(step, rate))
        return weight, self.mixed(state[0], gradient, self.beta2)


register("lion", LionConfig, Lion)

OPTIMIZERS = {
    "lion": {"optimizer": {"name": "lion", "learning_rate": 3e-3}},
    "muon with groups": {
        "optimizer": {"name": "muon", "learning_rate": 1e-2},
        "param_groups": [
            {"pattern": "embed_tokens.*", "frozen": True},
            {"pattern": "layers.0.moe.router.*", "frozen": True},
            {"pattern": "lm_head.*", "lr_factor": 3.0},
        ],
        "max_grad_norm": 0.1,
    },
}


def identity(update, sparse, capacity):
    return Identity(sparse, capacity, update.config, ParallelConfig(), "digest")


@pytest.fixture(params=["lion", pytest.param("muon with groups", marks=pytest.mark.slow)])
def trained(request, make_update, data, sparse, capacity, tmp_path):
    """A training on the device, its results, and a checkpoint of its middle."""
    update = make_update(**OPTIMIZERS[request.param])
    first = bits(update)
    results = run_steps(update, data, FIRST)
    take_snapshot(update, identity(update, sparse, capacity)).write(tmp_path / "saved", {})
    results += run_steps(update, data, STEPS - FIRST)
    return request.param, update, first, results


def test_trains_resumes_and_is_the_same_on_the_host(trained, make_update, data, tmp_path):
    name, update, first, results = trained
    assert results[-1].lm_loss < results[0].lm_loss - 0.1, "the weights must have moved"
    after = bits(update)
    assert {n for n in first if first[n] == after[n]} == (
        {"embed_tokens.weight", "layers.0.moe.router.weight"} if "groups" in name else set()
    )
    resumed = make_update(**OPTIMIZERS[name], offload_optimizer="host", seed=99)
    restore(resumed, tmp_path / "saved")
    again = run_steps(resumed, data, STEPS - FIRST)
    assert list(map(as_reported, again)) == list(map(as_reported, results[FIRST:]))
    assert bits(resumed) == after
    if "groups" in name:
        frozen = ("embed_tokens.weight", "layers.0.moe.router.weight")
        norms = results[0].gradient_norms
        assert not any(n.endswith(frozen) for n in (*norms, *update.optimizer.state()))
        # Norms of float32 tensors, each rounded once.
        assert results[0].grad_norm == pytest.approx(
            np.sqrt(sum(norm**2 for norm in norms.values())), rel=1e-6
        )


def test_an_optimizer_without_state_is_saved_and_restored(make_update, sparse, capacity, tmp_path):
    plain = {"optimizer": {"name": "sgd", "momentum": 0.0}}
    update, other = make_update(**plain), make_update(**plain, seed=99)
    assert not update.state()
    take_snapshot(update, identity(update, sparse, capacity)).write(tmp_path / "saved", {})
    assert bits(other) != bits(update)
    restore(other, tmp_path / "saved")
    assert bits(other) == bits(update)
    heavy = make_update(optimizer={"name": "sgd", "momentum": 0.9})
    with pytest.raises(CheckpointError, match="optimizer"):
        restore(heavy, tmp_path / "saved")


class TestRefused:
    def test_a_resume_with_another_optimizer(self, make_update, sparse, capacity, tmp_path):
        update, other = make_update(), make_update(optimizer={"name": "sgd"})
        take_snapshot(update, identity(update, sparse, capacity)).write(tmp_path / "saved", {})
        with pytest.raises(CheckpointError, match=r"optimizer's state: .*now 'sgd', .*'adamw'"):
            restore(other, tmp_path / "saved")
        then = identity(update, sparse, capacity).as_dict()
        with pytest.raises(TrainingError, match=r"another optimizer\.name: .*now 'sgd', in C 'ad"):
            identity(other, sparse, capacity).compare(then, "C")

    def test_a_resume_with_other_frozen_weights(self, make_update, sparse, capacity, tmp_path):
        update = make_update()
        take_snapshot(update, identity(update, sparse, capacity)).write(tmp_path / "saved", {})
        frozen = make_update(param_groups=[{"pattern": "norm.*", "frozen": True}])
        with pytest.raises(CheckpointError, match=r"exp_avg\.norm\.weight: .*frozen weights"):
            restore(frozen, tmp_path / "saved")


@pytest.mark.slow
def test_muon_with_groups_by_the_auto_parallel_graph(make_update, sparse, data, training):
    """Experts lie otherwise there, and nothing branches: sums in another order, not another sum."""
    one = sparse.model_copy(update={"num_hidden_layers": 1})
    run = RunConfig(
        model=one,
        routing=RoutingConfig(policy="capacity", capacity_factor=1.1, aux_loss="per_layer"),
        training=training.model_dump() | OPTIMIZERS["muon with groups"],
        parallel={"execution": "graph"},
    )
    graph = GraphTrainStep(run, ParallelContext(run.parallel), segmented=False)
    graph.storage.initialize(graph.held(), 0)
    wanted = make_update(**OPTIMIZERS["muon with groups"])
    assert graph.state().keys() == wanted.state().keys()
    assert graph.state_kinds() == wanted.state_kinds()
    results = run_steps(graph, data, FIRST), run_steps(wanted, data, FIRST)
    for mine, theirs in zip(*results, strict=True):
        for figure in ("loss", "lm_loss", "grad_norm"):
            # The graph sums in another order: float32 rounding over the steps.
            assert getattr(mine, figure) == pytest.approx(getattr(theirs, figure), rel=2e-5)
    weight_names = {name: name for name in graph.held()}
    weight_names |= {name: weight_of(name) for name in graph.state()}
    for name, parameter in (graph.held() | graph.state()).items():
        other = (wanted.held() | wanted.state())[name].asnumpy()
        values = graph.storage.from_parameter(weight_names[name], parameter.asnumpy())
        assert np.abs(values - other).max() <= 2e-4 * np.abs(other).max(), name
