"""Sequences cover the text exactly; batches are a pure function of seed and step."""

import numpy as np
import pytest

from mistral_ms.config import IGNORE_INDEX
from mistral_ms.datasets import InMemorySequences
from mistral_ms.datasets.batches import pack_sequences
from mistral_ms.errors import DataError


class TestPackWindows:
    def test_by_hand(self):
        inputs, labels, positions = pack_sequences([1, 10, 11, 12, 13, 14, 15], 4)
        assert inputs.tolist() == [[1, 10, 11, 12], [13, 14, 0, 0]]
        assert labels.tolist() == [[10, 11, 12, 13], [14, 15, IGNORE_INDEX, IGNORE_INDEX]]
        assert positions.tolist() == [[0, 1, 2, 3], [0, 1, -1, -1]]
        assert {a.dtype for a in (inputs, labels, positions)} == {np.dtype(np.int32)}

    @pytest.mark.parametrize("length", [2, 8, 9, 10, 60])
    def test_every_token_but_the_first_is_predicted_once_and_in_order(self, length):
        ids = list(range(1, length + 1))
        inputs, labels, positions = pack_sequences(ids, 8)
        predicted = labels != IGNORE_INDEX
        assert labels[predicted].tolist() == ids[1:]
        assert inputs[predicted].tolist() == ids[:-1]
        assert np.array_equal(predicted, positions >= 0)

    def test_a_text_that_fits_exactly_has_no_padding(self):
        _, labels, positions = pack_sequences(range(17), 8)
        assert labels.shape == (2, 8)
        assert positions.min() == 0

    @pytest.mark.parametrize("ids", [[], [1]])
    def test_nothing_to_predict(self, ids):
        with pytest.raises(DataError, match=rf"nothing to learn: {len(ids)} tokens: at least two"):
            pack_sequences(ids, 8)


@pytest.fixture
def text():
    """61 tokens: seven sequences of eight, and one of four."""
    return np.random.default_rng(3).integers(3, 48, 61).tolist()


class TestInMemoryWindows:
    def source(self, text, batch_size=3, seed=5):
        return InMemorySequences(text, seq_length=8, batch_size=batch_size, seed=seed)

    def test_each_epoch_shows_each_window_once(self, text):
        source = self.source(text)
        assert source.sequences == 8
        stream = np.concatenate([source.batch(step).samples_B for step in range(16)])
        epochs = stream.reshape(6, 8)
        assert all(sorted(epoch) == list(range(8)) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 6

    def test_a_batch_holds_the_windows_that_it_names(self, text):
        inputs, labels, positions = pack_sequences(text, 8)
        batch = self.source(text).batch(4)
        assert np.array_equal(batch.ids_BS, inputs[batch.samples_B])
        assert np.array_equal(batch.labels_BS, labels[batch.samples_B])
        assert np.array_equal(batch.positions_BS, positions[batch.samples_B])
        assert {a.dtype for a in (batch.ids_BS, batch.labels_BS, batch.positions_BS)} == {
            np.dtype(np.int32)
        }

    def test_any_step_can_be_asked_for_first(self, text):
        forward, backward = self.source(text), self.source(text)
        ahead = [forward.batch(step).samples_B.tolist() for step in range(20)]
        behind = [backward.batch(step).samples_B.tolist() for step in reversed(range(20))]
        assert ahead == behind[::-1]

    def test_the_seed_decides_the_order(self, text):
        orders = [self.source(text, 8, seed).batch(0).samples_B.tolist() for seed in (5, 5, 6)]
        assert orders[0] == orders[1] != orders[2]

    def test_a_batch_may_be_larger_than_an_epoch(self, text):
        counts = np.bincount(self.source(text, batch_size=20).batch(0).samples_B)
        assert counts.min() == 2
        assert counts.max() == 3

    def test_counts_predicted_tokens(self, text):
        source = self.source(text, batch_size=8)
        assert source.batch(0).tokens == len(text) - 1


class TestSplit:
    def test_parts_are_the_rows_in_order(self, text):
        batch = InMemorySequences(text, 8, 6, seed=5).batch(3)
        for parts in (1, 2, 3, 6):
            cut = batch.split(parts)
            assert len(cut) == parts
            for name in ("ids_BS", "labels_BS", "positions_BS", "segments_BS", "samples_B"):
                joined = np.concatenate([getattr(part, name) for part in cut])
                assert np.array_equal(joined, getattr(batch, name))
            assert sum(part.tokens for part in cut) == batch.tokens
            assert sum(part.present for part in cut) == batch.present

    def test_unequal_parts_are_refused(self, text):
        with pytest.raises(ValueError, match="6 rows cannot be cut into 4 equal parts"):
            InMemorySequences(text, 8, 6, seed=5).batch(0).split(4)
