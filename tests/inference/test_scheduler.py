"""Sequences in slots: what each is given is what it gets alone; and who is computed when."""

import functools

import numpy as np
import pytest
from mindspore import Tensor, nn
from support.hf import hf_greedy, make_pair

from mistral_ms.config import GenerationConfig
from mistral_ms.inference import Engine
from mistral_ms.inference.scheduler import Scheduler
from mistral_ms.inference.sequence import RunningSequence
from mistral_ms.inference.steps import Steps, StepShape

SAMPLED = {"temperature": 1.2, "top_p": 0.9, "repetition_penalty": 1.1}
LENGTHS = (2, 30, 5, 17, 1, 9, 26, 4, 12)
"""Of prompts, of which three have a slot: some longer than a chunk, all used after one another."""
REQUESTS = [
    GenerationConfig(max_new_tokens=4 + 5 * (n % 4), seed=n, **(SAMPLED if n % 3 == 1 else {}))
    for n in range(len(LENGTHS))
]


def prompts():
    rng = np.random.default_rng(3)
    return [rng.integers(3, 320, length).tolist() for length in LENGTHS]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """A function of a kind: a tiny Hugging Face model without EOS, and a function of a number of
    slots: an engine with its weights.
    """

    @functools.cache
    def make(kind):
        pair = make_pair(kind, eos_token_id=None)
        path = tmp_path_factory.mktemp(kind)
        pair.hf.save_pretrained(path)
        sizes = {"max_length": 64, "chunk": 8, "with_tokenizer": False}

        def engine(batch):
            """``broken``: one of its own, not compiled, for a test to break."""
            if batch == "broken":
                return Engine.load(path, batch=3, graph=False, **sizes)
            return Engine.load(path, batch=batch, **sizes)

        return pair, functools.cache(engine)

    return make


@pytest.mark.parametrize(
    "kind",
    [
        "mistral-sliding-window",  # a rolling cache of 14 columns
        pytest.param("mixtral", marks=pytest.mark.slow),
    ],
)
def test_every_sequence_is_as_if_alone(load, kind):
    """In compiled graphs, each sequence with settings of its own."""
    pair, engines = load(kind)
    alone, together = engines(1), engines(3)
    assert kind == "mixtral" or together.model.key_positions.spec.length == 14
    shapes = together.steps.fixed_shapes(together.chunk)
    assert len(shapes) == 2
    assert all(shape.tokens < together.batch * shape.columns for shape in shapes[:1]), "packed"
    together.steps.compile({together.steps.one, *shapes})
    scheduler = Scheduler(together.steps, shapes, together.model.clear_cache)
    sequences = [together.sequence(*each) for each in zip(prompts(), REQUESTS, strict=True)]
    for sequence in sequences:
        scheduler.add(sequence)
    while scheduler.busy:
        scheduler.step()
    for sequence, prompt, request in zip(sequences, prompts(), REQUESTS, strict=True):
        if request.greedy:
            assert sequence.new_ids == hf_greedy(pair, prompt, request.max_new_tokens)
        (done,) = alone.generate([prompt], request).completions
        assert sequence.new_ids == list(done.token_ids)
        # float32 logits near 10, of products in other shapes
        np.testing.assert_allclose(sequence.logprobs, done.logprobs, atol=5e-5)


def test_more_prompts_than_slots(load):
    """Numbers of prompts, and so their random numbers, are those of the request."""
    _, engines = load("mistral-sliding-window")
    request = GenerationConfig(max_new_tokens=6, seed=5, **SAMPLED)
    found = engines(3).generate(prompts(), request)
    wanted = engines(1).generate(prompts(), request)
    assert [c.token_ids for c in found.completions] == [c.token_ids for c in wanted.completions]
    assert found.prefill_tokens == wanted.prefill_tokens == sum(LENGTHS)
    assert found.decode_tokens == wanted.decode_tokens == 5 * len(LENGTHS)


class FakeStep:
    """The likeliest token of a row is its newest position, modulo 7; records its calls."""

    packs = True

    def __init__(self, batch):
        self.batch, self.calls, self.broken = batch, [], None

    def __call__(self, ids, positions, last, rows=None, places=None):
        positions = positions.asnumpy()
        self.calls.append([[int(p) for p in row if p >= 0] for row in positions])
        logits = np.zeros((self.batch, 7), np.float32)
        for row in range(self.batch):
            logits[row, positions[row].max() % 7] = 1.0
            if self.broken is not None and self.broken in positions[row]:
                logits[row] = np.nan

        class Logits:
            def asnumpy(self):
                return logits

        return Logits()


class Run:
    """A scheduler over a step that computes nothing."""

    def __init__(self, batch, chunk=8):
        self.step, self.cleared = FakeStep(batch), 0
        steps = Steps(self.step, graph=False)
        self.scheduler = Scheduler(steps, steps.fixed_shapes(chunk), self._clear)

    def _clear(self):
        self.cleared += 1

    def add(self, length, new, **settings):
        request = GenerationConfig(max_new_tokens=new, **settings)
        sequence = RunningSequence([1] * length, request, (), 1000, None)
        self.scheduler.add(sequence)
        return sequence

    def rows(self, steps):
        """How many tokens of each row the next steps compute."""
        before = len(self.step.calls)
        for _ in range(steps):
            self.scheduler.step()
        return [[len(row) for row in call] for call in self.step.calls[before:]]


def test_a_long_prompt_does_not_stall_the_others():
    run = Run(3)
    run.add(1, 9)
    run.rows(2)
    run.add(20, 2)
    # with at most a chunk of 8 beside one token for each of the three
    assert run.rows(6) == [[1, 8, 0], [1, 8, 0], [1, 2, 0], [1, 2, 0], [1, 1, 0], [1, 0, 0]]
    assert run.step.calls[2][1] == list(range(8))
    assert run.step.calls[4][1] == [16, 17]


def test_the_oldest_prompt_first():
    """All prompts together have the room of one chunk."""
    run = Run(3)
    run.add(7, 3)
    run.add(7, 1)
    run.add(3, 1)
    assert run.rows(2) == [[7, 4, 0], [1, 3, 3]]


def test_a_slot_is_taken_at_once():
    run = Run(2, chunk=4)
    first, second, third = run.add(1, 2), run.add(1, 5), run.add(3, 2)
    assert run.rows(1) == [[1, 1]]
    assert run.scheduler.waiting == 1
    assert run.rows(3) == [[1, 1], [3, 1], [1, 1]]
    assert first.finished
    assert third.finished
    assert not second.finished
    assert run.rows(1) == [[0, 1]]
    assert not run.scheduler.busy
    assert run.scheduler.step() == []


def test_cancelling():
    run = Run(2)
    sequences = [run.add(1, 50) for _ in range(4)]
    run.rows(2)
    run.scheduler.cancel(sequences[0])  # has a slot
    run.scheduler.cancel(sequences[2])  # waits for one
    run.scheduler.cancel(sequences[0])
    assert (run.scheduler.running, run.scheduler.waiting) == (1, 1)
    assert run.rows(1) == [[1, 1]]
    assert run.step.calls[-1][0] == [0], "the last one begins in the first slot"
    assert [s.finish_reason for s in sequences] == ["cancelled", None, "cancelled", None]
    assert [len(s.new_ids) for s in sequences] == [2, 3, 0, 1]


def test_logits_that_are_not_finite_end_one_sequence():
    """Its slot would spoil the next one's sums, and is used again when all were cleared."""
    run = Run(2, chunk=4)
    run.step.broken = 3
    broken, other, next_one = run.add(3, 9), run.add(1, 3), run.add(1, 2)
    run.rows(2)
    assert broken.finish_reason == "error"
    assert "not finite" in str(broken.error)
    assert broken.new_ids == [2]
    assert run.rows(1) == [[0, 1]]
    assert other.finish_reason == "length"
    assert run.cleared == 0
    assert run.rows(1) == [[1, 0]]
    assert run.cleared == 1
    assert not next_one.finished


def test_a_slot_that_holds_what_is_not_finite_is_left_out():
    """While others run, whose slots are taken as they end."""
    run = Run(4, chunk=4)
    run.step.broken = 3
    broken, others, next_one = run.add(3, 9), [run.add(1, 20) for _ in range(3)], run.add(1, 2)
    run.rows(2)
    assert broken.finish_reason == "error"
    run.step.broken = None
    run.rows(2)
    assert (run.scheduler.waiting, run.step.calls[-1][0]) == (1, [])
    run.scheduler.cancel(others[1])
    run.rows(1)
    assert (run.scheduler.waiting, run.step.calls[-1][0], len(next_one.new_ids)) == (0, [], 1)


def test_a_prompt_that_is_cancelled_may_have_left_what_is_not_finite():
    """Nobody has seen its logits; the queue waits as soon as half of the slots are like that."""
    run = Run(4, chunk=4)
    long = [run.add(20, 2) for _ in range(2)]
    other, waiting = run.add(1, 9), [run.add(1, 2) for _ in range(3)]
    run.rows(1)
    for each in long:
        run.scheduler.cancel(each)
    run.rows(2)
    assert (run.scheduler.running, run.scheduler.waiting) == (1, 2)
    while not other.finished:
        run.scheduler.step()
    assert run.cleared == 0
    run.rows(1)
    assert run.cleared == 1
    assert not run.scheduler.waiting
    assert [len(each.new_ids) for each in waiting] == [2, 1, 1]


def test_what_is_not_finite_stays_with_its_sequence(load):
    """Without the C++ operator for attention, where a probability of zero times NaN is NaN."""
    _, engines = load("mistral-sliding-window")
    engine = engines("broken")
    for _, cell in engine.model.cells_and_names():
        if isinstance(getattr(cell, "cached", None), nn.Cell):
            cell.cached = None
    embedding = engine.model.weights()["embed_tokens.weight"]
    values = embedding.asnumpy().copy()
    values[7] = np.nan
    embedding.set_data(Tensor(values))
    request = GenerationConfig(max_new_tokens=3)
    ids = [7, *range(20, 29)], [9, 10], list(range(30, 42))
    scheduler = Scheduler(
        engine.steps, engine.steps.fixed_shapes(engine.chunk), engine.model.clear_cache
    )
    sequences = [engine.sequence(each, request) for each in ids]
    for sequence in sequences:
        scheduler.add(sequence)
    while scheduler.busy:
        scheduler.step()
    assert [s.finish_reason for s in sequences] == ["error", "length", "length"]


def test_few_shapes_whatever_comes():
    """What the graphs are compiled for: the step with one token each, and two more."""
    run, rng = Run(4, chunk=16), np.random.default_rng(0)
    shapes = []
    for _ in range(40):
        run.add(int(rng.integers(1, 60)), int(rng.integers(1, 8)))
    steps = run.scheduler._steps
    call = steps._run
    steps._run = lambda shape, *arrays: shapes.append(shape) or call(shape, *arrays)
    while run.scheduler.busy:
        run.scheduler.step()
    assert set(shapes) == {StepShape(16, 20), StepShape(4, 8), StepShape(1, 4)}


@pytest.mark.parametrize(
    ("lengths", "shapes"),
    [
        ([5], [StepShape(8, 16)]),
        ([1, 1], []),
        ([16, 16, 16, 16], [StepShape(16, 64)]),  # nothing to pack
        ([16, 2, 2, 2], [StepShape(16, 32)]),
        ([100, 2, 2, 2], [StepShape(16, 32)]),  # more than a chunk
        ([16, 16, 16, 16, 3, 4], [StepShape(16, 64), StepShape(8, 12)]),
        ([3, 3, 3, 3, 3], [StepShape(4, 16), StepShape(4, 8)]),
    ],
)
def test_shapes_for_known_prompts(lengths, shapes):
    assert list(Steps(FakeStep(4), graph=False).prefill_shapes(lengths, 16)) == shapes
