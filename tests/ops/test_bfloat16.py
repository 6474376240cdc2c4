"""Products with matrices in bfloat16 on the CPU, against float64 of the rounded numbers."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from mistral_ms.ops import cpu, select, select_cpu

pytestmark = pytest.mark.skipif(cpu.why_missing() is not None, reason=str(cpu.why_missing()))


def rounded(values):
    """To bfloat16, as float32: to the nearest one, or of two the even one (IEEE 754)."""
    bits = np.asarray(values, np.float32).view(np.uint32).astype(np.uint64)
    low, high = bits & 0xFFFF, bits >> 16
    high += (low > 0x8000) | ((low == 0x8000) & (high & 1 == 1))
    return (high << 16).astype(np.uint32).view(np.float32)


def normal(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def matrix(rng, *shape):
    """A matrix in bfloat16, and its values."""
    values = rounded(normal(rng, *shape))
    return Tensor(values).astype(ms.bfloat16), values.astype(np.float64)


def near(found, wanted, width):
    """float32 sums of ``width`` products of size 1, whose terms are exact: 8 + 8 bits."""
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-6 * width**0.5 + 1e-6)


# of a few rows and of more; widths that are no multiples of 64; enough for several threads
@pytest.mark.parametrize(
    "shape", [(1, 700, 1030), (3, 5, 7), (6, 5, 7), (5, 130, 64), (40, 700, 1030)]
)
def test_linear(shape):
    (T, O, I), rng = shape, np.random.default_rng(0)  # noqa: E741
    x, (w, wide) = normal(rng, T, I), matrix(rng, O, I)
    found = select_cpu.linear("cpu", "bfloat16")(Tensor(x), w).asnumpy()
    near(found, rounded(x).astype(np.float64) @ wide.T, I)
    assert np.abs(found - x @ wide.T).max() > 1e-3, "rows are rounded, too"


def test_rounding_is_to_even_and_keeps_what_is_not_finite():
    """One column is read as it is: a product with one."""
    one = Tensor(np.ones((1, 1), np.float32)).astype(ms.bfloat16)
    ties = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x7F7F8000], np.uint32).view(np.float32)
    x = np.concatenate([ties, [np.inf, -np.inf, np.nan, -0.0]]).astype(np.float32)[:, None]
    found = select_cpu.linear("cpu", "bfloat16")(Tensor(x[:4]), one).asnumpy()
    np.testing.assert_array_equal(found, rounded(ties)[:, None])
    found = select_cpu.linear("cpu", "bfloat16")(Tensor(x[4:]), one).asnumpy().ravel()
    np.testing.assert_array_equal(found, [np.inf, -np.inf, np.nan, 0])


@pytest.mark.parametrize("sizes", [[3, 0, 9, 4], [0, 0, 0, 0], [16, -5, 2, 30]])
def test_grouped_linear(sizes):
    """Groups of few rows, of none, of more; rows behind the last one give zero."""
    R, O, I, rng = 20, 130, 65, np.random.default_rng(1)  # noqa: E741
    x, (w, wide) = normal(rng, R, I), matrix(rng, len(sizes), O, I)
    wanted, first = np.zeros((R, O)), 0
    for expert, size in enumerate(sizes):
        last = min(R, first + max(0, size))
        wanted[first:last] = rounded(x[first:last]).astype(np.float64) @ wide[expert].T
        first = last
    product = select.grouped_linear("cpu", "bfloat16")
    assert type(product) is cpu.Bfloat16GroupedLinear
    found = product(Tensor(x), w, Tensor(np.array(sizes, np.int32))).asnumpy()
    near(found, wanted, I)
    assert not found[first:].any()


def test_rows_of_a_table():
    table, wide = matrix(np.random.default_rng(2), 9, 33)
    ids = np.array([0, 8, 3, 3, 9, -1], np.int32)
    found = select_cpu.embedding_rows("cpu", "bfloat16")(table, Tensor(ids)).asnumpy()
    np.testing.assert_array_equal(found[:4], wide[ids[:4]])
    assert not found[4:].any()


# the last is large enough for several threads
@pytest.mark.parametrize(("T", "H", "I"), [(1, 5, 7), (4, 33, 20), (2, 500, 260)])
def test_fused_experts(T, H, I):  # noqa: E741
    """As the products one by one: what goes into each is rounded."""
    E, K, rng = 4, 2, np.random.default_rng(1)
    x, weights = normal(rng, T, H), normal(rng, T, K)
    (w1, wide1), (w3, wide3), (w2, wide2) = (
        matrix(rng, E, *shape) for shape in ((I, H), (I, H), (H, I))
    )
    experts = np.stack([rng.permutation(E)[:K] for _ in range(T)]).astype(np.int32)
    wanted = np.zeros((T, H))
    for t in range(T):
        for e, weight in zip(experts[t], weights[t], strict=True):
            own = rounded(x[t]).astype(np.float64)
            gate, up = wide1[e] @ own, wide3[e] @ own
            hidden = rounded(gate / (1.0 + np.exp(-gate)) * up)
            wanted[t] += weight * (wide2[e] @ hidden.astype(np.float64))
    arrays = Tensor(x), Tensor(experts), Tensor(weights), Tensor(np.ones(T, np.float32))
    found = select_cpu.fused_experts("cpu", "bfloat16")(*arrays, w1, w3, w2).asnumpy()
    # a sum that rounding moves across the middle of two bfloat16 moves a product by 2^-8 of itself
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-3 * np.abs(wanted).max())


def test_activations_stay_float32_on_the_cpu_alone():
    assert select_cpu.activations("bfloat16") == "float32"
    assert select_cpu.activations("float16") == "float16"
    assert select_cpu.embedding_rows("cpu", "float32") is None
    assert select_cpu.fused_experts("cpu", "float16") is None
