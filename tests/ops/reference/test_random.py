"""Threefry against its authors' vectors and NumPy's unsigned words, and what is made of it."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from mistral_ms.ops.reference import normal, threefry2x32, uniform

# from the known answers of Random123, threefry2x32 with 20 rounds: counter, key, words
KNOWN = (
    ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
    ((0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0xFFFFFFFF), (0x1CB996FC, 0xBB002BE7)),
    ((0x243F6A88, 0x85A308D3), (0x13198A2E, 0x03707344), (0xC4923A9C, 0x483DF7A0)),
)


def word(value):
    return Tensor(np.array(value, np.uint32).astype(np.int32))


class Words(nn.Cell):
    def construct(self, key_0, key_1, x, y):
        return threefry2x32((key_0, key_1), (x, y))


@pytest.mark.parametrize("mode", [ms.GRAPH_MODE, ms.PYNATIVE_MODE], ids=["graph", "pynative"])
def test_known_answers(mode):
    before = ms.get_context("mode")
    ms.set_context(mode=mode)
    columns = zip(*((*key, *counter) for counter, key, _ in KNOWN), strict=True)
    found = [part.asnumpy().astype(np.uint32) for part in Words()(*map(word, columns))]
    ms.set_context(mode=before)
    assert [tuple(map(int, row)) for row in zip(*found, strict=True)] == [k[2] for k in KNOWN]


def test_uniform_takes_the_upper_bits_and_never_an_end():
    words = np.array([0, 0x1FF, 0x200, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF], np.uint32)
    got = uniform(word(words)).asnumpy()
    np.testing.assert_array_equal(got, ((words >> 9) + 0.5) / 2**23)
    assert got.min() > 0 and got.max() < 1


def test_normal_is_standard_and_independent_along_every_counter():
    """Bounds are five standard errors of 200 000 draws."""
    tokens, experts = np.arange(25_000, dtype=np.int32)[:, None], np.arange(8, dtype=np.int32)
    key = word(7), word(3)
    drawn = normal(key, (Tensor(tokens), Tensor(experts))).asnumpy().astype(np.float64)
    assert drawn.shape == (25_000, 8)
    error = 1 / np.sqrt(drawn.size)
    assert abs(drawn.mean()) < 5 * error
    assert abs(drawn.var() - 1) < 5 * error * np.sqrt(2)
    assert abs((drawn**4).mean() - 3) < 5 * error * np.sqrt(96)
    for other in (np.roll(drawn, 1, 0), np.roll(drawn, 1, 1)):
        assert abs((drawn * other).mean()) < 5 * error
    other = normal((word(7), word(4)), (Tensor(tokens), Tensor(experts))).asnumpy()
    assert abs((drawn * other).mean()) < 5 * error
    part = normal(key, (Tensor(tokens[1000:1003]), Tensor(experts[2:5]))).asnumpy()
    # the words are the same; logarithm and cosine may be rounded otherwise in another shape
    np.testing.assert_allclose(part, drawn[1000:1003, 2:5], rtol=1e-5, atol=1e-6)
