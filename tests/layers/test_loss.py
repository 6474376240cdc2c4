"""Cross-entropy against torch, whole and in chunks, values and gradients."""

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor

from mistral_ms.config import IGNORE_INDEX
from mistral_ms.layers import HeadLoss, log_softmax, token_nll

T, H, V = 13, 6, 17
# MindSpore's exponential on CPU is good to 6e-6: so are probabilities, and their gradients times
# hidden states and weights of size 1 to 3
TOLERANCE = 2e-5


def inputs(ignored=(0, 4, 5, 12), seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(T, H)).astype(np.float32)
    weight = rng.normal(size=(V, H)).astype(np.float32)
    labels = rng.integers(0, V, T).astype(np.int32)
    labels[list(ignored)] = IGNORE_INDEX
    return hidden, weight, labels


def torch_loss(hidden, weight, labels):
    h, w = (torch.tensor(a, requires_grad=True) for a in (hidden, weight))
    loss = torch.nn.functional.cross_entropy(
        h @ w.T, torch.tensor(labels).long(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    loss.backward()
    return loss.item(), h.grad.numpy(), w.grad.numpy()


class TestTokenNll:
    def test_every_token_equals_torch(self):
        hidden, weight, labels = inputs()
        logits = hidden @ weight.T
        nll, mask = token_nll(Tensor(logits), Tensor(labels))
        want = torch.nn.functional.cross_entropy(
            torch.tensor(logits), torch.tensor(labels).long(), reduction="none"
        )
        np.testing.assert_allclose(nll.numpy(), want.numpy(), atol=TOLERANCE)
        np.testing.assert_array_equal(mask.numpy(), labels != IGNORE_INDEX)
        assert not nll.numpy()[labels == IGNORE_INDEX].any()

    def test_large_logits_and_first_and_last_label(self):
        logits = np.array([[1e4, 0, -1e4], [0, 0, 1e4], [-3e38, 0, 3e38]], np.float32)
        nll, _ = token_nll(Tensor(logits), Tensor(np.array([0, 0, 2], np.int32)))
        np.testing.assert_allclose(nll.numpy(), [0, 1e4, 0], rtol=1e-6)

    def test_half_precision_logits_are_counted_in_float32(self):
        logits = np.random.default_rng(1).normal(0, 3, (T, V)).astype(np.float16)
        labels = np.arange(T).astype(np.int32)
        nll, _ = token_nll(Tensor(logits), Tensor(labels))
        want = torch.nn.functional.cross_entropy(
            torch.tensor(logits).float(), torch.tensor(labels).long(), reduction="none"
        )
        assert nll.dtype == ms.float32
        np.testing.assert_allclose(nll.numpy(), want.numpy(), atol=TOLERANCE)


def chunked(chunk, hidden, weight, labels, scale=1.0):
    loss = HeadLoss(chunk)
    run = ms.value_and_grad(lambda h, w, y: loss(h, w, y) * scale, grad_position=(0, 1))
    value, grads = run(Tensor(hidden), Tensor(weight), Tensor(labels))
    return float(value), *(g.numpy() for g in grads)


@pytest.mark.parametrize("chunk", [1, 4, 5, 12, 13, 100])
def test_chunks_that_do_and_do_not_divide(chunk):
    arrays = inputs()
    for got, want in zip(chunked(chunk, *arrays), torch_loss(*arrays), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=TOLERANCE)


def test_the_incoming_gradient_is_used():
    """A loss that is divided by the number of tokens must scale its gradients."""
    arrays = inputs()
    _, d_hidden, d_weight = chunked(4, *arrays, scale=0.25)
    _, want_hidden, want_weight = torch_loss(*arrays)
    np.testing.assert_allclose(d_hidden, want_hidden / 4, atol=TOLERANCE)
    np.testing.assert_allclose(d_weight, want_weight / 4, atol=TOLERANCE)


@pytest.mark.parametrize("chunk", [5, 100])
def test_nothing_counted(chunk):
    value, d_hidden, d_weight = chunked(chunk, *inputs(ignored=range(T)))
    assert value == 0
    assert not d_hidden.any()
    assert not d_weight.any()


def test_in_a_graph(graph):
    class Gradient(ms.nn.Cell):
        def __init__(self):
            super().__init__()
            self.loss = HeadLoss(5)
            self.grad = ms.ops.GradOperation(get_all=True)

        def construct(self, hidden, weight, labels):
            value = self.loss(hidden, weight, labels)
            return value, self.grad(self.loss)(hidden, weight, labels)

    arrays = inputs()
    value, grads = Gradient()(*map(Tensor, arrays))
    want = torch_loss(*arrays)
    got = (value.numpy(), grads[0].numpy(), grads[1].numpy())
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=TOLERANCE)


def test_log_softmax_and_its_gradient():
    """Logits whose exponentials overflow, too; the gradient is d less its sum times p."""
    rng = np.random.default_rng(2)
    x = rng.normal(0, 3, (5, 4, 7)).astype(np.float32)
    x[0] += 500
    x[1, :, 3] -= 300
    d = rng.normal(size=x.shape).astype(np.float32)
    shifted = np.float64(x) - x.max(-1, keepdims=True)
    want = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    # logits near 500 have a spacing of 3e-5
    np.testing.assert_allclose(log_softmax(Tensor(x)).numpy(), want, rtol=1e-5, atol=4e-5)
    got = ms.grad(lambda x: (log_softmax(x) * Tensor(d)).sum())(Tensor(x)).numpy()
    p = np.exp(want)
    np.testing.assert_allclose(got, d - p * d.sum(-1, keepdims=True), atol=TOLERANCE)
