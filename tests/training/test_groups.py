"""Micro-batches are dispatch groups: what their gradients add up to."""

import functools

import numpy as np
import pytest
import torch
from mindspore import Tensor
from support.hf import SPARSE, STACKED, make_pair
from support.models import fill
from support.training import torch_group_loss

from mistral_ms.config import DROPLESS, RoutingConfig
from mistral_ms.datasets import InMemorySequences
from mistral_ms.models import CausalLM, LossReport, Objective
from mistral_ms.training.graphs import MicroBatchGradients, batch_tensors

GRADIENT = 1e-5
"""Of each tensor's largest element: what two formulations of a float32 gradient may differ by
(1e-6 to 5e-6 measured)."""
AUX, Z = 0.02, 0.001


@pytest.fixture(scope="module")
def pair():
    return make_pair("mixtral")


@pytest.fixture(scope="module")
def batch():
    """Six sequences, the last of the text among them: a third of it is padding."""
    ids = np.random.default_rng(1).integers(3, 320, 12 * 5 + 5).tolist()
    batch = InMemorySequences(ids, 12, 6, seed=0).batch(0)
    assert (batch.positions_BS < 0).any()
    return batch


@pytest.fixture(scope="module")
def summed(pair, batch):
    """A function: losses and gradients of the batch in so many groups, added up. Eager: as a graph
    the same is trained in the other files.
    """

    @functools.cache
    def made(routing, router_aux_loss_coef, router_z_loss_coef):
        model = fill(CausalLM(pair.config, routing), pair.weights())
        weights = model.weights()
        objective = Objective(
            model, router_aux_loss_coef=router_aux_loss_coef, router_z_loss_coef=router_z_loss_coef
        )
        return weights, MicroBatchGradients(objective, weights)

    @functools.cache
    def compute(routing, parts, router_aux_loss_coef, router_z_loss_coef, scale=1.0):
        weights, micro = made(routing, router_aux_loss_coef, router_z_loss_coef)
        scales = Tensor(np.array([1 / batch.tokens, 1 / batch.present, scale], np.float32))
        losses, gradients = 0.0, {name: 0.0 for name in weights}
        for part in batch.split(parts):
            tensors = batch_tensors(part)
            reported, grads = micro(*tensors, scales)
            losses = losses + np.array([float(x.asnumpy()) for x in reported[:4]])
            for name, gradient in zip(weights, grads, strict=True):
                gradients[name] = gradients[name] + gradient.asnumpy().astype(np.float64)
        return losses, gradients

    return compute


def assert_close(got, want):
    assert set(got) == set(want)
    for name in want:
        largest = np.abs(want[name]).max()
        assert largest > 0, name
        assert np.abs(got[name] - want[name]).max() <= GRADIENT * largest, name


@pytest.mark.parametrize("parts", [1, 3])
def test_equal_torch_with_the_same_groups(summed, pair, batch, parts):
    """aux and z included; padding counts nowhere."""
    pair.hf.zero_grad()
    total = 0.0
    for group in batch.split(parts):
        loss = torch_group_loss(pair.hf, group, batch, AUX, Z)
        loss.backward()
        total += loss.item()
    losses, gradients = summed(DROPLESS, parts, AUX, Z)
    assert losses[0] == pytest.approx(total, rel=1e-5)
    assert_close(gradients, pair.gradients())
    # the parts that are reported add up to the total
    report = LossReport(*losses[1:], None, None)
    assert losses[0] == pytest.approx(report.lm + AUX * report.aux + Z * report.z, rel=1e-6)


def test_without_dropping_and_router_losses_groups_make_no_difference(summed):
    whole = summed(DROPLESS, 1, 0.0, 0.0)
    cut = summed(DROPLESS, 6, 0.0, 0.0)
    assert cut[0][:2] == pytest.approx(whole[0][:2], rel=1e-5)
    assert_close(cut[1], whole[1])


def test_with_a_capacity_groups_are_groups(summed):
    """Each group has its own slots: another cut drops others, so it is another gradient."""
    routing = RoutingConfig(policy="capacity", capacity_factor=0.6)
    whole, cut = (summed(routing, parts, 0.0, 0.0)[1] for parts in (1, 3))
    name = "layers.1.moe.experts.w2"
    difference = np.abs(cut[name] - whole[name]).max() / np.abs(whole[name]).max()
    assert difference > 0.01


def test_the_loss_scale_multiplies_gradients_and_nothing_else(summed):
    plain = summed(DROPLESS, 3, AUX, Z)
    scaled = summed(DROPLESS, 3, AUX, Z, scale=1024.0)
    assert np.array_equal(plain[0], scaled[0])
    for name in plain[1]:
        # a power of two: every bit of the mantissa stays
        assert np.array_equal(1024.0 * plain[1][name], scaled[1][name]), name


def test_torchs_gradient_is_a_real_one(pair, batch):
    """The oracle itself against finite differences, on one expert's weight."""
    experts = getattr(pair.hf.model.layers[1], SPARSE).experts
    weight = experts.down_proj if STACKED else experts[3].w2.weight
    pair.hf.zero_grad()
    torch_group_loss(pair.hf, batch, batch, AUX, Z).backward()
    place = np.unravel_index(int(weight.grad.abs().argmax()), weight.shape)
    slope = weight.grad[place].item()
    losses = []
    for step in (1e-2, -1e-2):
        with torch.no_grad():
            weight[place] += step
            losses.append(torch_group_loss(pair.hf, batch, batch, AUX, Z).item())
            weight[place] -= step
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(slope, rel=0.05)
