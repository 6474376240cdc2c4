"""Products with experts in int8 and int4, against float64 of the dequantised matrices."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mistral_ms.ops import cpu, select_cpu

needs_compiler = pytest.mark.skipif(cpu.why_missing() is not None, reason=str(cpu.why_missing()))
KERNELS = ["reference", pytest.param("cpu", marks=needs_compiler)]


def stored(rng, weights, shape, groups, exact=False):
    """Codes and scales as they are stored, and the matrices that they stand for, number by
    number.
    """
    largest = 127 if weights == "int8" else 7
    codes = rng.integers(-largest, largest + 1, shape)
    scales = 2.0 ** rng.integers(-4, 4, (*shape[:2], groups))
    if not exact:
        scales *= rng.uniform(0.5, 1.0, scales.shape)
    scales = scales.astype(np.float32)
    wide = np.zeros(shape)
    for at in np.ndindex(*shape):
        wide[at] = float(codes[at]) * float(scales[at[0], at[1], at[2] * groups // shape[2]])
    if weights == "int8":
        return codes.astype(np.int8), scales, wide
    packed = np.zeros((*shape[:2], shape[2] // 2), np.uint8)
    for e, o, i in np.ndindex(*shape):
        packed[e, o, i // 2] |= (codes[e, o, i] + 8) << (4 * (i % 2))
    return packed, scales, wide


# groups of few rows, of none, of more; rows behind the last one give zero
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("weights", "groups"), [("int8", 1), ("int4", 1), ("int4", 3)])
@pytest.mark.parametrize("exact", [True, False])
def test_grouped_linear(kernels, weights, groups, exact):
    sizes, R, O, I = [3, 0, 9, 4], 20, 70, 108  # noqa: E741
    rng = np.random.default_rng(0)
    codes, scales, wide = stored(rng, weights, (len(sizes), O, I), groups, exact)
    x = rng.standard_normal((R, I)).astype(np.float32)
    if exact:
        x = np.rint(4 * x)
    wanted, first = np.zeros((R, O)), 0
    for expert, size in enumerate(sizes):
        wanted[first : first + size] = x[first : first + size].astype(np.float64) @ wide[expert].T
        first += size
    product = select_cpu.quantized_linear(kernels, weights, packed=True)
    arrays = x, codes, scales, np.array(sizes, np.int32)
    found = product(*map(Tensor, arrays)).asnumpy()
    assert found.dtype == np.float32
    if exact:  # whole numbers times powers of two: no sum is rounded
        np.testing.assert_array_equal(found, wanted)
    else:  # float32 sums of 108 products, each rounded a few times
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


class Two(nn.Cell):
    """Products with two weights of the same shape, as w1 and w3 have."""

    def __init__(self, kernels, weights, packed):
        super().__init__()
        self.first, self.second = (
            select_cpu.quantized_linear(kernels, weights, packed) for _ in range(2)
        )

    def construct(self, x, one, one_scales, other, other_scales, factors, *sizes):
        y = self.first(x, one, one_scales, *sizes)
        return (factors * (y + 3 * self.second(x, other, other_scales, *sizes))).sum()


@pytest.fixture(scope="module", params=[("int8", 1), ("int4", 3)], ids=["int8", "int4"])
def two_weights(request):
    """More rows of a matrix than are dequantised at a time, and columns for two threads."""
    weights, groups = request.param
    rng = np.random.default_rng(2)
    return weights, [stored(rng, weights, (3, 300, 132), groups) for _ in range(2)]


@pytest.mark.parametrize("mode", [ms.PYNATIVE_MODE, ms.GRAPH_MODE], ids=["pynative", "graph"])
@pytest.mark.parametrize("kernels", [*KERNELS, "padded"])
def test_gradients_of_rows(kernels, two_weights, mode):
    sizes, C = [9, 0, 8], 5
    packed, rng = kernels != "padded", np.random.default_rng(3)
    weights, pairs = two_weights
    _, O, I = pairs[0][2].shape  # noqa: E741
    rows = (20,) if packed else (len(sizes), C)
    x, factors = (rng.standard_normal((*rows, n)).astype(np.float32) for n in (I, O))
    matrix = pairs[0][2] + 3 * pairs[1][2]
    if packed:
        wanted, first = np.zeros((*rows, I)), 0
        for expert, size in enumerate(sizes):
            own = slice(first, first + size)
            wanted[own] = factors[own].astype(np.float64) @ matrix[expert]
            first += size
    else:
        wanted = factors.astype(np.float64) @ matrix
    two = Two(kernels if packed else "reference", weights, packed)
    arrays = [x, *pairs[0][:2], *pairs[1][:2], factors]
    if packed:
        arrays.append(np.array(sizes, np.int32))
    before = ms.get_context("mode")
    ms.set_context(mode=mode)
    try:
        found = ms.grad(two, 0)(*map(Tensor, arrays)).asnumpy()
    finally:
        ms.set_context(mode=before)
    # float32 sums of twice 300 products, each rounded a few times
    np.testing.assert_allclose(found, wanted, rtol=0, atol=4e-6 * np.abs(wanted).max())


@needs_compiler
@pytest.mark.parametrize(("weights", "groups"), [("int8", (1, 1)), ("int4", (2, 1))])
# the last is large enough for several threads
@pytest.mark.parametrize(("T", "H", "I"), [(3, 36, 20), (2, 256, 520)])
def test_fused_experts(weights, groups, T, H, I):  # noqa: E741
    E, K, rng = 4, 2, np.random.default_rng(1)
    x = rng.standard_normal((T, H)).astype(np.float32)
    weights_TK = rng.standard_normal((T, K)).astype(np.float32)
    matrices = [
        stored(rng, weights, (E, *shape), each)
        for shape, each in (((I, H), groups[0]), ((I, H), groups[0]), ((H, I), groups[1]))
    ]
    wide1, wide3, wide2 = (each[2] / 100 for each in matrices)
    experts = np.stack([rng.permutation(E)[:K] for _ in range(T)]).astype(np.int32)
    experts[0, 1] = E  # a choice that the gate left out
    valid = np.ones(T, np.float32)
    valid[-1] = 0
    wanted = np.zeros((T, H))
    for t, k in np.ndindex(T, K):
        if valid[t] and (e := experts[t, k]) < E:
            gate, up = wide1[e] @ x[t], wide3[e] @ x[t]
            wanted[t] += weights_TK[t, k] * (wide2[e] @ (gate / (1 + np.exp(-gate)) * up))
    arrays = [x, experts, weights_TK, valid]
    for codes, scales, _ in matrices:
        arrays += [codes, scales / np.float32(100)]
    found = select_cpu.quantized_fused_experts("cpu", weights)(*map(Tensor, arrays)).asnumpy()
    # two products of float32 one after the other
    np.testing.assert_allclose(found, wanted, rtol=0, atol=5e-6 * np.abs(wanted).max())
