"""A gate that breaks its contract is refused by name before anything is compiled."""

from typing import ClassVar

import mindspore as ms
import numpy as np
import pytest
from mindspore import ops
from support.configs import TINY
from support.configs import model as small_model
from support.gates import gated

from mistral_ms.cli.dryrun import _refuse
from mistral_ms.config import DROPLESS, GateSettings, PredictConfig, RunConfig, TrainingConfig
from mistral_ms.errors import ConfigError
from mistral_ms.inference import Engine
from mistral_ms.layers import CacheSpec
from mistral_ms.mixtures import domains  # noqa: F401  registers its gate
from mistral_ms.mixtures.moeify import registered_gate
from mistral_ms.models import CausalLM, Objective
from mistral_ms.moe import Gate, make_gate, register_gate, try_gates
from mistral_ms.parallel.context import ParallelContext
from mistral_ms.training import TrainStep
from mistral_ms.training.graph_step import GraphTrainStep
from mistral_ms.training.run import TrainingRun
from mistral_ms.weights import ParamSpec, gate_matrix

SHAPES = r"for 5 tokens, K = 2 and E = 7"
SIZES = {"batch": 1, "max_length": 8, "chunk": 8}
TRAINING = TrainingConfig(max_steps=1, seq_length=8, global_batch_size=1)


class FaultySettings(GateSettings):
    name: str = "test_faulty"
    fault: str = "none"


def mean_square(sums, pooled):
    """The mean of its only term."""
    return sums[5][0].sum() / sums[4].sum()


def vector(sums, pooled):
    """Of each layer: no scalar."""
    return sums[4]


@register_gate(FaultySettings)
class FaultyGate(Gate):
    """Top-K of a softmax, but for one fault."""

    statistics = ("squares",)
    losses: ClassVar = {"mean_square": mean_square}

    @classmethod
    def specs(cls, config):
        E = config.moe.num_local_experts
        bias = ParamSpec("bias", ("E",), (E,), decay=False, init="zeros", kind="buffer")
        return (*gate_matrix(config), bias)

    def route(self, x_TH, weights, state, context):
        fault = self.moe.gate.fault
        (weight_EH,), (bias_E,) = weights, state
        logits_TE = self.logits(x_TH, weight_EH) + bias_E
        scores_TE = ops.Softmax(-1)(logits_TE)
        weights_TK, experts_TK = ops.TopK()(scores_TE, self.top_k)
        terms = (logits_TE * logits_TE,)
        if fault == "two results":
            return weights_TK, experts_TK
        if fault == "list":
            return [weights_TK, experts_TK, scores_TE, logits_TE, terms]
        if fault == "half":
            weights_TK = weights_TK.astype(ms.float16)
        if fault == "one choice":
            experts_TK = experts_TK[:, :1]
        if fault == "no logits":
            logits_TE = None
        if fault == "no terms":
            terms = ()
        if fault == "summed term":
            terms = (terms[0].sum(-1),)
        if fault == "equal":
            experts_TK = ops.zeros_like(experts_TK)
        if fault == "beyond":
            experts_TK = experts_TK + self.num_experts
        if fault == "left out":
            experts_TK = ops.full_like(experts_TK, self.num_experts)
        if fault == "python":
            weights_TK = weights_TK + state[1]
        if fault == "operator":
            weights_TK = ops.MatMul()(x_TH, x_TH)
        if fault == "only in training" and context is not None:
            scores_TE = self.normal(context)[:, 1:]
        return weights_TK, experts_TK, scores_TE, logits_TE, terms

    def next_state(self, state, routed_E):
        if self.moe.gate.fault == "forgets":
            return {}
        if self.moe.gate.fault == "summed state":
            return {"bias": state["bias"].sum()}
        return state


def tried(fault, training=True, dtype="float32"):
    config = gated({"name": "test_faulty", "fault": fault}, 2, False)
    gate = make_gate(config, DROPLESS, dtype=dtype)
    try_gates(gate, config, training)
    return gate


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("two results", r"route: 2 results: gives a tuple of weights_TK, experts_TK, scores_TE, "),
        ("list", r"route: list: gives a tuple"),
        ("half", rf"route: weights_TK is Float16 \[5, 2\]: .*Float32 \[5, 2\], {SHAPES}"),
        ("one choice", rf"experts_TK is Int32 \[5, 1\]: is a Tensor of Int32 \[5, 2\], {SHAPES}"),
        ("no logits", rf"logits_TE is NoneType: is a Tensor of Float32 \[5, 7\], {SHAPES}"),
        ("no terms", r"route: 0 terms: the terms are a tuple of those in statistics: squares"),
        ("summed term", rf"the term squares is Float32 \[5\]: .*\[5, 7\], {SHAPES}"),
        ("equal", r"route: experts \[0, 0\]: those of a token are all different"),
        ("beyond", r"experts from \d+ to \d+: experts are 0 to 6, and 7 for a choice left out"),
        ("left out", r"route: a weight: a choice that is left out \(expert 7\) has weight 0"),
        ("python", r"route \(test_contract\.py, line \d+\): IndexError: tuple index out of range"),
        ("operator", r"route \(test_contract\.py, line \d+\): ValueError: .*MatMul"),
        ("only in training", r"scores_TE is Float32 \[5, 6\]"),
        ("forgets", r"next_state: \{\}: gives every buffer, with its shape: \{'bias': \(7,\)\}"),
        ("summed state", r"next_state: \{'bias': \(\)\}"),
    ],
)
def test_a_fault_is_refused(fault, message):
    with pytest.raises(ConfigError, match=f"^broken gate test_faulty: FaultyGate.*{message}"):
        tried(fault)


def test_a_loss_that_is_no_scalar(monkeypatch):
    monkeypatch.setattr(FaultyGate, "losses", {"vector": vector})
    with pytest.raises(ConfigError, match=r"losses\['vector'\]: the loss is Float32 \[2\]"):
        tried("vector")


@pytest.mark.parametrize("fault", ["only in training", "forgets"])
def test_what_generation_does_not_ask(fault):
    tried(fault, training=False)


def test_without_a_fault_in_graph_mode(graph):
    """The trial is not compiled, and leaves the mode and the gate's own parameters alone."""
    gate = tried("none", dtype="float16")
    assert ms.get_context("mode") == ms.GRAPH_MODE
    assert not np.any(gate.weight.asnumpy())


def model(fault, **options):
    moe = {"gate": {"name": "test_faulty", "fault": fault}}
    return CausalLM(small_model(**TINY | {"num_hidden_layers": 1}, moe=moe), **options)


def run(fault, **changes):
    moe = {"gate": {"name": "test_faulty", "fault": fault}}
    config = small_model(**TINY | {"num_hidden_layers": 1}, moe=moe)
    return RunConfig(model=config, training=TRAINING, **changes)


def in_graph(fault):
    one = run(fault, parallel={"execution": "graph"})
    return GraphTrainStep(one, ParallelContext(one.parallel), segmented=False)


@pytest.mark.parametrize("build", [
    lambda: in_graph("only in training"),
    lambda: _refuse(run("only in training"), None),
    lambda: _refuse(PredictConfig(model=run("list").model, prediction=SIZES), None),
    lambda: TrainStep(Objective(model("only in training")), TRAINING),
    lambda: Engine(model("two results", cache=CacheSpec(1, 8)), max_length=8, chunk=8),
    lambda: registered_gate({"name": "test_faulty", "fault": "two results"}, 6, 4, 2, False,
                            DROPLESS, 0),
])  # fmt: skip
def test_whoever_compiles_a_gate_asks(build):
    with pytest.raises(ConfigError, match="broken gate test_faulty"):
        build()


@pytest.mark.parametrize("execution", ["explicit", "graph"])
def test_a_training_asks_before_it_reads_data(execution, tmp_path):
    one = run("one choice", parallel={"execution": execution})
    with pytest.raises(ConfigError, match=r"broken gate test_faulty: FaultyGate\.route"):
        TrainingRun(one, tmp_path / "out", resume=False, say=print)
