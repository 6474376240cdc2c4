"""Losses and gradients against Hugging Face on torch; the capacity policy against a loop."""

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor
from support.hf import SPARSE, Pair, make_mixed_pair, make_pair, our_weights
from support.models import fill, next_labels, ragged_batch
from support.moe import CapacityBlock
from support.routing import capacity_oracle
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from mistral_ms.config import DROPLESS, RoutingConfig
from mistral_ms.models import CausalLM, LossReport, Objective

LENGTHS = [17, 9, 13]
COEF = 0.02
LOSS = 1e-5
"""The promised bound on the difference of losses; about 1e-6 measured."""
GRADIENT = 1e-4
"""The promised bound on a gradient's difference, over its tensor's largest; 1e-5 measured."""


def batch(pair, lengths=LENGTHS):
    ids, position_ids = ragged_batch(lengths, pair.config.vocab_size)
    return ids, next_labels(ids, position_ids), position_ids


def hf_forward(pair, ids, position_ids):
    """Hugging Face's forward; it shifts the labels by itself."""
    labels = torch.tensor(np.where(position_ids >= 0, ids, -100)).long()
    mask = torch.tensor(position_ids >= 0).long()
    return pair.hf(torch.tensor(ids).long(), attention_mask=mask, labels=labels)


def objective(pair, routing=DROPLESS, **options):
    model = fill(CausalLM(pair.config, routing), pair.weights())
    return Objective(model, **options)


def run(loss, arrays):
    total, parts = loss(*map(Tensor, arrays))
    return float(total), LossReport(*(part.numpy() for part in parts))


def gradients(loss, arrays):
    """Value, report and the gradient of every weight by its name."""
    weights = loss.model.weights()
    step = ms.value_and_grad(loss, None, list(weights.values()), has_aux=True)
    (total, _), grads = step(*map(Tensor, arrays))
    return float(total), {n: g.numpy() for n, g in zip(weights, grads, strict=True)}


def assert_gradients_equal(got, want):
    assert set(got) == set(want)
    for name in want:
        bound = GRADIENT * np.abs(want[name]).max()
        assert bound > 0, f"{name}: no gradient to compare"
        assert np.abs(got[name] - want[name]).max() <= bound, name


class TestLosses:
    @pytest.mark.parametrize(
        "kind", ["mixtral", "tied-head", "mixtral-sliding-window", "mistral-sliding-window"]
    )
    def test_equal_hugging_faces(self, kind):
        pair = make_pair(kind)
        ids, labels, position_ids = batch(pair)
        with torch.no_grad():
            want = hf_forward(pair, ids, position_ids)
        total, report = run(objective(pair, router_aux_loss_coef=COEF), (ids, labels, position_ids))
        aux = 0.0
        if pair.config.moe is not None:
            aux = want.aux_loss.item()
            assert pair.hf.router_aux_loss_coef != COEF
            assert abs(report.aux - aux) <= LOSS
        lm = want.loss.item() - aux * getattr(pair.hf, "router_aux_loss_coef", 0.0)
        assert abs(report.lm - lm) <= LOSS
        assert abs(total - (lm + COEF * aux)) <= LOSS

    def test_a_report_of_a_dense_model_has_no_router(self):
        pair = make_pair("mistral-sliding-window")
        total, report = run(
            objective(pair, router_aux_loss_coef=1.0, router_z_loss_coef=1.0), batch(pair)
        )
        assert total == report.lm
        assert report.aux == report.z == report.routed_LE == report.kept_LE == 0

    def test_the_total_is_the_weighted_sum_and_counts_are_per_layer(self):
        pair = make_pair("mixtral")
        arrays = batch(pair)
        total, report = run(
            objective(pair, router_aux_loss_coef=0.3, router_z_loss_coef=0.07), arrays
        )
        want = report.lm + 0.3 * report.aux + 0.07 * report.z
        np.testing.assert_allclose(total, want, rtol=1e-6)  # float32 sum
        assert report.routed_LE.shape == report.kept_LE.shape == (2, 8)
        np.testing.assert_array_equal(report.routed_LE, report.kept_LE)
        assert (report.routed_LE.sum(-1) == 2 * sum(LENGTHS)).all()

    def test_router_losses_are_those_of_hugging_faces_logits(self):
        pair = make_pair("mixtral")
        ids, labels, position_ids = batch(pair)
        with torch.no_grad():
            layers = hf_forward(pair, ids, position_ids).router_logits
        real = torch.tensor(position_ids >= 0).ravel()
        z = torch.cat([torch.logsumexp(x[real], -1) ** 2 for x in layers]).mean().item()
        mask = torch.tensor(position_ids >= 0).long()
        each = [load_balancing_loss_func((x,), 8, 2, mask).item() for x in layers]
        _, report = run(objective(pair, pooled_aux=False), (ids, labels, position_ids))
        np.testing.assert_allclose(report.z, z, rtol=1e-5)  # logits differ by 2e-6
        np.testing.assert_allclose(report.aux, np.mean(each), rtol=1e-5)

    @pytest.mark.parametrize("chunk", [1, 7, 51, 1000])
    def test_chunks_do_not_change_the_loss(self, chunk):
        pair = make_pair("mixtral")
        arrays = batch(pair)
        whole, _ = run(objective(pair), arrays)
        got, _ = run(objective(pair, loss_chunk=chunk), arrays)
        np.testing.assert_allclose(got, whole, rtol=1e-6)  # order of a float32 sum

    def test_how_many_tokens_logits_are_held(self):
        """256 MiB of float32 unless told otherwise; the numbers alone cannot tell."""
        pair = make_pair("mixtral")
        assert objective(pair).head_loss.chunk == 2**26 // 320
        told = objective(pair, loss_chunk=7)
        assert told.chunk == told.head_loss.chunk == 7

    def test_nothing_counted_is_zero_not_nan(self):
        pair = make_pair("mixtral")
        ids, labels, position_ids = batch(pair)
        total, report = run(objective(pair), (ids, np.full_like(labels, -100), position_ids))
        assert total == report.lm == 0

    def test_some_labels_ignored_inside_the_text(self):
        pair = make_pair("mixtral")
        ids, labels, position_ids = batch(pair)
        labels[:, 2:6] = -100
        with torch.no_grad():
            mask = torch.tensor(position_ids >= 0).long()
            rows = pair.hf(torch.tensor(ids).long(), attention_mask=mask).logits
            want = torch.nn.functional.cross_entropy(
                rows.reshape(-1, rows.shape[-1]), torch.tensor(labels).long().ravel()
            )
        _, report = run(objective(pair), (ids, labels, position_ids))
        assert abs(report.lm - want.item()) <= LOSS


def hf_gradients(pair, ids, position_ids):
    pair.hf.zero_grad()
    loss = hf_forward(pair, ids, position_ids).loss
    loss.backward()
    return loss.item(), pair.gradients()


class TestGradientsEqualHuggingFaces:
    def check(self, pair, **options):
        ids, labels, position_ids = batch(pair)
        want_loss, want = hf_gradients(pair, ids, position_ids)
        loss, got = gradients(
            objective(pair, router_aux_loss_coef=COEF, **options), (ids, labels, position_ids)
        )
        assert abs(loss - want_loss) <= LOSS
        assert_gradients_equal(got, want)

    def test_mixtral(self, mode):
        """lm + 0.02 aux, every parameter of two layers, with padding."""
        self.check(make_pair("mixtral", router_aux_loss_coef=COEF))

    @pytest.mark.parametrize("kind", ["mistral-sliding-window", "tied-head", "one-kv-head"])
    def test_other_kinds(self, kind):
        aux = {} if kind.startswith("mistral") else dict(router_aux_loss_coef=COEF)
        self.check(make_pair(kind, **aux))

    def test_a_chunked_head(self, mode):
        self.check(make_pair("mistral-sliding-window"), loss_chunk=20)  # 20 + 20 + 11 tokens

    def test_a_mixed_model(self):
        """Gradient flows through dense and sparse layers, and into the one router."""
        pair = make_mixed_pair(3, (1,))
        pair.hf.router_aux_loss_coef = COEF
        self.check(pair)


def test_a_row_of_nothing_but_padding_changes_no_loss_and_no_gradient():
    pair = make_pair("mixtral")
    ids, labels, position_ids = batch(pair, [9, 0])
    loss = objective(pair, router_aux_loss_coef=COEF, router_z_loss_coef=0.01)
    total, got = gradients(loss, (ids, labels, position_ids))
    want_total, want = gradients(loss, (ids[:1], labels[:1], position_ids[:1]))
    assert abs(total - want_total) <= LOSS
    assert_gradients_equal(got, want)


class CapacityPair:
    """A Hugging Face Mixtral whose sparse blocks drop choices by a loop."""

    def __init__(self, routing: RoutingConfig, position_ids: np.ndarray) -> None:
        self.pair: Pair = make_pair("mixtral")
        self.parameters = dict(self.pair.hf.named_parameters())  # by their usual names
        self.position_ids, valid = position_ids, (position_ids >= 0).astype(np.float32).ravel()
        capacity = capacity_oracle(position_ids.size, 8, 2, routing.capacity_factor)
        self.blocks = [
            CapacityBlock(
                getattr(layer, SPARSE),
                valid,
                capacity,
                routing.drop_priority == "choice_major",
                routing.rescale_survivors,
            )
            for layer in self.pair.hf.model.layers
        ]
        self.weights = self.pair.weights()
        for layer, block in zip(self.pair.hf.model.layers, self.blocks, strict=True):
            setattr(layer, SPARSE, block)

    def loss_and_gradients(self, ids):
        labels = torch.tensor(np.where(self.position_ids >= 0, ids, -100)).long()
        mask = torch.tensor(self.position_ids >= 0).long()
        lm = self.pair.hf(
            torch.tensor(ids).long(),
            attention_mask=mask,
            labels=labels,
            output_router_logits=False,
        ).loss
        logits = tuple(block.logits for block in self.blocks)
        aux = load_balancing_loss_func(logits, 8, 2, mask)
        total = lm + COEF * aux
        total.backward()
        grads = {
            n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in self.parameters.items()
        }
        return total.item(), aux.item(), our_weights(grads, self.pair.config)


@pytest.mark.parametrize(
    "routing",
    [
        RoutingConfig(policy="capacity"),
        RoutingConfig(policy="capacity", capacity_factor=0.6, drop_priority="choice_major"),
        RoutingConfig(policy="capacity", capacity_factor=0.6, rescale_survivors=True),
    ],
    ids=["factor-1.1", "choice-major", "rescaled"],
)
def test_capacity_policy_equals_a_model_that_drops_by_a_loop(routing):
    ids, position_ids = ragged_batch(LENGTHS, 320)
    theirs = CapacityPair(routing, position_ids)
    want_total, want_aux, want = theirs.loss_and_gradients(ids)
    model = fill(CausalLM(theirs.pair.config, routing), theirs.weights)
    loss = Objective(model, router_aux_loss_coef=COEF)
    arrays = (ids, next_labels(ids, position_ids), position_ids)
    _, report = run(loss, arrays)
    np.testing.assert_array_equal(report.routed_LE, [block.routed for block in theirs.blocks])
    np.testing.assert_array_equal(report.kept_LE, [block.kept for block in theirs.blocks])
    assert report.kept_LE.sum() < report.routed_LE.sum(), "nothing was dropped"
    assert abs(report.aux - want_aux) <= LOSS
    total, got = gradients(loss, arrays)
    assert abs(total - want_total) <= LOSS
    assert_gradients_equal(got, want)


def test_a_jitted_training_step_equals_pynative():
    pair = make_pair("mixtral")
    loss = objective(
        pair, RoutingConfig(policy="capacity"), router_aux_loss_coef=COEF, router_z_loss_coef=0.001
    )
    arrays = batch(pair)
    weights = list(loss.model.weights().values())
    step = ms.value_and_grad(loss, None, weights, has_aux=True)
    (want, want_parts), want_grads = step(*map(Tensor, arrays))

    @ms.jit(fullgraph=True)  # strict: no fallback to Python
    def compiled(ids_BS, labels_BS, positions_BS):
        return step(ids_BS, labels_BS, positions_BS)

    (got, parts), grads = compiled(*map(Tensor, arrays))
    np.testing.assert_allclose(float(got), float(want), rtol=1e-6)
    for ours, theirs in zip(parts, want_parts, strict=True):
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), rtol=1e-6)
    for ours, theirs in zip(grads, want_grads, strict=True):
        # the compiler fuses and reorders float32 sums
        bound = 1e-5 * np.abs(theirs.numpy()).max()
        np.testing.assert_allclose(ours.numpy(), theirs.numpy(), atol=bound)
