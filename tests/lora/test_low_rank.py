"""Products with adapters against loops in NumPy, their gradients against finite differences."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mistral_ms.config import DROPLESS, LoraConfig, ModelConfig, ParallelConfig
from mistral_ms.layers import LowRankGroupedLinear, LowRankLinear
from mistral_ms.models.layer_factory import LayerFactory
from mistral_ms.moe import AdaptedTransposedExperts, Experts
from mistral_ms.ops.reference_cells import (
    ReferenceBatchedLinear,
    ReferenceGroupedLinear,
    ReferenceLinear,
)
from mistral_ms.parallel.graph.layer_factory import GraphLayerFactory

E, R, I, O, SCALING = 3, 2, 5, 4, 0.75  # noqa: E741
SIZES = (2, 0, 3)
"""Rows of each expert; two more belong to none."""


def drawn(*shape, seed):
    return np.random.default_rng(seed).standard_normal(shape)


class Case:
    """One way to multiply, with random numbers: the cell, its inputs, and the formula in loops."""

    def __init__(self, kind, decomposed):
        stack = () if kind == "linear" else (E,)
        self.kind, self.decomposed = kind, decomposed
        rows = {"linear": (6,), "batched": (E, 6), "grouped": (sum(SIZES) + 2,)}[kind]
        self.x, self.w = drawn(*rows, I, seed=0), drawn(*stack, O, I, seed=1)
        shapes = [(*stack, R, I), (*stack, O, R), (*stack, O)][: 3 if decomposed else 2]
        self.parameters = [drawn(*shape, seed=2 + n) for n, shape in enumerate(shapes)]
        product = {
            "linear": ReferenceLinear, "batched": ReferenceBatchedLinear,
            "grouped": ReferenceGroupedLinear,
        }[kind]()  # fmt: skip
        cell = LowRankGroupedLinear if kind == "grouped" else LowRankLinear
        self.cell = cell(product, tuple(shapes), SCALING)
        self.held = [self.cell.lora_A, self.cell.lora_B]
        if decomposed:
            self.held.append(self.cell.lora_magnitude)
        for parameter, values in zip(self.held, self.parameters, strict=True):
            parameter.set_data(Tensor(values.astype(np.float32)))

    def inputs(self):
        sizes = (Tensor(np.array(SIZES, np.int32)),) if self.kind == "grouped" else ()
        return Tensor(self.x.astype(np.float32)), Tensor(self.w.astype(np.float32)), *sizes

    def formula(self, parameters, lengths=None):
        """In float64, row by row; ``lengths`` are a constant where gradients are taken."""
        a, b, *m = parameters
        stacked = self.kind != "linear"
        one = lambda each, e: each[e] if stacked else each  # noqa: E731

        def matrix(e):
            changed = one(self.w, e) + SCALING * one(b, e) @ one(a, e)
            if m:
                length = np.linalg.norm(changed, axis=1) if lengths is None else lengths[e]
                changed = changed * (one(m[0], e) / length)[:, None]
            return changed

        if self.kind == "linear":
            return np.stack([matrix(0) @ row for row in self.x])
        if self.kind == "batched":
            return np.stack([[matrix(e) @ row for row in self.x[e]] for e in range(E)])
        experts = [e for e, size in enumerate(SIZES) for _ in range(size)]
        y = np.zeros((len(self.x), O))
        for number, e in enumerate(experts):
            y[number] = matrix(e) @ self.x[number]
        return y

    def lengths(self):
        a, b = self.parameters[:2]
        changed = (self.w + SCALING * b @ a).reshape(-1, O, I)
        return np.linalg.norm(changed, axis=-1)


@pytest.fixture(params=["linear", "batched", "grouped"])
def kind(request):
    return request.param


@pytest.mark.parametrize("decomposed", [False, True])
def test_values(kind, decomposed):
    case = Case(kind, decomposed)
    y = case.cell(*case.inputs()).asnumpy()
    np.testing.assert_allclose(y, case.formula(case.parameters), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("decomposed", [False, True])
def test_gradients(mode, kind, decomposed):
    """Along a random direction of each parameter, by differences in float64."""
    case = Case(kind, decomposed)
    weights = drawn(*case.formula(case.parameters).shape, seed=9)
    factor = Tensor(weights.astype(np.float32))
    inputs = case.inputs()

    def loss():
        return (case.cell(*inputs) * factor).sum()

    gradients = ms.grad(loss, None, ms.ParameterTuple(case.held))()
    lengths, step = case.lengths(), 1e-5
    for number, gradient in enumerate(gradients):
        direction = drawn(*case.parameters[number].shape, seed=20 + number)
        found = []
        for sign in (1, -1):
            moved = list(case.parameters)
            moved[number] = moved[number] + sign * step * direction
            found.append((case.formula(moved, lengths) * weights).sum())
        wanted = (found[0] - found[1]) / (2 * step)
        # float32 sums of some dozens of numbers
        assert (gradient.asnumpy() * direction).sum() == pytest.approx(wanted, rel=1e-4, abs=1e-4)
        assert abs(wanted) > 1e-2


def test_the_weight_has_no_part_in_the_magnitude():
    """The length counts as a constant: the gradient of W is that of a product scaled row by row."""
    case = Case("linear", True)
    x, w = case.inputs()

    def total(weight):
        return case.cell(x, weight).sum()

    gradient = ms.grad(total)(w).asnumpy()
    rows = case.parameters[2] / case.lengths()[0]
    np.testing.assert_allclose(gradient, np.outer(rows, case.x.sum(0)), rtol=1e-4, atol=1e-5)


MODEL = ModelConfig(
    vocab_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    num_key_value_heads=2, moe={"num_local_experts": E},
)  # fmt: skip


def filled(cell, seed):
    """Its parameters drawn, by name."""
    for number, parameter in enumerate(cell.trainable_params()):
        values = 0.3 * drawn(*parameter.shape, seed=seed + number)
        parameter.set_data(Tensor(values.astype(np.float32)))
    return {name: parameter for name, parameter in cell.parameters_and_names()}


@pytest.mark.parametrize("adapted", [("w1", "w3", "w2"), ("w2",), ("w1",)], ids="-".join)
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
def test_experts_of_the_graph(packed, adapted):
    """Matrices and adapters that are handed in, against the cells of explicit execution."""
    H, I = MODEL.hidden_size, MODEL.intermediate_size  # noqa: E741
    experts = Experts(MODEL, packed=packed)
    for name in adapted:
        O, N = (H, I) if name == "w2" else (I, H)  # noqa: E741
        kind = LowRankGroupedLinear if packed else LowRankLinear
        shapes = (E, R, N), (E, O, R)
        setattr(experts, f"{name}_linear", kind(experts.product("float32"), shapes, SCALING))
    held = filled(experts, 10)
    order = "w1", "w3", "w2"
    w1, w3, w2 = (held[name] for name in order)
    scalings = tuple(SCALING if name in adapted else None for name in order)
    other = AdaptedTransposedExperts("float32", packed, scalings)
    parts = [f"{name}_linear.lora_{each}" for name in order for each in "AB"]
    low = [held.get(name, Tensor(np.zeros((1, 1), np.float32))) for name in parts]
    rows = (sum(SIZES) + 2,) if packed else (E, 4)
    x = drawn(*rows, H, seed=3).astype(np.float32)
    if packed:
        x[sum(SIZES) :] = 0  # as dispatchers leave them
    factors = Tensor(drawn(*rows, H, seed=4).astype(np.float32))
    sizes = Tensor(np.array(SIZES, np.int32)) if packed else None

    def explicit(x):
        return (experts.compute(x, sizes) * factors).sum()

    def graph(x):
        turned = (each.transpose(0, 2, 1) for each in (w1, w3))
        lies = []
        for name, each in zip(parts, low, strict=True):  # B of w1 and w3 as [E * r, I]
            upright = name.endswith("A") or name.startswith("w2") or name not in held
            each = each if upright else each.transpose(0, 2, 1)
            lies.append(each.reshape(-1, each.shape[-1]))
        return (other(x, *turned, w2, sizes, tuple(lies)) * factors).sum()

    trained = [held[name] for name in parts if name in held]
    found, wanted = (ms.value_and_grad(each, 0, trained)(Tensor(x)) for each in (graph, explicit))
    np.testing.assert_allclose(found[0].asnumpy(), wanted[0].asnumpy(), rtol=1e-5)
    for one, two in zip((found[1][0], *found[1][1]), (wanted[1][0], *wanted[1][1]), strict=True):
        assert np.abs(two.asnumpy()).max() > 0
        # sums of float32 in another order
        np.testing.assert_allclose(one.asnumpy(), two.asnumpy(), rtol=1e-4, atol=1e-5)


def test_a_dense_feed_forward_of_the_graph():
    """Its products beside adapters, against the cell of explicit execution."""
    config = MODEL.model_copy(
        update={"moe": None, "lora": LoraConfig(target_modules=["gate_proj", "up_proj"])}
    )
    H, I = config.hidden_size, config.intermediate_size  # noqa: E741
    made = [
        LayerFactory(config, DROPLESS),
        GraphLayerFactory(config, DROPLESS, ParallelConfig(), "float32", sequence=8),
    ]
    x, found = Tensor(drawn(6, H, seed=3).astype(np.float32)), []
    for factory in made:
        piece = factory.feed_forward()
        for name in ("w1_linear", "w3_linear"):
            shapes = (R, H), (I, R)
            setattr(piece.gated, name, factory.low_rank(piece.gated, name, shapes, SCALING))
        held = filled(piece, 10)
        trained = [held[name] for name in sorted(held) if ".lora_" in name]
        assert len(trained) == 4
        y, gradients = ms.value_and_grad(lambda x, cell=piece: cell(x).sum(), 0, trained)(x)
        found.append([y.asnumpy(), gradients[0].asnumpy(), *(g.asnumpy() for g in gradients[1])])
    for one, two in zip(*found, strict=True):
        # the same products
        np.testing.assert_allclose(one, two, rtol=1e-5, atol=1e-6)
