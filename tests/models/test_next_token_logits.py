"""A cached model computes what the uncached one does, however the text is fed to it."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from support.hf import hf_logits, make_pair
from support.models import fill, ragged_batch

from mistral_ms.errors import ConfigError
from mistral_ms.inference.steps import Piece, Steps, StepShape
from mistral_ms.layers import CacheSpec
from mistral_ms.models import CausalLM, NextTokenLogits

RELATIVE = 2e-5
"""The promised bound on the logit difference over the largest logit; 1e-6 to 3e-6 measured."""


class Case:
    """Ragged texts, Hugging Face's logits after every token, and a cached model."""

    def __init__(self, kind, lengths, chunk, *, spec=None, how="pynative", **overrides):
        self.pair = make_pair(kind, **overrides)
        self.lengths, self.chunk = lengths, chunk
        self.ids, self.position_ids = ragged_batch(lengths, self.pair.config.vocab_size)
        self.want = hf_logits(self.pair, self.ids, self.position_ids)
        self.bound = RELATIVE * np.abs(self.want[self.position_ids >= 0]).max()
        batch, width = self.ids.shape
        self.spec = spec or CacheSpec.for_model(self.pair.config, batch, width, chunk)
        self.model = fill(CausalLM(self.pair.config, cache=self.spec), self.pair.weights())
        step = NextTokenLogits(self.model)
        self.step = ms.jit(step.construct, fullgraph=True) if how == "jit" else step

    def feed(self, columns, rows=None):
        """Feeds these columns of each row's text, as one call, right-padded; checks the logits.

        Args:
            columns: first and last column + 1 per row.
        """
        width = max(self.chunk if rows is None else rows, 1)
        ids = np.full((len(columns), width), 3, np.int32)
        position_ids, last = np.full_like(ids, -1), np.zeros(len(columns), np.int32)
        for b, (start, end) in enumerate(columns):
            end = min(end, self.lengths[b])
            if start < end:
                ids[b, : end - start] = self.ids[b, start:end]
                position_ids[b, : end - start] = np.arange(start, end)
                last[b] = end - start - 1
        got = self.step(Tensor(ids), Tensor(position_ids), Tensor(last)).numpy()
        assert got.dtype == np.float32
        checked = 0
        for b, (start, end) in enumerate(columns):
            end = min(end, self.lengths[b])
            if start < end:
                difference = np.abs(got[b] - self.want[b, end - 1]).max()
                assert difference <= self.bound, (b, end - 1)
                checked += 1
        assert checked

    def feed_all(self):
        for start in range(0, max(self.lengths), self.chunk):
            self.feed([(start, start + self.chunk)] * len(self.lengths))


RAGGED = [17, 9, 13]


@pytest.mark.parametrize(
    ("kind", "chunk"),
    [
        ("mixtral", 17),
        ("mixtral", 5),
        ("mistral-sliding-window", 17),
        ("mistral-sliding-window", 5),
        ("one-kv-head", 5),
        ("tied-head", 5),
    ],
)
def test_prefill_in_chunks_that_divide_and_do_not(kind, chunk):
    Case(kind, RAGGED, chunk).feed_all()


def test_token_by_token():
    Case("mixtral-sliding-window", [10, 6], 1).feed_all()


@pytest.mark.parametrize(
    ("kind", "chunk"),
    [
        ("mistral-sliding-window", 1),
        ("mistral-sliding-window", 7),
        ("mixtral-sliding-window", 4),
    ],
)
def test_a_rolling_buffer_shorter_than_the_text(kind, chunk):
    case = Case(kind, [30, 22], chunk)
    assert case.spec.length < 22
    case.feed_all()


def decode(case, prompts):
    """Prefills ragged prompts in chunks; then one token per row, each at its own position."""
    for start in range(0, max(prompts), case.chunk):
        case.feed([(start, max(start, min(start + case.chunk, n))) for n in prompts])
    ends = list(prompts)
    while any(end < length for end, length in zip(ends, case.lengths, strict=True)):
        case.feed([(end, end + 1) for end in ends], rows=1)  # rows that have ended feed padding
        ends = [min(end + 1, n) for end, n in zip(ends, case.lengths, strict=True)]


@pytest.mark.parametrize("kind", ["mixtral", "mistral-sliding-window"])
def test_ragged_prompts_then_one_token_each(kind):
    decode(Case(kind, [14, 10, 16], 5, spec=CacheSpec(3, 16)), prompts=[8, 3, 11])


def test_a_longer_cache_than_needed_changes_nothing():
    Case("mistral-sliding-window", RAGGED, 4, spec=CacheSpec(3, 29)).feed_all()


def test_reset_forgets_the_texts():
    """Columns of the old texts that the new ones do not overwrite must not be seen."""
    case = Case("mixtral", RAGGED, 6)
    case.feed_all()
    case.model.reset_cache()
    assert (case.model.key_positions.held.numpy() == -1).all()
    case.ids, case.lengths = case.ids[::-1].copy(), case.lengths[::-1]
    case.want = case.want[::-1]
    case.feed_all()


def test_what_stands_in_padding_changes_no_bit():
    case = Case("mixtral", RAGGED, 17)
    last = Tensor(np.array(RAGGED, np.int32) - 1)
    first = case.step(Tensor(case.ids), Tensor(case.position_ids), last).numpy()
    case.model.reset_cache()
    other = np.where(case.position_ids >= 0, case.ids, 5).astype(np.int32)
    second = case.step(Tensor(other), Tensor(case.position_ids), last).numpy()
    np.testing.assert_array_equal(first, second)


def test_the_whole_chunks_logits_too():
    """CausalLM itself, cached: every position of the chunk, not only the last."""
    case = Case("mistral-sliding-window", RAGGED, 5)
    for start in range(0, 17, 5):
        position_ids = case.position_ids[:, start : start + 5]
        got = case.model(Tensor(case.ids[:, start : start + 5].copy()), Tensor(position_ids.copy()))
        difference = np.abs(got.numpy() - case.want[:, start : start + 5])[position_ids >= 0]
        assert difference.max() <= case.bound


def test_jit_prefill_decode_and_reset():
    """Two compilations (a chunk, one token) that share one cache, as generation uses them."""
    case = Case("mixtral", [12, 7], 4, spec=CacheSpec(2, 12), how="jit")
    decode(case, prompts=[9, 3])
    case.model.reset_cache()
    decode(case, prompts=[5, 6])


def test_strict_graph_with_a_rolling_buffer(graph):
    case = Case("mistral-sliding-window", [22, 15], 4)
    case.feed_all()
    case.model.reset_cache()
    case.feed_all()


def test_half_precision_caches_half_precision():
    """Cached and uncached run the same float16 operations on the same numbers."""
    pair = make_pair("mixtral", initializer_range=0.05)
    ids, position_ids = ragged_batch(RAGGED, pair.config.vocab_size)
    whole = fill(CausalLM(pair.config, dtype="float16"), pair.weights())
    want = whole(Tensor(ids), Tensor(position_ids)).numpy()
    spec = CacheSpec.for_model(pair.config, 3, 17, 17)
    cached = fill(CausalLM(pair.config, dtype="float16", cache=spec), pair.weights())
    assert {p.dtype for p in cached.get_parameters() if p.ndim == 2} == {ms.float16}
    last = Tensor(np.array(RAGGED, np.int32) - 1)
    got = NextTokenLogits(cached)(Tensor(ids), Tensor(position_ids), last).numpy()
    ends = want[np.arange(3), np.array(RAGGED) - 1]
    # one unit of float16 (2^-10) where a sum over one more, hidden, column rounds differently
    assert np.abs(got - ends).max() <= 2**-10 * np.abs(ends).max()


@pytest.mark.parametrize("kind", ["mixtral", "mistral-sliding-window"])
def test_packed_rows(mode, kind):
    """A piece of one text, a token of another, nothing of the third, and room to spare."""
    case = Case(kind, [12, 9, 6], 12)
    steps = Steps(case.step, graph=mode == "graph")
    taken = [0, 0, 0]
    for counts in [(5, 0, 3), (4, 1, 0), (1, 6, 2)]:
        pieces = [
            Piece(row, start, case.ids[row, start : start + count])
            for row, (start, count) in enumerate(zip(taken, counts, strict=True))
            if count
        ]
        got = steps(StepShape(7, 10), pieces)
        taken = [a + b for a, b in zip(taken, counts, strict=True)]
        for piece in pieces:
            difference = np.abs(got[piece.row] - case.want[piece.row, taken[piece.row] - 1]).max()
            assert difference <= case.bound


def test_a_model_without_a_cache_is_refused():
    with pytest.raises(ConfigError, match=r"model without a cache: .*CausalLM\(cache=\.\.\.\)"):
        NextTokenLogits(CausalLM(make_pair("mixtral").config))
