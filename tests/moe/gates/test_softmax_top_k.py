"""The gate against float64, and the dtype of its product."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from support.moe import moe_config
from support.routing import softmax

from mistral_ms.config import DROPLESS, RoutingConfig
from mistral_ms.moe import make_gate


def router(routing=DROPLESS, **sizes):
    cell = make_gate(moe_config(**sizes), routing)
    weight = np.random.default_rng(0).normal(size=cell.weight.shape).astype(np.float32)
    cell.weight.set_data(Tensor(weight))
    return cell, weight


@pytest.mark.parametrize("normalize", [True, False], ids=["normalised", "raw"])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_choice_equals_float64(k, normalize):
    cell, weight = router(K=k, normalize=normalize)
    x = np.random.default_rng(1).normal(size=(30, 6)).astype(np.float32)
    logits = x.astype(np.float64) @ weight.T
    probs = softmax(logits)
    experts = np.argsort(-probs, -1)[:, :k]
    weights = np.take_along_axis(probs, experts, -1)
    if normalize:
        weights /= weights.sum(-1, keepdims=True)
    *parts, terms = cell(Tensor(x))
    assert terms == ()
    got = [part.numpy() for part in parts]
    np.testing.assert_array_equal(got[1], experts)
    # MindSpore's exponential is good to 6e-6
    np.testing.assert_allclose(got[0], weights, rtol=2e-5)
    np.testing.assert_allclose(got[2], probs, rtol=2e-5)
    np.testing.assert_allclose(got[3], logits, atol=3e-6)  # sums of six products


def test_the_product_is_computed_in_the_routers_dtype():
    x = np.random.default_rng(2).normal(size=(200, 6)).astype(np.float32)
    cell, weight = router(RoutingConfig(router_dtype="float16"))
    weights, _, probs, logits, _ = cell(Tensor(x))
    rounded = x.astype(np.float16).astype(np.float64) @ weight.astype(np.float16).astype(float).T
    # the result itself is rounded to float16: 2^-11 of values up to 8
    np.testing.assert_allclose(logits.numpy(), rounded, atol=8e-3)
    np.testing.assert_array_equal(logits.numpy(), logits.numpy().astype(np.float16))
    assert weights.dtype == probs.dtype == logits.dtype == ms.float32
    np.testing.assert_allclose(probs.numpy().sum(-1), 1, atol=1e-5)


def test_a_model_in_half_precision_can_still_route_in_float32():
    cell = make_gate(moe_config(), DROPLESS, dtype="float16")
    weight = np.random.default_rng(3).normal(size=(4, 6)).astype(np.float16)
    cell.weight.set_data(Tensor(weight))
    x = np.random.default_rng(4).normal(size=(50, 6)).astype(np.float16)
    logits = cell(Tensor(x))[3]
    want = x.astype(np.float64) @ weight.astype(np.float64).T
    # products of float16 numbers are exact in float32; six of them are added
    np.testing.assert_allclose(logits.numpy(), want, atol=3e-6)
