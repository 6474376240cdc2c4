"""The auto-parallel graph on one device means what the model of one process means."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from support import configs

from mistral_ms.config import IGNORE_INDEX, RunConfig
from mistral_ms.models import CausalLM, Objective
from mistral_ms.parallel import graph
from mistral_ms.training.modes import graph_mode

B, S = 3, 16
AUX, Z = 0.05, 0.01


def run(moe=None, routing=None, parallel=None, **changes):
    """Capacity routing that drops choices, aux and z losses that matter."""
    return RunConfig(
        model=configs.model(num_hidden_layers=3, moe=moe, **changes),
        routing={
            "policy": "capacity",
            "capacity_factor": 0.9,
            "aux_loss": "per_layer",
            **(routing or {}),
        },
        training={
            "steps": 1,
            "seq_length": S,
            "global_batch_size": B,
            "aux_coef": AUX,
            "z_coef": Z,
            "clip_norm": 0.5,
        },
        parallel=parallel or {},
    )


def batch(config):
    """Padding at the end of two rows, two documents in one, labels that do not count."""
    random = np.random.default_rng(3)
    ids = random.integers(0, config.vocab_size, (B, S), dtype=np.int32)
    labels = random.integers(0, config.vocab_size, (B, S), dtype=np.int32)
    positions = np.tile(np.arange(S, dtype=np.int32), (B, 1))
    segments = np.zeros((B, S), np.int32)
    positions[0, 12:] = positions[2, 15:] = -1
    segments[1, 9:] = 1
    labels[random.random((B, S)) < 0.2] = IGNORE_INDEX
    labels[positions < 0] = IGNORE_INDEX
    return ids, labels, positions, segments


def weights_in_graph(name, values):
    """The graph keeps experts as matrices, w1 and w3 of them transposed."""
    if name.endswith((".w1", ".w3")) and values.ndim == 3:
        values = values.transpose(0, 2, 1)
    return values.reshape(-1, values.shape[-1]) if values.ndim == 3 else values


def build(config):
    """Both models with the same weights."""
    ours = CausalLM(config.model, config.routing, positions=S)
    ours.initialize(7)
    for parameter in ours.weights().values():  # larger weights make routing less even
        parameter.set_data(parameter * (4.0 if parameter.ndim > 1 else 1.0))
    step = graph.build(config)
    parameters = dict(step.model.parameters_and_names())
    assert set(parameters) == set(ours.weights())
    for name, parameter in ours.weights().items():
        parameters[name].init_data()
        parameters[name].set_data(Tensor(weights_in_graph(name, parameter.asnumpy())))
    for parameter in step.cell.get_parameters():
        parameter.init_data()
    return ours, step


def both_gradients(config, scale=1.0):
    ours, step = build(config)
    arrays = batch(config.model)
    tensors = [Tensor(each) for each in arrays]
    objective = Objective(ours, aux_coef=AUX, z_coef=Z, pooled_aux=False)
    expected = ms.value_and_grad(objective, None, ms.ParameterTuple(ours.weights().values()), True)
    net = step.model
    shares = np.array([1 / (arrays[1] != IGNORE_INDEX).sum(), 1 / (arrays[2] >= 0).sum(), scale])
    inputs = (*tensors, Tensor(np.tile(shares.astype(np.float32), (B, 1))))
    parameters = dict(net.parameters_and_names())
    in_order = ms.ParameterTuple(parameters[name] for name in ours.weights())
    got = ms.value_and_grad(net, None, in_order)
    with graph_mode():
        (_, parts), wanted = expected(*tensors)
        loss, gradients = got(*inputs)
    named = {
        name: (mine.asnumpy(), weights_in_graph(name, theirs.asnumpy()))
        for name, mine, theirs in zip(ours.weights(), gradients, wanted, strict=True)
    }
    return float(loss), [part.asnumpy() for part in parts], named


CASES = {
    "sparse": {},
    "dense": {"moe": None},
    "every other layer": {"moe": {"sparse_layers": "every_other"}},
    "window": {"sliding_window": 5},
    "choice-major, rescaled": {
        "routing": {"drop_priority": "choice_major", "rescale_survivors": True}
    },
}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_one_process(case):
    changes = dict(CASES[case])
    changes.setdefault("moe", {})
    loss, parts, gradients = both_gradients(run(**changes), scale=8.0)
    # float32 sums in another order
    assert loss == pytest.approx(8.0 * float(parts[0]), rel=1e-6)
    if changes["moe"] is not None:
        routed, kept = parts[3], parts[4]
        assert kept.sum() < routed.sum()  # capacity has turned choices away
    for name, (mine, theirs) in gradients.items():
        error = np.abs(mine / 8.0 - theirs).max()
        assert error <= 1e-5 * np.abs(theirs).max(), name
