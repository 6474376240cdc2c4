"""Batches are a pure function of seed and step; ranks tile them."""

import numpy as np
import pytest

from mistral_ms.config import DataConfig
from mistral_ms.datasets import InMemorySequences, MindRecordSequences, build_dataset
from mistral_ms.errors import DataError

STEPS = 9
NAMES = ("ids_BS", "labels_BS", "positions_BS", "segments_BS", "samples_B")


def assert_equal(one, other):
    for name in NAMES:
        assert np.array_equal(getattr(one, name), getattr(other, name))
        assert getattr(one, name).dtype == getattr(other, name).dtype == np.int32


def test_a_batch_holds_the_windows_that_it_names(dataset, expected):
    source = MindRecordSequences(dataset, 4, seed=5)
    assert source.sequences == len(expected[0])
    assert source.seq_length == 6
    for step in range(STEPS):
        batch = source.batch(step)
        ids, labels, positions = (values[batch.samples_B] for values in expected)
        assert np.array_equal(batch.ids_BS, ids)
        assert np.array_equal(batch.labels_BS, labels)
        assert np.array_equal(batch.positions_BS, positions)
        assert batch.tokens == np.count_nonzero(labels != -100)


def test_any_order_of_asking_gives_the_same(dataset):
    forward = [MindRecordSequences(dataset, 4, 5).batch(step) for step in range(STEPS)]
    source = MindRecordSequences(dataset, 4, 5)
    for step in np.random.default_rng(0).permutation(STEPS):
        assert_equal(source.batch(int(step)), forward[step])


def test_each_epoch_shows_each_window_once_in_an_order_of_its_own(dataset):
    source = MindRecordSequences(dataset, 3, 5)
    n = source.sequences
    stream = np.concatenate([source.samples(step) for step in range(2 * n)])
    epochs = stream.reshape(6, n)
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6


def test_the_seed_decides(dataset):
    orders = {tuple(MindRecordSequences(dataset, 9, seed).samples(0)) for seed in range(5)}
    assert len(orders) == 5


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_ranks_tile_the_batch(size, dataset):
    source = MindRecordSequences(dataset, 6, 1)
    for step in range(3):
        whole = source.batch(step)
        parts = [MindRecordSequences(dataset, 6, 1).rank_batch(step, r, size) for r in range(size)]
        for name in NAMES:
            joined = np.concatenate([getattr(part, name) for part in parts])
            assert np.array_equal(joined, getattr(whole, name))
        assert {len(part.samples_B) for part in parts} == {6 // size}


@pytest.mark.parametrize(("rank", "size"), [(0, 4), (2, 2), (-1, 2), (0, 0)])
def test_a_batch_that_cannot_be_split(rank, size, dataset):
    with pytest.raises(DataError, match=rf"6 sequences, rank {rank} of {size}: .*multiple"):
        MindRecordSequences(dataset, 6, 1).rank_batch(0, rank, size)


def test_a_text_gives_the_batches_of_the_text_in_memory(tokenizer, tmp_path):
    """One document, no EOS: training on the file is training on the text, bit by bit."""
    text = "The tide turns. " * 12
    (tmp_path / "a.txt").write_text(text)
    config = DataConfig(seq_length=8, add_eos=False)
    build_dataset([tmp_path / "a.txt"], tokenizer, config, tmp_path / "out")
    ours = MindRecordSequences(tmp_path / "out", 4, 7)
    memory = InMemorySequences(tokenizer.encode(text), 8, 4, 7)
    assert ours.sequences == memory.sequences
    for step in range(5):
        assert_equal(ours.batch(step), memory.batch(step))


def test_documents_keep_their_segments(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("a b c\nd e f\n")
    config = DataConfig(seq_length=16, boundaries="attention", split_lines=True)
    build_dataset([tmp_path / "a.txt"], tokenizer, config, tmp_path / "out")
    batch = MindRecordSequences(tmp_path / "out", 1, 0).batch(0)
    assert batch.segments_BS.tolist() == [[0] * 5 + [1] * 4 + [-1] * 7]
    assert batch.positions_BS.tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3] + [-1] * 7]
    assert batch.present == 9


def test_the_digest_is_that_of_the_windows(tokenizer, tmp_path):
    """Where the text lay and what its tokenizer's file is called make no difference."""
    digests = []
    for name, text, length in (("a", "x y z " * 9, 8), ("b", "x y z " * 9, 8),
                               ("c", "x y w " * 9, 8), ("d", "x y z " * 9, 9)):  # fmt: skip
        (tmp_path / f"{name}.txt").write_text(text)
        config = DataConfig(seq_length=length)
        build_dataset([tmp_path / f"{name}.txt"], tokenizer, config, tmp_path / name)
        digests.append(MindRecordSequences(tmp_path / name, 1, 0).info.digest)
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_an_empty_batch(dataset):
    with pytest.raises(
        DataError, match=r"invalid batch: 0 of \d+ sequences: must be at least 1 of 1"
    ):
        MindRecordSequences(dataset, 0, 0)
