"""Documents in one window see nothing of each other: each gets the logits it gets alone."""

import numpy as np
import pytest
from mindspore import Tensor
from support.hf import hf_logits, make_pair
from support.models import fill

from mistral_ms.config import DROPLESS
from mistral_ms.layers import output_logits
from mistral_ms.models import CausalLM

LENGTHS = [(5, 1, 6), (3, 4, 2)]
"""Documents of the two rows; the second row ends with padding."""
TOLERANCE = 2e-5
"""Of the largest logit: what alignment promises in float32."""


def packed(rng, positions_restart=True):
    ids = rng.integers(3, 320, (2, 12)).astype(np.int32)
    positions, segments = np.full((2, 12), -1, np.int32), np.full((2, 12), -1, np.int32)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for number, length in enumerate(lengths):
            first = 0 if positions_restart else start
            positions[row, start : start + length] = np.arange(first, first + length)
            segments[row, start : start + length] = number
            start += length
    return ids, positions, segments


def logits_of(model, ids, positions, segments=None):
    arrays = [ids, positions] if segments is None else [ids, positions, segments]
    hidden, _ = model.hidden_states(*map(Tensor, arrays))
    return output_logits(hidden, model.head_weight()).asnumpy().reshape(*ids.shape, -1)


@pytest.fixture(scope="module", params=["mixtral", "mixtral-sliding-window"])
def pair(request):
    return make_pair(request.param)


def test_each_document_is_alone(pair):
    check(pair)


def test_each_document_is_alone_in_a_graph(graph):
    """With a window, which meets the documents' ends."""
    check(make_pair("mixtral-sliding-window"))


def check(pair):
    model = fill(CausalLM(pair.config, DROPLESS), pair.weights())
    ids, positions, segments = packed(np.random.default_rng(2))
    got = logits_of(model, ids, positions, segments)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            alone = ids[row : row + 1, start : start + length]
            want = hf_logits(pair, alone, np.arange(length)[None])[0]
            bound = TOLERANCE * np.abs(want).max()
            assert np.abs(got[row, start : start + length] - want).max() <= bound, (row, start)
            start += length


def test_without_segments_they_are_seen(pair):
    """The positions alone do not keep documents apart."""
    model = fill(CausalLM(pair.config, DROPLESS), pair.weights())
    ids, positions, segments = packed(np.random.default_rng(2))
    apart, together = logits_of(model, ids, positions, segments), logits_of(model, ids, positions)
    assert np.abs(apart[0, :5] - together[0, :5]).max() > 0.01


def test_one_segment_changes_nothing(pair):
    model = fill(CausalLM(pair.config, DROPLESS), pair.weights())
    ids = np.random.default_rng(2).integers(3, 320, (2, 12)).astype(np.int32)
    positions = np.broadcast_to(np.arange(12, dtype=np.int32), (2, 12)).copy()
    segments = np.full((2, 12), 7, np.int32)
    want = logits_of(model, ids, positions)
    assert np.array_equal(logits_of(model, ids, positions, segments), want)
