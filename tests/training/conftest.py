"""A model small enough to train in a second, and a text that it can learn."""

from collections import defaultdict
from dataclasses import dataclass

import mindspore as ms
import numpy as np
import pytest
from support.configs import TINY

from mistral_ms.config import (
    ModelConfig,
    MoEArchitecture,
    OptimizerConfig,
    RoutingConfig,
    TrainingConfig,
)
from mistral_ms.datasets import InMemorySequences
from mistral_ms.models import CausalLM
from mistral_ms.optimizers import with_settings
from mistral_ms.training import Progress, TrainStep, make_objective
from mistral_ms.training.loss_scale import LossScale


@pytest.fixture(scope="session")
def sparse():
    return ModelConfig(**TINY, moe=MoEArchitecture(num_local_experts=4))


@pytest.fixture(scope="session")
def dense():
    return ModelConfig(**TINY)


@pytest.fixture(scope="session")
def capacity():
    return RoutingConfig(policy="capacity", capacity_factor=1.1)


@pytest.fixture(scope="session")
def training():
    return TrainingConfig(
        max_steps=6,
        seq_length=8,
        global_batch_size=4,
        router_aux_loss_coef=0.02,
        router_z_loss_coef=0.001,
        optimizer=OptimizerConfig(learning_rate=1e-2, weight_decay=0.1),
        warmup_steps=2,
    )


@pytest.fixture(scope="session")
def text():
    """61 tokens: seven sequences of eight, and one of four."""
    return np.random.default_rng(3).integers(3, 48, 61).tolist()


@pytest.fixture(scope="session")
def make_model():
    def make(config, routing, seed=0):
        model = CausalLM(config, routing)
        model.initialize(seed)
        return model

    return make


@dataclass
class Compiled:
    """A training that a test is done with, and what it began with."""

    update: TrainStep
    optimizer: object
    first: dict[str, np.ndarray]

    def begin_again(self) -> TrainStep:
        """Weights and state in place, since graphs have been compiled with them."""
        held = {**self.update.held(), **self.update.state()}
        for name, value in self.first.items():
            ms.ops.assign(held[name], ms.Tensor(value))
        self.update.progress = Progress(scale=LossScale.start(self.update.config.scaling))
        self.update.restored()
        return self.update


GIVEN = {
    "max_steps": True, "warmup_steps": True, "lr_scheduler_type": True, "min_lr_ratio": True,
    "loss_scale": True, "optimizer": {"learning_rate"},
}  # fmt: skip
"""Settings that a compiled step is given as numbers, or that only the host looks at."""


@pytest.fixture(scope="session")
def compiled():
    """Trainings that earlier tests have compiled, by the settings that were compiled."""
    return defaultdict(list)


@pytest.fixture
def make_update(compiled, sparse, capacity, training):
    """A step of the sparse model's training, with some of its settings changed. Compiling takes
    much longer than a training, so a test may get what an earlier one has used, as it was at first
    (but for optimizers on the host, whose graphs hold copies of their own). What one test makes at
    the same time are different ones.
    """
    lent = []

    def make(layers=1, **changes):
        config = TrainingConfig(**training.model_dump() | changes)
        key = layers, config.model_dump_json(exclude=GIVEN)
        if compiled[key]:
            entry = compiled[key].pop()
            entry.update.config = with_settings(config)
            entry.begin_again()
        else:
            architecture = sparse.model_copy(update={"num_hidden_layers": layers})
            model = CausalLM(architecture, capacity, dtype=config.dtype)
            model.initialize(config.seed)
            update = TrainStep(make_objective(model, config), config)
            held = {**update.held(), **update.state()}
            first = {name: value.asnumpy().copy() for name, value in held.items()}
            entry = Compiled(update, update.optimizer, first)
        lent.append((key, entry))
        return entry.update

    yield make
    for key, entry in lent:
        same = entry.update.optimizer is entry.optimizer
        if same and entry.update.config.offload_optimizer == "none":
            compiled[key].append(entry)


@pytest.fixture
def data(training, text):
    return InMemorySequences(text, training.seq_length, training.global_batch_size, training.seed)


@pytest.fixture(scope="module")
def strict_graphs():
    """Nothing in a graph may fall back to the Python interpreter."""
    before = ms.get_context("jit_syntax_level")
    ms.set_context(jit_syntax_level=ms.STRICT)
    yield
    ms.set_context(jit_syntax_level=before)
