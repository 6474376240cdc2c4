"""Packing against a loop over single tokens, and against sequences written by hand."""

import itertools
import tracemalloc

import numpy as np
import pytest

from mistral_ms.config import IGNORE_INDEX, DataConfig
from mistral_ms.datasets import Packer
from mistral_ms.datasets.batches import pack_sequences
from mistral_ms.datasets.encoding import TokenRun


def pack(documents, config, pieces=1):
    """Sequences as lists, and the counts; ``documents`` are (ids, counted), given in pieces."""
    packer = Packer(config)
    sequences = []
    for ids, counted in documents:
        starts = True
        for part in np.array_split(np.arange(len(ids)), min(pieces, len(ids))):
            run = TokenRun(np.array(ids, np.int32)[part], np.array(counted)[part], starts)
            sequences += packer.add(run)
            starts = False
    sequences += packer.finish()
    arrays = [(w.ids_S, w.labels_S, w.positions_S, w.segments_S) for w in sequences]
    assert all(a.dtype == np.int32 for sequence in arrays for a in sequence)
    return [tuple(a.tolist() for a in sequence) for sequence in arrays], packer.counts


def by_hand(documents, config):
    """One token after the other; no array in sight."""
    stream = [
        (token, counted, document, place == 0)
        for document, (ids, flags) in enumerate(documents)
        for place, (token, counted) in enumerate(zip(ids, flags, strict=True))
    ]
    S, sequences = config.seq_length, []
    for start in range(0, len(stream) - 1, S):
        ids, labels, positions, segments = [], [], [], []
        for place in range(start, min(start + S, len(stream) - 1)):
            token, _, document, _ = stream[place]
            target, counted, _, starts = stream[place + 1]
            ids.append(token)
            hidden = not counted or (starts and config.boundaries != "ignore")
            labels.append(-100 if hidden else target)
            same = [p for p in range(start, place) if stream[p][2] == document]
            apart = config.boundaries == "attention"
            positions.append(len(same) if apart else place - start)
            segments.append(document - stream[start][2] if apart else 0)
        padding = S - len(ids)
        if padding and config.drop_last:
            continue
        if set(labels) != {-100}:
            rows = ((ids, 0), (labels, -100), (positions, -1), (segments, -1))
            sequences.append(tuple(row + [fill] * padding for row, fill in rows))
    return sequences


def random_documents(seed):
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 14, rng.integers(1, 9))
    return [(rng.integers(3, 99, n).tolist(), (rng.random(n) < 0.7).tolist()) for n in lengths]


@pytest.mark.parametrize("boundaries", ["loss", "attention", "ignore"])
@pytest.mark.parametrize("drop_last", [False, True])
def test_against_the_loop(boundaries, drop_last):
    for seed, length, pieces in itertools.product(range(25), (1, 4, 7), (1, 3)):
        config = DataConfig(seq_length=length, boundaries=boundaries, drop_last=drop_last)
        documents = random_documents(seed)
        sequences, counts = pack(documents, config, pieces)
        assert sequences == by_hand(documents, config)
        labels = [label for sequence in sequences for label in sequence[1]]
        assert counts.sequences == len(sequences)
        assert counts.documents == len(documents)
        assert counts.tokens == sum(len(ids) for ids, _ in documents)
        assert counts.predicted == sum(label != -100 for label in labels)
        assert counts.padded == sum(sequence[2].count(-1) for sequence in sequences)
        inputs = counts.sequences * length - counts.padded
        if not counts.silent_sequences:
            assert inputs + counts.dropped == counts.tokens - 1


DOCUMENTS = [([1, 10, 11, 2], [True] * 4), ([1, 20, 2], [True] * 3)]
X = IGNORE_INDEX
BY_HAND = {
    "ignore": [
        ([1, 10, 11, 2, 1], [10, 11, 2, 1, 20], [0, 1, 2, 3, 4], [0, 0, 0, 0, 0]),
        ([20, 0, 0, 0, 0], [2, X, X, X, X], [0, -1, -1, -1, -1], [0, -1, -1, -1, -1]),
    ],
    "loss": [
        ([1, 10, 11, 2, 1], [10, 11, 2, X, 20], [0, 1, 2, 3, 4], [0, 0, 0, 0, 0]),
        ([20, 0, 0, 0, 0], [2, X, X, X, X], [0, -1, -1, -1, -1], [0, -1, -1, -1, -1]),
    ],
    "attention": [
        ([1, 10, 11, 2, 1], [10, 11, 2, X, 20], [0, 1, 2, 3, 0], [0, 0, 0, 0, 1]),
        ([20, 0, 0, 0, 0], [2, X, X, X, X], [0, -1, -1, -1, -1], [0, -1, -1, -1, -1]),
    ],
}


@pytest.mark.parametrize("boundaries", BY_HAND)
def test_two_documents_in_two_windows(boundaries):
    sequences, counts = pack(DOCUMENTS, DataConfig(seq_length=5, boundaries=boundaries))
    assert sequences == BY_HAND[boundaries]
    assert (counts.documents, counts.tokens, counts.sequences, counts.padded) == (2, 7, 2, 4)
    assert counts.predicted == (6 if boundaries == "ignore" else 5)


def test_the_last_window_is_dropped_on_request():
    sequences, counts = pack(DOCUMENTS, DataConfig(seq_length=5, drop_last=True))
    assert sequences == BY_HAND["loss"][:1]
    assert (counts.sequences, counts.padded, counts.dropped) == (1, 0, 1)


def test_one_document_is_packed_as_training_packs_a_text_in_memory():
    ids = list(range(1, 24))
    sequences, _ = pack([(ids, [True] * 23)], DataConfig(seq_length=8))
    for mine, theirs in zip(zip(*sequences, strict=True), pack_sequences(ids, 8), strict=False):
        assert np.array_equal(mine, theirs)


def test_a_window_in_which_nothing_counts_is_left_out():
    documents = [([5] * 9, [False] * 8 + [True])]
    sequences, counts = pack(documents, DataConfig(seq_length=4))
    assert sequences == [([5] * 4, [X, X, X, 5], [0, 1, 2, 3], [0] * 4)]
    assert (counts.sequences, counts.silent_sequences) == (1, 1)


@pytest.mark.parametrize("length", [0, 1])
def test_too_short_for_a_window(length):
    sequences, counts = pack([([7], [True])] * length, DataConfig(seq_length=4))
    assert (sequences, counts.tokens) == ([], length)


def test_memory_does_not_grow_with_the_stream():
    def peak(runs):
        packer = Packer(DataConfig(seq_length=64))
        tracemalloc.start()
        for _ in range(runs):
            run = TokenRun(np.ones(1000, np.int32), np.ones(1000, np.bool_), True)
            for _ in packer.add(run):
                pass
        try:
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(5)  # what is allocated once
    assert peak(400) < 1.5 * peak(20)  # tokens: 20 times as many
