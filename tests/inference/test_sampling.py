"""Sampling against transformers' logits processors on torch, and against its own probabilities."""

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mistral_ms.config import GenerationConfig
from mistral_ms.errors import GenerationError
from mistral_ms.inference import sampling
from mistral_ms.inference.sampling import Sampler

SETTINGS = [
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 2.5, "repetition_penalty": 1.3},
    {"temperature": 1.0, "repetition_penalty": 0.7},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.0, "top_k": 5},
    {"temperature": 1.0, "top_k": 10_000},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.0, "top_p": 0.01},
    {"temperature": 0.8, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.1},
    {"temperature": 1.7, "top_k": 3, "top_p": 0.5},
]


def random_logits(seed, batch=3, vocab=200, kind="normal"):
    generator = np.random.default_rng(seed)
    logits = generator.normal(0, 3, (batch, vocab))
    if kind == "ties":  # few distinct values: equals at every threshold
        logits = np.round(logits / 2) * 2
    if kind == "masked":
        logits[generator.random(logits.shape) < 0.5] = -np.inf
    return logits.astype(np.float32)


def processed_by_transformers(logits, prompts, config):
    """In the order in which generate() applies them."""
    scores, ids = torch.from_numpy(logits), torch.tensor(prompts)
    processors = []
    if config.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    processors.append(TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        processors.append(TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        processors.append(TopPLogitsWarper(config.top_p))
    for processor in processors:
        scores = processor(ids, scores)
    return torch.softmax(scores, dim=-1).numpy()


def probabilities_used(monkeypatch, logits, prompts, config):
    """What the sampler hands to its draw."""
    used = {}

    def spy(probabilities, uniforms):
        used["probabilities"] = probabilities
        return np.zeros(len(probabilities), dtype=np.int64)

    monkeypatch.setattr(sampling, "draw", spy)
    Sampler(config, prompts)(logits)
    return used["probabilities"]


@pytest.mark.parametrize("kind", ["normal", "masked"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_probabilities_equal_transformers(monkeypatch, settings, kind):
    config = GenerationConfig(**settings)
    for seed in range(20):
        logits = random_logits(seed, kind=kind)
        prompts = np.random.default_rng(seed).integers(0, 200, (3, 12)).tolist()
        ours = probabilities_used(monkeypatch, logits, prompts, config)
        theirs = processed_by_transformers(logits, prompts, config)
        assert np.array_equal(ours > 0, theirs > 0)  # the same tokens survive
        # float32 with sums in another order: a few units in the last place of numbers below 1
        np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_as_many_equals_survive_as_in_transformers(monkeypatch, settings):
    """Which of several equals falls at top-p's threshold is open in torch, their number is not."""
    config = GenerationConfig(**settings)
    for seed in range(20):
        logits = random_logits(seed, kind="ties")
        prompts = np.random.default_rng(seed).integers(0, 200, (3, 12)).tolist()
        ours = np.sort(probabilities_used(monkeypatch, logits, prompts, config), axis=1)
        theirs = np.sort(processed_by_transformers(logits, prompts, config), axis=1)
        assert np.array_equal(ours > 0, theirs > 0)
        # as above
        np.testing.assert_allclose(ours, theirs, rtol=2e-6, atol=1e-9)


def test_of_equals_at_the_threshold_the_smaller_ids_stay():
    kept = sampling.keep_top_p(np.zeros((1, 4), dtype=np.float32), 0.5)
    assert np.isfinite(kept).tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("vocab", [32000, 32768])
def test_probabilities_equal_transformers_at_full_size(monkeypatch, vocab):
    config = GenerationConfig(temperature=0.9, top_p=0.95, repetition_penalty=1.2)
    logits = random_logits(5, batch=2, vocab=vocab)
    prompts = np.random.default_rng(5).integers(0, vocab, (2, 500)).tolist()
    ours = probabilities_used(monkeypatch, logits, prompts, config)
    theirs = processed_by_transformers(logits, prompts, config)
    assert np.array_equal(ours > 0, theirs > 0)
    # longer float32 sums than above
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-9)


def test_the_filters_keep_the_expected_number_of_tokens():
    logits = np.log(np.array([[0.5, 0.25, 0.125, 0.0625, 0.0625]], dtype=np.float32))
    kept = lambda scores: int(np.isfinite(scores).sum())  # noqa: E731
    assert kept(sampling.keep_top_k(logits, 2)) == 2
    assert kept(sampling.keep_top_k(logits, 4)) == 5  # the last two are equal
    assert kept(sampling.keep_top_k(logits, 0)) == 5
    assert kept(sampling.keep_top_p(logits, 0.6)) == 2
    assert kept(sampling.keep_top_p(logits, 1e-9)) == 1  # 1 - 1e-9 is 1 in float32
    assert kept(sampling.keep_top_p(logits, 1.0)) == 5


def test_repetition_penalty_follows_prompts_of_any_length_and_what_was_chosen():
    """Logits are equal but for the penalty, so greedy walks through the tokens not seen yet."""
    config = GenerationConfig(repetition_penalty=2.0)
    sampler = Sampler(config, [[0, 1, 1, 3], [], [2]])
    logits = np.ones((3, 6), dtype=np.float32)
    steps = [sampler(logits).ids.tolist() for _ in range(3)]
    assert steps == [[2, 0, 0], [4, 1, 1], [5, 2, 3]]


def test_repetition_penalty_of_a_negative_logit_multiplies():
    config = GenerationConfig(repetition_penalty=2.0)
    logits = np.array([[-1.0, -1.5]], dtype=np.float32)
    assert Sampler(config, [[0]])(logits).ids.tolist() == [1]
    assert Sampler(config, [[1]])(logits).ids.tolist() == [0]


def test_greedy_takes_the_largest_and_the_smallest_id_among_equals():
    logits = np.array([[0, 3, 1, 3], [5, 5, 5, 5], [-2, -1, -3, -1]], dtype=np.float32)
    chosen = Sampler(GenerationConfig(), [[], [], []])(logits)
    assert chosen.ids.tolist() == [1, 0, 1]
    assert chosen.ids.dtype == np.int64


def test_greedy_ignores_seed_and_filters():
    logits = random_logits(1)
    plain = Sampler(GenerationConfig(), [[]] * 3)(logits).ids
    config = GenerationConfig(seed=9, top_k=3, top_p=0.1)
    assert np.array_equal(Sampler(config, [[]] * 3)(logits).ids, plain)


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.5, "top_k": 3, "repetition_penalty": 1.5}], ids=str
)
def test_logprobs_are_those_of_the_raw_logits(settings):
    logits = random_logits(2)
    chosen = Sampler(GenerationConfig(**settings), [[1, 2]] * 3)(logits)
    expected = torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()
    expected = np.take_along_axis(expected, chosen.ids[:, None], 1)[:, 0]
    assert chosen.logprobs.dtype == np.float32
    # one rounding to float32
    np.testing.assert_allclose(chosen.logprobs, expected, rtol=1e-7)


def test_the_logits_of_the_caller_are_not_changed():
    logits = random_logits(3)
    before = logits.copy()
    config = GenerationConfig(temperature=0.5, top_k=3, top_p=0.5, repetition_penalty=1.5)
    Sampler(config, [[1]] * 3)(logits)
    assert np.array_equal(logits, before)


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 1.0}, {"temperature": 0.6}, {"temperature": 1.0, "top_k": 5, "top_p": 0.8}],
    ids=str,
)
def test_frequencies_follow_the_probabilities(settings):
    """Chi-square over 40000 draws with a fixed seed."""
    config = GenerationConfig(seed=11, **settings)
    row = random_logits(4, batch=1, vocab=8) / 2
    rows = np.repeat(row, 40, axis=0)
    sampler = Sampler(config, [[]] * 40)
    counts = np.bincount(np.concatenate([sampler(rows).ids for _ in range(1000)]), minlength=8)
    expected = 40_000 * processed_by_transformers(row, [[0]], config)[0]
    assert counts[expected == 0].sum() == 0
    alive = expected > 0
    statistic = ((counts - expected)[alive] ** 2 / expected[alive]).sum()
    # 99.9 % of right samplers score below 24.3 with the 7 degrees of freedom of 8 tokens
    assert statistic < 24.3


def sampled(config, rows, steps=20, numbers=None, vocab=50):
    """Each sequence's logits depend on its key in ``rows`` and the step only."""
    sampler = Sampler(config, [[]] * len(rows), numbers)
    chosen = []
    for step in range(steps):
        logits = np.concatenate([random_logits([row, step], 1, vocab) for row in rows])
        chosen.append(sampler(logits).ids)
    return np.stack(chosen, axis=1)


SAMPLING = GenerationConfig(temperature=1.5, seed=3)


def test_the_same_seed_gives_the_same_samples_and_another_seed_others():
    first = sampled(SAMPLING, [1, 2])
    assert np.array_equal(first, sampled(SAMPLING, [1, 2]))
    other = SAMPLING.model_copy(update={"seed": 4})
    assert not np.array_equal(first, sampled(other, [1, 2]))


def test_samples_do_not_depend_on_neighbours():
    together = sampled(SAMPLING, [1, 2, 3])
    assert np.array_equal(together[0], sampled(SAMPLING, [1])[0])
    assert np.array_equal(together[1], sampled(SAMPLING, [7, 2])[1])
    assert np.array_equal(together[2], sampled(SAMPLING, [3], numbers=[2])[0])


def test_equal_prompts_in_a_batch_get_different_samples():
    first, second = sampled(SAMPLING, [1, 1])
    assert not np.array_equal(first, second)


def test_a_neighbour_that_ends_changes_nothing():
    config = SAMPLING.model_copy(update={"repetition_penalty": 1.3})
    whole, shrinking = Sampler(config, [[1], [2]]), Sampler(config, [[1], [2]])
    for step in range(10):
        logits = random_logits(step, batch=2, vocab=50)
        both = whole(logits)
        if step < 4:
            assert np.array_equal(shrinking(logits).ids, both.ids)
        else:
            assert shrinking(logits[1:], rows=[1]).ids[0] == both.ids[1]


def test_the_ends_of_the_unit_interval():
    probabilities = np.array([[0, 0.25, 0, 0.75, 0]], dtype=np.float32)
    for uniform, expected in [(0.0, 1), (0.25, 3), (np.nextafter(1.0, 0), 3), (1.0, 3)]:
        assert sampling.draw(probabilities, np.array([uniform])).tolist() == [expected]


@pytest.mark.parametrize(
    ("bad", "found"), [(np.nan, "nan"), (np.inf, "inf"), (None, "-inf")], ids=str
)
def test_logits_that_are_not_finite(bad, found):
    logits = random_logits(6)
    if bad is None:
        logits[1] = -np.inf
    else:
        logits[1, 7] = bad
    for config in (GenerationConfig(), GenerationConfig(temperature=1.0)):
        with pytest.raises(
            GenerationError, match=f"logits are not finite: sequence 1: largest logit {found}: "
        ):
            Sampler(config, [[]] * 3)(logits)


@pytest.mark.parametrize(
    ("settings", "logit"),
    [
        ({"repetition_penalty": 0.01}, 1e38),
        ({"temperature": 1e-4}, 1e36),
        ({"temperature": 1e-4, "top_k": 2}, 1e36),
    ],
)
def test_scores_that_overflow_are_an_error(settings, logit):
    """Not token 0: inf - inf is NaN, and a draw from NaN would be the first token."""
    logits = np.full((1, 4), logit, dtype=np.float32)
    with pytest.raises(GenerationError, match=r"logits are not finite: sequence 0: .*inf"):
        Sampler(GenerationConfig(**settings), [[2]])(logits)


def test_the_sequence_in_the_message_is_the_caller_s():
    logits = np.full((1, 4), np.nan, dtype=np.float32)
    with pytest.raises(GenerationError, match="sequence 2: "):
        Sampler(GenerationConfig(), [[]] * 3)(logits, rows=[2])


@pytest.mark.parametrize("shape", [(4,), (2, 4), (3, 1, 4)])
def test_logits_of_a_wrong_shape(shape):
    with pytest.raises(ValueError, match="for 3 sequences"):
        Sampler(GenerationConfig(), [[]] * 3)(np.zeros(shape, dtype=np.float32))
