"""Noise on embedded tokens: its size, what it depends on, and the loss that transformers has."""

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor
from support.hf import make_pair
from support.models import fill, next_labels, positions

from mistral_ms.config import DROPLESS, RunConfig
from mistral_ms.config.base import validate
from mistral_ms.errors import ConfigError
from mistral_ms.layers import embedding_noise
from mistral_ms.models import CausalLM, Objective
from mistral_ms.parallel.graph.checks import check_run

ALPHA, B, S, H = 5.0, 4, 12, 32
BOUND = ALPHA / (S * H) ** 0.5


def noise(seed=0, step=3, rows=range(B)):
    places = np.concatenate([row * S + np.arange(S) for row in rows]).astype(np.int32)
    key = Tensor(seed, ms.int32), Tensor(step, ms.int32)
    return embedding_noise(key, Tensor(places), H, BOUND).asnumpy()


def test_uniform_within_its_bound():
    """The paper's line: a uniform number in (-1, 1) times alpha over the root of L d."""
    found = noise(rows=range(64)) / BOUND
    assert np.abs(found).max() < 1
    assert np.abs(found).max() > 0.999
    count = found.size  # 24576 numbers: means within four standard deviations
    assert abs(found.mean()) < 4 * (1 / 3 / count) ** 0.5
    assert abs((found**2).mean() - 1 / 3) < 4 * (4 / 45 / count) ** 0.5
    neighbours = (found[:, 1:] * found[:, :-1]).mean(), (found[1:] * found[:-1]).mean()
    assert np.abs(neighbours).max() < 4 * (1 / 9 / count) ** 0.5


def test_a_function_of_seed_step_place_and_column():
    """A part of a batch gets what the whole batch gives its rows."""
    whole = noise()
    np.testing.assert_array_equal(noise(rows=[2, 3]), whole[2 * S :])
    for other in (noise(seed=1), noise(step=4)):
        assert (other != whole).mean() > 0.99


def test_the_loss_is_that_of_transformers_with_the_same_noise(mode):
    pair = make_pair(
        "kv-heads-equal-heads", vocab_size=64, hidden_size=H, intermediate_size=48,
        num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    ids = np.random.default_rng(0).integers(3, 64, (B, S)).astype(np.int32)
    places = positions([S] * B, S)
    random_B3 = np.array([[7, 3, row] for row in range(B)], np.int32)
    model = fill(CausalLM(pair.config, DROPLESS), pair.weights())
    arrays = ids, next_labels(ids, places), places
    with_noise, without = Objective(model, neftune_noise_alpha=ALPHA), Objective(model)

    def loss(objective, random):
        given = None if random is None else Tensor(random)
        return float(objective(*map(Tensor, arrays), None, None, given)[0])

    embedded = pair.hf.get_input_embeddings()(torch.tensor(ids).long()).detach()
    embedded = embedded + torch.tensor(noise(seed=7)).reshape(B, S, H)
    wanted = pair.hf(inputs_embeds=embedded, labels=torch.tensor(ids).long()).loss.item()
    assert loss(with_noise, random_B3) == pytest.approx(wanted, rel=1e-5)
    plain = loss(without, random_B3)
    assert abs(plain - wanted) > 1e-3, "noise must matter"
    assert loss(with_noise, None) == plain  # outside of training


def test_the_graph_refuses_it():
    sizes = dict(
        vocab_size=64, hidden_size=H, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    training = dict(max_steps=1, seq_length=8, global_batch_size=1, neftune_noise_alpha=ALPHA)
    run = validate(RunConfig, {"model": sizes, "training": training}, "run")
    with pytest.raises(ConfigError, match=r"training\.neftune_noise_alpha: 5.*execution=explicit"):
        check_run(run, 1)
