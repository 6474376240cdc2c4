"""The auto-parallel graph on one device means what the model of one process means."""

from typing import NamedTuple

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, ops
from support import configs

from mistral_ms.config import IGNORE_INDEX, RunConfig
from mistral_ms.mixtures import domains  # noqa: F401 - the gate random_routed
from mistral_ms.models import CausalLM, Objective
from mistral_ms.ops.modes import graph_mode
from mistral_ms.parallel import graph

B, S = 3, 16
AUX, Z = 0.05, 0.01
NO_NOISE = Tensor(np.zeros((B, 3), np.int32))
OF_DOMAINS = Tensor(np.array([[0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 2, 0]], np.int32))
"""The same of rows that are of domains, by the fourth column."""


def run(moe=None, routing=None, parallel=None, **changes):
    """Capacity routing that drops choices, aux and z losses that matter."""
    return RunConfig(
        model=configs.model(**{"num_hidden_layers": 2, "moe": moe, **changes}),
        routing={
            "policy": "capacity",
            "capacity_factor": 0.9,
            "aux_loss": "per_layer",
            **(routing or {}),
        },
        training={
            "max_steps": 1,
            "seq_length": S,
            "global_batch_size": B,
            "router_aux_loss_coef": AUX,
            "router_z_loss_coef": Z,
            "max_grad_norm": 0.5,
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
    for name, parameter in ours.weights().items():  # larger weights make routing less even
        larger = parameter.ndim > 1 and ours.specs[name].kind != "buffer"
        parameter.set_data(parameter * (4.0 if larger else 1.0))
    step = graph.build(config)
    parameters = step.model.weights()
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
    pooled = config.routing.aux_loss == "pooled"
    random = OF_DOMAINS if ours.row_domains > 1 else NO_NOISE
    objective = Objective(ours, router_aux_loss_coef=AUX, router_z_loss_coef=Z, pooled_aux=pooled)
    expected = ms.value_and_grad(objective, None, ms.ParameterTuple(ours.weights().values()), True)
    net = step.model
    scales = np.array([1 / (arrays[1] != IGNORE_INDEX).sum(), 1 / (arrays[2] >= 0).sum(), scale])
    inputs = (*tensors, Tensor(np.tile(scales.astype(np.float32), (B, 1))), random)
    parameters, metrics_buffers = net.weights(), net.metrics_buffers()
    in_order = [parameters[name] for name in ours.weights()]
    got = ms.value_and_grad(net, None, ms.ParameterTuple((*in_order, *metrics_buffers.values())))
    with graph_mode():
        (_, parts), wanted = expected(*tensors, None, random if ours.row_domains > 1 else None)
        loss, gradients = got(*inputs)
    named = {
        name: (mine.asnumpy(), weights_in_graph(name, theirs.asnumpy()))
        for name, mine, theirs in zip(ours.weights(), gradients, wanted, strict=False)
    }
    metrics = [each.asnumpy()[0] for each in gradients[len(in_order) :]]
    recorded = dict(zip(metrics_buffers, metrics, strict=True))
    return float(loss), [part.asnumpy() for part in parts], named, recorded


CASES = {
    "choice-major by sequences, rescaled, a dense expert beside": {
        "moe": {"n_shared_experts": 1, "shared_expert_gate": "softmax_pair"},
        "routing": {
            "drop_priority": "choice_major",
            "rescale_survivors": True,
            "capacity_group": "sequence",
            "aux_scope": 8,
            "aux_choices": "top_scores",
        },
    },
    "experts choose": {
        "routing": {
            "policy": "experts_choose",
            "allow_future": True,
            "rescale_survivors": True,
            "capacity_factor": 0.5,
        },
        "num_hidden_layers": 1,
    },
    "dropless, pooled aux, embedding and head tied, norms of heads": {
        "qk_norm": "head",
        "routing": {"policy": "dropless", "aux_loss": "pooled"},
        "tie_word_embeddings": True,
    },
    "by ids and domains in one layer, all kinds of others; window in the other, yarn": {
        "moe": {
            "num_experts_per_tok": 1,
            "norm_topk_prob": False,
            "gate": {"name": "random_routed", "domains": 2},
            "sparse_layers": "every_other",
            "moe_intermediate_size": 32,
            "n_shared_experts": 2,
            "shared_expert_gate": "sigmoid",
            "extra_feed_forward": "both",
        },
        "sliding_window": 5,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "dense, norms over all heads, biases": {
        "moe": None,
        "num_hidden_layers": 1,
        "qk_norm": "full",
        "qkv_bias": True,
    },
}


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_are_those_of_one_process(case):
    changes = dict(CASES[case])
    changes.setdefault("moe", {})
    config = run(**changes)
    loss, parts, gradients, recorded = both_gradients(config, scale=8.0)
    # float32 sums in another order
    assert loss == pytest.approx(8.0 * float(parts[0]), rel=1e-6)
    assert recorded.pop(None)[0] == pytest.approx(float(parts[0]), rel=1e-6)
    assert tuple(recorded) == config.model.sparse_layers
    if changes["moe"] is not None:
        routed, kept = parts[3], parts[4]
        dropped = routed.sum() - kept.sum()
        assert (dropped > 0) == (config.routing.policy != "dropless")
        metrics = np.stack(list(recorded.values()))
        losses, counts = metrics[:, :2].sum(0) / len(recorded), metrics[:, 2:]
        np.testing.assert_allclose(losses, [parts[1], parts[2]], rtol=1e-6)
        np.testing.assert_array_equal(counts, np.concatenate([routed, kept], 1))
    for name, (mine, theirs) in gradients.items():
        error = np.abs(mine / 8.0 - theirs).max()
        assert error <= 1e-5 * np.abs(theirs).max(), name


RATE, DECAY = 1e-2, 0.1


class Stepped(NamedTuple):
    """A first update: weights and means, and the norm that it saw."""

    before: list[np.ndarray]
    after: list[np.ndarray]
    gradients: list[np.ndarray]
    seen: float
    squares: list[float]


@pytest.fixture(scope="module")
def steps():
    """A step whose gradients are not finite, then one whose are, of the same cell."""
    config, scale = run(num_hidden_layers=1), 16.0
    _, step = build(config)
    arrays = batch(config.model)
    weights = step.cell.weights
    update = step.cell.weight_update
    kept = update.state()
    means = [kept[f"{kind}.{name}"] for kind in ("exp_avg", "exp_avg_sq") for name in update.names]
    state = (*weights, *means)
    coefficients = update.plan.coefficients(0, RATE)
    for setting, value in zip(step.cell.coefficients, coefficients, strict=True):
        ops.assign(setting, Tensor(value))
    ops.assign(step.cell.unscale, Tensor(1 / scale, ms.float32))
    gradient = ms.grad(step.model, None, weights)
    found = []
    for share in (np.nan, 1 / (arrays[1] != IGNORE_INDEX).sum()):
        scales = np.array([share, 1 / (arrays[2] >= 0).sum(), scale], np.float32)
        inputs = [*map(Tensor, arrays), Tensor(np.tile(scales, (B, 1))), NO_NOISE]
        before = [each.asnumpy().copy() for each in state]
        with graph_mode():
            gradients = [each.asnumpy().astype(np.float64) / scale for each in gradient(*inputs)]
            step.cell(*inputs)
        after = [each.asnumpy().copy() for each in state]
        squares = [float(each[0]) for each in step.cell.norm.squares]
        found.append(Stepped(before, after, gradients, float(step.cell.norm_seen[0]), squares))
    return found


def test_gradients_that_are_not_finite_change_nothing(steps):
    poisoned = steps[0]
    assert np.isnan(poisoned.seen)
    for old, new in zip(poisoned.before, poisoned.after, strict=True):
        np.testing.assert_array_equal(new, old)


def test_an_update_is_adamw_with_clipping(steps):
    before, after, gradients, seen, squares = steps[1]
    norm = np.sqrt(sum((each**2).sum() for each in gradients))
    assert norm > 0.5  # clipped
    assert seen == pytest.approx(norm, rel=1e-5)
    of_weights = [16.0 * np.linalg.norm(each) for each in gradients]  # with the loss scale
    np.testing.assert_allclose(np.sqrt(squares), of_weights, rtol=1e-5)
    count = len(gradients)
    for old, new, mean, gradient in zip(before, after, after[count:], gradients, strict=False):
        clipped = gradient * 0.5 / (norm + 1e-6)
        np.testing.assert_allclose(mean, 0.1 * clipped, rtol=2e-5, atol=1e-9)
        # the first update: both bias-corrected means are those of one gradient
        old = old * (1 - RATE * DECAY) if old.ndim > 1 else old
        expected = old - RATE * clipped / (np.abs(clipped) + 1e-8)
        # gradients near eps: float32 noise of 1e-9 decides the direction
        large = np.abs(clipped) > 1e-6
        np.testing.assert_allclose(new[large], expected[large], rtol=1e-5, atol=2e-6)
