"""The engine against Hugging Face's generate, and against itself without batch, cache or chunks."""

import functools

import numpy as np
import pytest
import torch
from mindspore import Tensor, ops
from support.hf import hf_greedy, make_pair
from support.models import fill

from mistral_ms.config import GenerationConfig
from mistral_ms.errors import CheckpointError, GenerationError
from mistral_ms.inference import Engine
from mistral_ms.inference.dtypes import check_weights_dtype
from mistral_ms.models import CausalLM
from mistral_ms.tokenizer import copy_files, packaged_tokenizer

NEW = 24
GREEDY = GenerationConfig(max_new_tokens=NEW)
RAGGED = [[1, 5, 9, 200, 31, 8, 8, 17, 90, 44, 3], [1, 77], [1, 13, 14, 15, 16, 250, 251]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A function of a kind: a tiny Hugging Face model without EOS (nothing ends early), and the
    directory it is saved in.
    """

    @functools.cache
    def make(kind, **overrides):
        pair = make_pair(kind, eos_token_id=None, **overrides)
        path = tmp_path_factory.mktemp(kind)
        pair.hf.save_pretrained(path)
        return pair, path

    return make


@pytest.fixture(scope="module")
def load(saved):
    """A function of a kind and of settings: the engine, loaded and compiled once. What it answered
    before must not matter.
    """

    @functools.cache
    def make(kind, **settings):
        settings = {"batch": 1, "max_length": 64, "chunk": 64, **settings}
        return Engine.load(saved(kind)[1], with_tokenizer=False, **settings)

    return make


def ids(generation):
    return [list(c.token_ids) for c in generation.completions]


@pytest.mark.parametrize(
    "kind",
    [
        "mixtral",
        "mistral-sliding-window",
    ],
)
def test_greedy_tokens_are_hugging_faces(saved, load, kind):
    """Of other kinds so does tests/alignment/test_align.py."""
    pair, _ = saved(kind)
    engine = load(kind, batch=3, chunk=4)
    assert ids(engine.generate(RAGGED, GREEDY)) == [hf_greedy(pair, p, NEW) for p in RAGGED]


def test_batch_chunk_and_cache_do_not_change_the_tokens(saved, load):
    """Alone, in one piece; token by token: the rolling buffer below; more prompts than slots:
    test_scheduler.py.
    """
    pair, _ = saved("mixtral")
    expected = [hf_greedy(pair, p, NEW) for p in RAGGED]
    engine = load("mixtral")
    assert ids(engine.generate(RAGGED, GREEDY)) == expected
    assert ids(engine.generate(RAGGED[1:], GREEDY)) == expected[1:], "second request"


@pytest.mark.slow
def test_pynative_gives_the_same_tokens(saved, load):
    pair, _ = saved("mixtral-sliding-window")
    engine = load("mixtral-sliding-window", batch=2, chunk=3, graph=False)
    short = GenerationConfig(max_new_tokens=4)
    assert ids(engine.generate(RAGGED[:2], short)) == [hf_greedy(pair, p, 4) for p in RAGGED[:2]]


def test_greedy_equals_recomputing_everything_without_a_cache(saved, load):
    pair, _ = saved("mixtral")
    model = fill(CausalLM(pair.config), pair.weights())
    tokens = list(RAGGED[0])
    for _ in range(8):
        row = np.array([tokens], np.int32)
        logits = model(Tensor(row), Tensor(np.arange(len(tokens), dtype=np.int32)[None]))
        tokens.append(int(logits.asnumpy()[0, -1].argmax()))
    out = load("mixtral").generate([RAGGED[0]], GenerationConfig(max_new_tokens=8))
    assert ids(out) == [tokens[len(RAGGED[0]) :]]


@pytest.mark.slow
def test_float16_computes_the_same_first_token(saved, load):
    pair, _ = saved("mixtral")
    out = load("mixtral", dtype="float16").generate([RAGGED[0]], GenerationConfig(max_new_tokens=1))
    assert ids(out) == [hf_greedy(pair, RAGGED[0], 1)]


@pytest.mark.slow
def test_rolling_buffer_is_shorter_than_the_text(saved, load):
    """The prompt goes through it token by token, too."""
    pair, _ = saved("mistral-sliding-window")
    engine = load("mistral-sliding-window", max_length=128, chunk=1)
    assert engine.model.key_positions.spec.length == 7 + 1 - 1
    out = engine.generate([RAGGED[0]], GenerationConfig(max_new_tokens=60))
    assert ids(out) == [hf_greedy(pair, RAGGED[0], 60)]


def test_sampling_does_not_depend_on_the_neighbours(load):
    request = GenerationConfig(max_new_tokens=12, temperature=1.5, top_p=0.9, seed=7)
    together, alone = load("mixtral", batch=3, chunk=4), load("mixtral")
    assert ids(together.generate(RAGGED, request)) == ids(alone.generate(RAGGED, request))
    other = request.model_copy(update={"seed": 8})
    assert ids(together.generate(RAGGED, request)) != ids(together.generate(RAGGED, other))


def test_logprobs_are_the_models_own(saved, load):
    pair, _ = saved("mixtral")
    (done,) = load("mixtral").generate([RAGGED[0]], GREEDY).completions
    whole = torch.tensor([RAGGED[0] + list(done.token_ids)])
    with torch.no_grad():
        logp = pair.hf(whole).logits.log_softmax(-1)[0]
    start = len(RAGGED[0]) - 1
    expected = [logp[start + i, t].item() for i, t in enumerate(done.token_ids)]
    # float32 logits of two implementations: 1e-6 of the largest logit, which is near 10
    np.testing.assert_allclose(done.logprobs, expected, atol=5e-5)


@pytest.fixture(scope="module")
def text_engine(saved):
    sizes = dict(vocab_size=32000, hidden_size=32, max_position_embeddings=64)
    _, path = saved("mixtral", **sizes)
    copy_files(packaged_tokenizer(), path)
    return Engine.load(path, batch=2, max_length=48)


class TestText:
    """With the real tokenizer: what users read."""

    @pytest.fixture
    def engine(self, text_engine):
        return text_engine

    def test_stream_is_the_text_and_the_text_decodes_the_ids(self, engine):
        prompts = [engine.tokenizer.encode(t) for t in ("The harbour", "Eight workshops")]
        streamed = ["", ""]

        def collect(number, text):
            streamed[number] += text

        out = engine.generate(prompts, GREEDY, collect)
        for prompt, text, done in zip(prompts, streamed, out.completions, strict=True):
            before = engine.tokenizer.decode(prompt)
            assert text == done.text
            assert engine.tokenizer.decode(prompt + list(done.token_ids)) == before + text

    def test_stop_string_ends_and_is_not_shown(self, engine):
        prompt = engine.tokenizer.encode("The harbour")
        text = engine.generate([prompt], GREEDY).completions[0].text
        stop = text[len(text) // 2 : len(text) // 2 + 3]
        (cut,) = engine.generate([prompt], GREEDY.model_copy(update={"stop": (stop,)})).completions
        assert cut.finish_reason == "stop"
        assert cut.text == text[: text.index(stop)]
        assert len(cut.token_ids) < NEW

    def test_eos_ends(self, engine, monkeypatch):
        prompt = engine.tokenizer.encode("The harbour")
        tokens = engine.generate([prompt], GREEDY).completions[0].token_ids
        monkeypatch.setattr(engine, "eos_ids", (tokens[4],))
        (done,) = engine.generate([prompt], GREEDY).completions
        assert done.finish_reason == "eos"
        assert done.token_ids == tokens[: tokens.index(tokens[4]) + 1]

    def test_length_is_the_positions_left(self, engine):
        prompt = list(range(3, 3 + 40))
        (done,) = engine.generate([prompt], GREEDY).completions
        assert (len(done.token_ids), done.finish_reason) == (8, "length")


class TestBadInput:
    @pytest.fixture
    def engine(self, load):
        return load("mixtral")

    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            ([], r"empty prompt: prompt 0"),
            ([320], r"outside the vocabulary: prompt 0: 320: 0 to 319"),
            ([-1], r"outside the vocabulary: prompt 0: -1"),
            ([1] * 300, r"prompt 0: 300 tokens: max_position_embeddings is 256"),
            ([1] * 64, r"prompt too long: prompt 0: 64 tokens: .* 64 positions"),
        ],
    )
    def test_prompt(self, engine, prompt, message):
        with pytest.raises(GenerationError, match=message):
            engine.generate([prompt], GREEDY)

    def test_max_length_beyond_the_model(self, load):
        with pytest.raises(GenerationError, match=r"257 tokens: max_position_embeddings is 256"):
            load("mixtral", max_length=257)

    @pytest.mark.parametrize("length", [0, -5])
    def test_no_room_at_all(self, load, length):
        with pytest.raises(GenerationError, match=f"no room: max_length: {length}"):
            load("mixtral", max_length=length)

    def test_settings_that_the_cache_was_not_built_for(self, load):
        model = load("mistral-sliding-window", chunk=4).model
        with pytest.raises(GenerationError, match="10 columns: max_length 64 and chunk 16 need 22"):
            Engine(model, max_length=64, chunk=16)

    def test_a_request_after_logits_that_were_not_finite(self, engine):
        before = ids(engine.generate([[1, 2, 3]], GREEDY))
        weight = engine.model.layers[0].attention.v_proj.weight
        values = weight.asnumpy().copy()
        ops.assign(weight, Tensor(np.full(values.shape, np.nan, np.float32)))
        with pytest.raises(GenerationError, match="not finite"):
            engine.generate([[1, 2, 3]], GREEDY)
        ops.assign(weight, Tensor(values))
        assert ids(engine.generate([[1, 2, 3]], GREEDY)) == before

    def test_bfloat16_in_several_processes_on_a_cpu(self):
        check_weights_dtype("bfloat16", 1)
        check_weights_dtype("float16", 2)
        with pytest.raises(GenerationError, match="dtype: bfloat16 in 2 processes on CPU"):
            check_weights_dtype("bfloat16", 2)

    def test_stop_strings_without_a_tokenizer(self, engine):
        with pytest.raises(GenerationError, match="need a tokenizer"):
            engine.generate([[1]], GREEDY.model_copy(update={"stop": ("x",)}))

    def test_no_checkpoint(self, tmp_path):
        with pytest.raises(CheckpointError, match="nothing"):
            Engine.load(tmp_path / "nothing")
