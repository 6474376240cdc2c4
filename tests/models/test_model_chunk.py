"""Models cut into runs of layers: together they are the whole one, bit for bit."""

import numpy as np
import pytest
from mindspore import Tensor
from support.configs import model as small_model

from mistral_ms.config import DROPLESS, RoutingConfig
from mistral_ms.config.gates import gate_settings
from mistral_ms.errors import ConfigError
from mistral_ms.models import CausalLM, LossReport, ModelChunk, Objective

CONFIG = small_model(num_hidden_layers=4)
CUT = (
    ModelChunk(range(0, 1), embeds=True, predicts=False),
    ModelChunk(range(1, 3), embeds=False, predicts=False),
    ModelChunk(range(3, 4), embeds=False, predicts=True),
)
CAPACITY = RoutingConfig(policy="capacity", capacity_factor=1.1, aux_loss="per_layer")
COEFFICIENTS = dict(router_aux_loss_coef=0.02, router_z_loss_coef=0.001, pooled_aux=False)


def batch():
    ids = np.random.default_rng(1).integers(3, CONFIG.vocab_size, (4, 8)).astype(np.int32)
    position_ids = np.tile(np.arange(8, dtype=np.int32), (4, 1))
    position_ids[1, 5:] = -1
    labels = np.where(position_ids >= 0, np.roll(ids, -1, 1), -100).astype(np.int32)
    return (
        Tensor(ids),
        Tensor(labels),
        Tensor(position_ids),
        Tensor(np.maximum(position_ids, 0) * 0),
    )


def whole_and_parts(routing=DROPLESS, config=CONFIG):
    """A whole model and its parts, with the same weights."""
    whole = CausalLM(config, routing)
    whole.initialize(0)
    values = whole.weights()
    parts = [CausalLM(config, routing, model_chunk=model_chunk) for model_chunk in CUT]
    for part in parts:
        for name, parameter in part.weights().items():
            parameter.set_data(Tensor(values[name].numpy()))
    return whole, parts


def test_the_parts_have_every_weight_once_under_its_name_in_the_whole():
    whole, parts = whole_and_parts()
    names = [name for part in parts for name in part.weights()]
    assert sorted(names) == sorted(whole.weights())
    for model_chunk, part in zip(CUT, parts, strict=True):
        layers = {int(name.split(".")[1]) for name in part.weights() if name.startswith("layers.")}
        assert layers == set(model_chunk.layers)


@pytest.mark.parametrize("routing", [DROPLESS, CAPACITY], ids=["dropless", "capacity"])
def test_states_handed_on_come_to_the_same_result(routing):
    whole, parts = whole_and_parts(routing)
    ids, _, position_ids, segments = batch()
    x = parts[0].embed(ids)
    for part in parts:
        x, _ = part.decode(x, position_ids, segments)
    np.testing.assert_array_equal(
        x.numpy(), whole.hidden_states(ids, position_ids, segments)[0].numpy()
    )


def test_the_parts_losses_add_up():
    whole, parts = whole_and_parts(CAPACITY)
    ids, labels, position_ids, segments = batch()
    inv_counts = Tensor(np.array([1 / 29, 1 / 29], np.float32))
    total, want = Objective(whole, **COEFFICIENTS)(ids, labels, position_ids, segments, inv_counts)
    x, sums, totals = ids, [], []
    for part in parts:
        objective = Objective(part, **COEFFICIENTS)
        part_total, x, report = objective.forward_step(
            x, labels, position_ids, segments, inv_counts
        )
        totals.append(float(part_total))
        sums.append([each.numpy() for each in report])
    got = LossReport(*(np.sum(column, 0) for column in zip(*sums, strict=True)))
    # means over layers in another order
    np.testing.assert_allclose(sum(totals), float(total), rtol=1e-6)
    for name in ("lm", "aux", "z"):
        np.testing.assert_allclose(
            getattr(got, name), float(want[LossReport._fields.index(name)]), rtol=1e-6
        )
    np.testing.assert_array_equal(got.routed_LE, want[3].numpy())
    np.testing.assert_array_equal(got.kept_LE, want[4].numpy())


def test_dense_layers_report_for_the_sparse_ones_elsewhere():
    gate = gate_settings("noisy_top_k")
    moe = CONFIG.moe.model_copy(update={"sparse_layers": (3,), "gate": gate})
    _, parts = whole_and_parts(CAPACITY, CONFIG.model_copy(update={"moe": moe}))
    ids, labels, position_ids, segments = batch()
    inv_counts = Tensor(np.array([1 / 29, 1 / 29], np.float32))
    objective = Objective(parts[0], **COEFFICIENTS, router_losses={"importance": 0.1})
    _, _, report = objective.forward_step(ids, labels, position_ids, segments, inv_counts)
    assert [float(each) for each in LossReport.unpack(report).others] == [0], "as the sparse ones"
    assert report[3].shape == (1, CONFIG.moe.num_local_experts)
    assert not report[3].numpy().any()


def test_copies_are_dispatch_groups():
    """The sum over the halves of the batch, each with the batch's shares; compiled, in
    tests/distributed/test_training.py.
    """
    whole, _ = whole_and_parts(CAPACITY)
    arrays = batch()
    inv_counts = Tensor(np.array([1 / 29, 1 / 29], np.float32))
    one = Objective(whole, **COEFFICIENTS)
    halves = [one(*(array[half : half + 2] for array in arrays), inv_counts) for half in (0, 2)]
    total, report = Objective(whole, interleave_num=2, **COEFFICIENTS)(*arrays, inv_counts)
    np.testing.assert_allclose(float(total), sum(float(t) for t, _ in halves), rtol=1e-6)
    for got, *want in zip(report, *(parts for _, parts in halves), strict=True):
        # another order of sums
        np.testing.assert_allclose(got.numpy(), sum(each.numpy() for each in want), rtol=1e-5)


def test_both_ends_of_a_tied_model_hold_its_embedding():
    tied = CONFIG.model_copy(update={"tie_word_embeddings": True})
    held = ["embed_tokens.weight" in CausalLM(tied, model_chunk=each).weights() for each in CUT]
    assert held == [True, *[False] * (len(CUT) - 2), True]
    assert "lm_head.weight" not in CausalLM(tied, model_chunk=CUT[-1]).weights()


def test_pooled_aux_cannot_be_cut():
    _, parts = whole_and_parts()
    with pytest.raises(ConfigError, match="couples all layers"):
        Objective(parts[0], router_aux_loss_coef=0.02, pooled_aux=True)
    Objective(parts[0], router_aux_loss_coef=0.0, pooled_aux=True)
