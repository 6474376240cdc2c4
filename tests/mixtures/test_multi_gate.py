"""MMoE against NumPy, by its symmetries, and its data by what is known of them."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mistral_ms.errors import ConfigError
from mistral_ms.mixtures.multi_gate import MultiGateMixture, RelatedTasks, SharedBottom, as_wide

I, E, U, TASKS, H, B = 6, 4, 5, 3, 2, 9  # noqa: E741
CLOSE = dict(rtol=1e-5, atol=1e-6)
"""Float32 sums of tens of terms of size one; MindSpore's exp is good to 6e-6."""


def mixture(one_gate=False, seed=1):
    """With biases that are not zero, or a wrong one would not be seen."""
    model, rng = MultiGateMixture(I, E, U, TASKS, H, seed, one_gate), np.random.default_rng(2)
    for parameter in model.get_parameters():
        if parameter.ndim == 1:
            parameter.set_data(Tensor(rng.normal(0, 1, parameter.shape).astype(np.float32)))
    return model


@pytest.fixture
def x():
    return np.random.default_rng(0).normal(0, 1, (B, I)).astype(np.float32)


def tower(model, k, mixed):
    first, last = model.towers.hidden[k], model.towers.out[k]
    hidden = np.maximum(mixed @ first.weight.asnumpy() + first.bias.asnumpy(), 0)
    return hidden @ last.weight.asnumpy() + last.bias.asnumpy()


def by_rows(model, x):
    """Equations 6 to 8, a row, a task and an expert at a time."""
    weight = model.experts.weight.asnumpy().reshape(I, E, U)
    bias = model.experts.bias.asnumpy().reshape(E, U)
    found = np.zeros((B, TASKS))
    for b in range(B):
        for k in range(TASKS):
            logits = x[b] @ model.gates[k % len(model.gates)].asnumpy()
            p = np.exp(logits) / np.exp(logits).sum()
            mixed = np.zeros(U)
            for e in range(E):
                mixed += p[e] * np.maximum(x[b] @ weight[:, e] + bias[e], 0)
            found[b, k] = tower(model, k, mixed)[0]
    return found


@pytest.mark.parametrize("one_gate", [False, True])
def test_the_equations(one_gate, x, mode):
    model = mixture(one_gate)
    np.testing.assert_allclose(model(Tensor(x)).asnumpy(), by_rows(model, x), **CLOSE)


def test_the_order_of_experts_means_nothing(x):
    """Experts permuted together with the columns of all gates: the same outputs."""
    model, order = mixture(), np.array([2, 0, 3, 1])
    before = model(Tensor(x)).asnumpy()

    def put(parameter, values):
        parameter.set_data(Tensor(np.ascontiguousarray(values)))

    experts = model.experts
    put(experts.weight, experts.weight.asnumpy().reshape(I, E, U)[:, order].reshape(I, -1))
    put(experts.bias, experts.bias.asnumpy().reshape(E, U)[order].reshape(-1))
    # the experts alone: another function, so that the test below can fail
    assert np.abs(model(Tensor(x)).asnumpy() - before).max() > 0.01
    for gate in model.gates:
        put(gate, gate.asnumpy()[:, order])
    np.testing.assert_allclose(model(Tensor(x)).asnumpy(), before, **CLOSE)


def test_with_equal_gates_it_is_omoe(x):
    one, many = mixture(one_gate=True), mixture()
    theirs = {p.name: p for p in many.get_parameters()}
    for parameter in one.get_parameters():
        theirs[parameter.name].set_data(parameter)
    assert np.abs(many(Tensor(x)).asnumpy() - one(Tensor(x)).asnumpy()).max() > 0.01
    for gate in many.gates:
        gate.set_data(one.gates[0])
    np.testing.assert_array_equal(many(Tensor(x)).asnumpy(), one(Tensor(x)).asnumpy())


def test_with_one_expert_it_is_the_shared_bottom(x):
    model, bottom = MultiGateMixture(I, 1, U, TASKS, H, 3), SharedBottom(I, U, TASKS, H, 4)
    for ours, theirs in ((bottom.bottom, model.experts), (bottom.towers, model.towers)):
        for mine, other in zip(ours.get_parameters(), theirs.get_parameters(), strict=True):
            mine.set_data(other)
    # softmax of one number is 1
    np.testing.assert_allclose(bottom(Tensor(x)).asnumpy(), model(Tensor(x)).asnumpy(), **CLOSE)


@pytest.mark.parametrize("task", range(TASKS))
def test_a_task_moves_its_own_gate_and_tower_only(x, task):
    """The gradient of task k's loss is exactly zero for gates and towers of others."""
    model = mixture()
    parameters = model.trainable_params()
    grads = ms.grad(lambda x: model(x)[:, task].sum(), None, parameters)(Tensor(x))
    moved = {p.name for p, g in zip(parameters, grads, strict=True) if np.any(g.asnumpy())}
    own = {f"gates.{task}", "experts.weight", "experts.bias"}
    own |= {f"towers.{c}.{task}.{w}" for c in ("hidden", "out") for w in ("weight", "bias")}
    assert moved == own


def test_a_shared_bottom_as_wide_as_the_papers():
    """100 inputs, 8 experts of 16, towers of 8: the two sizes are within half a unit's parameters.

    The paper has 113 units, which leaves gates and biases out: 8 * 16 * 100 / (100 + 16) = 110 and
    some.
    """
    units = as_wide(100, 8, 16, 2, 8)
    sizes = [
        sum(p.size for p in model.get_parameters())
        for model in (SharedBottom(100, units, 2, 8, 0), MultiGateMixture(100, 8, 16, 2, 8, 0))
    ]
    assert abs(sizes[0] - sizes[1]) <= (101 + 2 * 8) / 2


@pytest.mark.parametrize("p", [-1.0, 0.0, 0.5, 1.0])
def test_weights_of_the_data(p):
    tasks = RelatedTasks(p, input_size=20, scale=3.0)
    w1, w2 = tasks.weights()
    np.testing.assert_allclose([w1 @ w1, w2 @ w2, w1 @ w2], [9, 9, 9 * p], atol=1e-12)


def test_labels_of_the_data():
    """Without noise the labels are the formula's; noise has its deviation; p moves correlation."""
    quiet = RelatedTasks(0.5, input_size=20, noise=0.0)
    x, y = quiet.sample(50, seed=3)
    for n in range(50):
        for k, w in enumerate(quiet.weights()):
            z = float(x[n].astype(float) @ w)
            want = z + sum(np.sin((i + 1) * z + i * np.pi / 3) for i in range(4))
            assert abs(y[n, k] - want) < 1e-5  # x was rounded to float32
    loud = RelatedTasks(0.5, input_size=20, noise=0.3)
    np.testing.assert_array_equal(loud.sample(4000, seed=3)[0][:50], loud.sample(4000, 3)[0][:50])
    noise = loud.sample(4000, 5)[1] - RelatedTasks(0.5, 20, noise=0.0).sample(4000, 5)[1]
    assert abs(noise.std() - 0.3) < 0.3 * 4 / 8000**0.5 * 2  # four standard errors of a deviation
    found = [
        np.corrcoef(RelatedTasks(p, input_size=20).sample(4000, 1)[1].T)[0, 1]
        for p in (0.0, 0.5, 0.9, 1.0)
    ]
    assert abs(found[0]) < 4 / 4000**0.5  # four standard errors
    assert found == sorted(found)
    assert found[-1] > 0.98


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match=r"impossible data: correlation: 1\.5: -1 to 1"):
        RelatedTasks(1.5)
    with pytest.raises(ConfigError, match="betas: 1 numbers: each sine has an alpha and a beta"):
        RelatedTasks(0.5, betas=(0.0,))
    with pytest.raises(ConfigError, match="impossible size: tasks: 0"):
        MultiGateMixture(I, E, U, 0, H, 0)
