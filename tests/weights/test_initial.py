"""Initial values that are whole numbers: balanced by places, or by how often ids occur."""

import numpy as np

from mistral_ms.weights import balanced


def test_maps_are_balanced_random_and_different():
    rng = np.random.default_rng(0)
    maps = [balanced(50, 4, rng) for _ in range(300)]
    for found in maps:
        assert sorted(np.bincount(found, minlength=4)) == [12, 12, 13, 13]
    assert len({found.tobytes() for found in maps}) == 300
    # chi-square of the experts that token 7 got: 3 degrees of freedom, 21.1 has probability 1e-4
    counts = np.bincount([found[7] for found in maps], minlength=4)
    assert ((counts - 75) ** 2 / 75).sum() < 21.1
    biased = np.bincount([7 % 4 for _ in maps], minlength=4)  # what a plain modulus would give
    assert ((biased - 75) ** 2 / 75).sum() > 21.1


def greedy(counts, levels):
    """From the most frequent id on, into the group with the fewest tokens: sets of ids."""
    groups = [(0, set()) for _ in range(levels)]
    for token in sorted(range(len(counts)), key=lambda token: -counts[token]):
        lightest = min(range(levels), key=lambda g: groups[g][0])
        load, ids = groups[lightest]
        groups[lightest] = (load + counts[token], ids | {token})
    return {frozenset(ids) for _, ids in groups}


def test_maps_by_frequency_are_those_of_a_loop():
    """No two ids are as frequent, so that the groups of ids are determined."""
    counts = np.random.default_rng(2).permutation(500)[:60] + 1
    found = balanced(60, 5, np.random.default_rng(3), counts)
    groups = {frozenset(np.flatnonzero(found == level).tolist()) for level in range(5)}
    assert groups == greedy(counts.tolist(), 5)


def test_maps_by_frequency_are_even_in_tokens():
    """Of ids by Zipf's law the most frequent one alone has a tenth of all tokens, and an expert
    a quarter: as many ids for each expert, or a random number of them, leaves the load uneven.
    """
    counts = np.round(1e5 / np.arange(1, 2001))
    rng = np.random.default_rng(1)
    loads = {
        name: np.bincount(each, counts, minlength=4)
        for name, each in (
            ("hash", rng.integers(0, 4, 2000)),
            ("ids", balanced(2000, 4, rng)),
            ("tokens", balanced(2000, 4, rng, counts)),
        )
    }
    varies = {name: load.std() / load.mean() for name, load in loads.items()}
    assert min(varies["hash"], varies["ids"]) > 0.05
    # the last id that an expert gets has 50 tokens of 2e5
    assert varies["tokens"] < 1e-3
