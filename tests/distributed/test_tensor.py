"""Layers divided among tensor-parallel ranks equal the whole ones."""

import functools

import mindspore as ms
import numpy as np
import pytest
from distributed.tensors import (
    CONFIG,
    WEIGHTS,
    Block,
    context,
    inputs,
    whole_weights,
)
from mindspore import Tensor

from mistral_ms.config import DROPLESS
from mistral_ms.config.layout import Sizes
from mistral_ms.layers import TokenNLL
from mistral_ms.models import LayerFactory
from mistral_ms.parallel.topology import Topology, weight_slice

each_world = pytest.mark.parametrize("world", [2, 4])


@functools.cache
def alone() -> dict[str, np.ndarray]:
    net = Block(LayerFactory(CONFIG, DROPLESS), TokenNLL())
    for name, parameter in net.parameters_and_names():
        parameter.set_data(Tensor(whole_weights()[name]))
    gradient = ms.value_and_grad(net, None, net.trainable_params(), has_aux=True)
    values, gradients = gradient(*(Tensor(a) for a in inputs()), *context())
    names = [name for name, _ in net.parameters_and_names()]
    found = dict(zip(("loss", "nll", "mask", "embedded", "logits"), values, strict=True))
    found |= dict(zip(names, gradients, strict=True))
    return {name: value.numpy() for name, value in found.items()}


@each_world
def test_embedding_gives_the_same_bits(report, world):
    for rank in range(world):
        got = report(world).get(rank, "tensor/embedded")
        np.testing.assert_array_equal(got, whole_weights()["embed_tokens.weight"][inputs()[0]])


@each_world
def test_losses_are_those_of_whole_logits(report, world):
    """Against float64, and which labels count."""
    labels = inputs()[1]
    logits = alone()["logits"].astype(np.float64)
    log_z = np.log(np.exp(logits).sum(1))
    counted = labels != -100
    want = np.where(counted, log_z - logits[np.arange(len(labels)), labels * counted], 0)
    for rank in range(world):
        got = report(world).get(rank, "tensor/nll")
        # float32 logits of size 3, added up in another order
        np.testing.assert_allclose(got, want, atol=3e-6)
        np.testing.assert_array_equal(report(world).get(rank, "tensor/mask"), counted)
        first = report(world).get(0, "tensor/nll")
        np.testing.assert_array_equal(got, first)


@each_world
@pytest.mark.parametrize("name", WEIGHTS)
def test_gradients_of_every_weight(report, world, name):
    topology, want = Topology(Sizes(1, world, 1, 1)), alone()[name]
    for rank in range(world):
        got = report(world).get(rank, f"tensor/{name}")
        cut = weight_slice(WEIGHTS[name], topology, rank)
        # float32 noise: the same sums in another order
        np.testing.assert_allclose(got, want[cut], rtol=0, atol=3e-6 * np.abs(want).max())
    assert np.abs(want).max() > 1e-3
