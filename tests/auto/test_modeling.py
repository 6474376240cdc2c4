"""The Python interface against transformers: the same checkpoint, the same calls."""

import numpy as np
import pytest
import torch
from mindspore import Tensor
from support.hf import make_pair, save_with_tokenizer
from transformers import AutoModelForCausalLM as TheirModel
from transformers import AutoTokenizer as TheirTokenizer
from transformers import MixtralConfig

import mistral_ms
from mistral_ms import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    MistralForCausalLM,
    MixtralForCausalLM,
)
from mistral_ms.errors import (
    CheckpointError,
    ConfigError,
    GenerationError,
    TokenizerError,
    WeightError,
)
from mistral_ms.mixtures.moeify import moeify

TOLERANCE = 2e-5  # float32 logits of magnitude 1 to 10 after two layers, summed in another order
DENSE = AutoConfig.for_model(
    vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1,
)  # fmt: skip
TEXTS = ["The sparse layer", "One", "Experts are chosen by a gate"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    save_with_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def model(checkpoint):
    return AutoModelForCausalLM.from_pretrained(checkpoint)


@pytest.fixture(scope="module")
def theirs(checkpoint):
    found = TheirModel.from_pretrained(checkpoint, attn_implementation="eager").float().eval()
    found.config.output_router_logits = False  # their generation cannot have it
    return found


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return AutoTokenizer.from_pretrained(checkpoint)


def test_logits_losses_and_router_logits_of_a_padded_batch(model, theirs, tokenizer):
    rows = tokenizer(TEXTS, padding=True, return_tensors="np")
    labels = np.where(rows.attention_mask == 1, rows.input_ids, -100)
    labels[0, 2] = -100
    ours = model(**rows, labels=labels, output_router_logits=True)
    with torch.no_grad():
        wanted = theirs(
            torch.tensor(rows.input_ids).long(),
            attention_mask=torch.tensor(rows.attention_mask),
            labels=torch.tensor(labels).long(),
            output_router_logits=True,
        )
    present = rows.attention_mask == 1
    np.testing.assert_allclose(
        ours.logits.asnumpy()[present], wanted.logits.numpy()[present], atol=TOLERANCE, rtol=0
    )
    assert float(ours.loss) == pytest.approx(float(wanted.loss), abs=1e-5)
    assert float(ours.aux_loss) == pytest.approx(float(wanted.aux_loss), abs=1e-5)
    assert len(ours.router_logits) == len(wanted.router_logits) == 2
    for mine, other in zip(ours.router_logits, wanted.router_logits, strict=True):
        flat = present.reshape(-1)
        np.testing.assert_allclose(
            mine.asnumpy()[flat], other.numpy()[flat], atol=TOLERANCE, rtol=0
        )


def test_without_labels_and_requests_there_are_logits_alone(model):
    found = model([[1, 5, 9]])
    assert found.logits.shape == (1, 3, 32000)
    assert found.loss is found.aux_loss is found.router_logits is None


def test_padding_on_the_left_changes_nothing(model, tokenizer):
    right = tokenizer(TEXTS, padding=True, return_tensors="ms")
    tokenizer.padding_side = "left"
    left = tokenizer(TEXTS, padding=True, return_tensors="np")
    tokenizer.padding_side = "right"
    a, b = model(**right).logits.asnumpy(), model(**left).logits.asnumpy()
    for row in range(len(TEXTS)):
        here, there = right.attention_mask.asnumpy()[row] == 1, left.attention_mask[row] == 1
        np.testing.assert_allclose(a[row][here], b[row][there], atol=TOLERANCE, rtol=0)


def test_greedy_tokens_are_theirs(model, theirs, tokenizer):
    rows = tokenizer(TEXTS[0], return_tensors="np")
    ours = model.generate(**rows, max_new_tokens=6, compiled=False)
    with torch.no_grad():
        wanted = theirs.generate(
            torch.tensor(rows.input_ids).long(), max_new_tokens=6, do_sample=False, pad_token_id=0
        )
    np.testing.assert_array_equal(ours, wanted.numpy())


def test_texts_lists_and_padded_arrays_are_continued_alike(model, tokenizer):
    """One ragged batch, given in four ways; the cached model computes with the same weights."""
    lists = model.generate(
        [tokenizer.encode(text) for text in TEXTS], max_new_tokens=4, compiled=False
    )
    texts = model.generate(TEXTS, max_new_tokens=4, compiled=False)
    rows = tokenizer(TEXTS, padding=True, return_tensors="ms")
    array = model.generate(
        rows.input_ids, attention_mask=rows.attention_mask, max_new_tokens=4, compiled=False
    )
    width = rows.input_ids.shape[1]
    for number, text in enumerate(TEXTS):
        prompt = tokenizer.encode(text)
        new = lists[number][len(prompt) :]
        assert array[number, width : width + len(new)].tolist() == new
        assert texts[number] == tokenizer.decode([*prompt, *new])[len(text) :]
    assert model.generate(TEXTS[1], max_new_tokens=4, compiled=False) == texts[1]


def test_generation_follows_weights_that_change(checkpoint):
    """Engine and model share parameters, they are not copied."""
    own = AutoModelForCausalLM.from_pretrained(checkpoint)
    before = own.generate([[1, 7, 8]], max_new_tokens=3, compiled=False)
    head = own.model.head_weight()
    head.set_data(Tensor(-head.asnumpy()))
    after = own.generate([[1, 7, 8]], max_new_tokens=3, compiled=False)
    assert before != after
    expected = own([before[0][:3]]).logits.asnumpy()[0, -1].argmax()
    assert after[0][3] == expected


def test_streamers(model, tokenizer):
    pieces = []
    text = model.generate(TEXTS[0], max_new_tokens=5, streamer=pieces.append, compiled=False)
    assert "".join(pieces) == text

    class Theirs:
        """What transformers' TextStreamer and TextIteratorStreamer offer."""

        def __init__(self):
            self.seen = []

        def on_finalized_text(self, text, stream_end=False):
            self.seen.append((text, stream_end))

    streamer = Theirs()
    model.generate(TEXTS[0], max_new_tokens=5, streamer=streamer, compiled=False)
    assert "".join(piece for piece, _ in streamer.seen) == text
    assert [end for _, end in streamer.seen][-1] is True


def test_a_chat_is_a_formatted_prompt(model, tokenizer):
    messages = [{"role": "user", "content": "Hello"}]
    ids = tokenizer.apply_chat_template(messages, chat_template="mistral")
    answer = model.chat(messages, chat_template="mistral", max_new_tokens=3, compiled=False)
    done = model.generate([ids], max_new_tokens=3, compiled=False, return_dict_in_generate=True)
    assert answer == done.completions[0].text
    assert done.completions[0].finish_reason == "length"
    theirs = TheirTokenizer.from_pretrained(tokenizer_path(tokenizer), use_fast=False)
    assert theirs.decode(ids) == "<s>[INST] Hello [/INST]"


def tokenizer_path(tokenizer):
    return next(iter(tokenizer.tokenizer.files.values())).parent


@pytest.mark.parametrize("form", ["mistral_ms", "hf", "mistral"])
def test_what_is_saved_is_what_was_loaded(model, tmp_path, form):
    model.save_pretrained(tmp_path / "copy", format=form)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    assert again.config.moe == model.config.moe
    for name, weight in model.model.weights().items():
        np.testing.assert_array_equal(weight.asnumpy(), again.model.weights()[name].asnumpy())
    assert again.tokenizer.encode("a b") == model.tokenizer.encode("a b")
    with pytest.raises(CheckpointError):
        model.save_pretrained(tmp_path / "copy", format=form)


def test_the_tokenizer_is_theirs(checkpoint, tokenizer, tmp_path):
    theirs = TheirTokenizer.from_pretrained(checkpoint, use_fast=False)
    assert tokenizer(TEXTS).input_ids == theirs(TEXTS).input_ids
    ids = tokenizer.encode(TEXTS[2])
    assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    cut = tokenizer(TEXTS, truncation=True, max_length=3, padding=True)
    assert [len(row) for row in cut.input_ids] == [3, 3, 3]
    assert cut.attention_mask[1] == [1, 1, 0]
    with pytest.raises(TokenizerError, match="padding=True"):
        tokenizer(TEXTS, return_tensors="np")
    with pytest.raises(TokenizerError, match="'max_length', 'pt'"):
        tokenizer(TEXTS, padding="max_length", return_tensors="pt")
    with pytest.raises(TokenizerError, match="truncation"):
        tokenizer(TEXTS, max_length=3)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    assert AutoTokenizer.from_pretrained(tmp_path / "tokenizer").encode("x") == tokenizer.encode(
        "x"
    )
    # what is typed stays text, unless names are to mean tokens
    assert 2 not in tokenizer("a</s>").input_ids
    assert tokenizer("a</s>", special_tokens=True).input_ids[-1] == 2


def test_configurations_and_fresh_models(tmp_path):
    config = DENSE
    a, b = (AutoModelForCausalLM.from_config(config, seed=seed) for seed in (3, 3))
    assert isinstance(a, MistralForCausalLM) and not isinstance(a, MixtralForCausalLM)
    np.testing.assert_array_equal(a([[1, 2]]).logits.asnumpy(), b([[1, 2]]).logits.asnumpy())
    assert a.num_parameters() == sum(p.size for p in a.parameters())
    with pytest.raises(ConfigError, match="perhaps hidden_size"):
        AutoConfig.for_model(**config.model_dump(), hiden_size=2)
    sizes = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    theirs = MixtralConfig(**sizes, num_local_experts=4).to_dict()
    sparse = AutoConfig.for_model("mixtral", **sizes, num_local_experts=4)
    assert sparse == AutoConfig.for_model(**theirs)
    assert (sparse.moe.num_local_experts, sparse.rope_theta) == (4, 1e6)
    with pytest.raises(
        ConfigError, match=r"for_model: num_local_experts: 4: .* model_type=\"mixtral"
    ):
        AutoConfig.for_model(**sizes, num_local_experts=4)
    with pytest.raises(ConfigError, match="for_model: model_type: 'bert'"):
        AutoConfig.for_model("bert", **sizes)
    with pytest.raises(ConfigError, match="no configuration: config: dict: AutoConfig"):
        AutoModelForCausalLM.from_config({})
    a.tokenizer = AutoTokenizer.from_pretrained("packaged-v1")
    a.save_pretrained(tmp_path / "drawn")
    assert (tmp_path / "drawn" / "tokenizer.model").exists()
    with pytest.raises(ConfigError, match="use MistralForCausalLM or AutoModelForCausalLM"):
        MixtralForCausalLM(config)


def test_a_model_of_the_other_class_is_refused(checkpoint):
    with pytest.raises(ConfigError, match="MixtralForCausalLM: MistralForCausalLM has dense"):
        MistralForCausalLM.from_pretrained(checkpoint)
    assert isinstance(MixtralForCausalLM.from_pretrained(checkpoint), MixtralForCausalLM)
    assert AutoConfig.from_pretrained(checkpoint).moe.num_local_experts == 8


def test_a_checkpoint_without_a_tokenizer_takes_ids(tmp_path):
    make_pair("mistral-sliding-window").hf.save_pretrained(tmp_path)
    own = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert len(own.generate([1, 5], max_new_tokens=2, compiled=False)) <= 4
    with pytest.raises(GenerationError, match="a text without a tokenizer"):
        own.generate("Hello")


CALLS = {
    "id": (lambda m: m([[1, 32000]]), GenerationError, "id 32000: .* from 0 to 31999"),
    "floats": (lambda m: m(np.ones((1, 2))), GenerationError, "input_ids: ndarray of float64"),
    "ragged": (lambda m: m([[1, 2], [3]]), GenerationError, "input_ids.*equal length"),
    "mask": (lambda m: m([[1, 2]], [[1]]), GenerationError, r"attention_mask: \[1, 1\]"),
    "labels": (lambda m: m([[1, 2]], labels=[[1]]), GenerationError, r"labels: \[1, 1\]"),
    "no label": (lambda m: m([[1, 2]], labels=[[1, -5]]), GenerationError, "labels: -5"),
    "too long": (lambda m: m([[1] * 257]), GenerationError, "longer than the model"),
    "two": (lambda m: m.generate("a", input_ids=[1]), GenerationError, "two prompts"),
    "empty row": (lambda m: m([[1, 2]], [[0, 0]]), GenerationError, "attention_mask, row 0"),
    "none": (lambda m: m.generate(), GenerationError, "give inputs or input_ids"),
    "greedy": (lambda m: m.generate("a", do_sample=False, temperature=1.0), ConfigError, "greedy"),
    "sampled": (lambda m: m.generate("a", do_sample=True, temperature=0), ConfigError, "greedy"),
    "top_p": (lambda m: m.generate("a", top_p=2.0), ConfigError, "generate: top_p"),
    "streamer": (lambda m: m.generate(["a", "b"], streamer=print), GenerationError, "2 prompts"),
}


@pytest.mark.parametrize("name", CALLS)
def test_bad_calls_are_named(model, name):
    call, error, message = CALLS[name]
    with pytest.raises(error, match=message):
        call(model)


def test_a_path_that_is_not_there():
    with pytest.raises(CheckpointError, match="nothing is downloaded"):
        AutoModelForCausalLM.from_pretrained("mistralai/Mixtral-8x7B-v0.1")


def test_the_package_names_its_classes_and_nothing_else():
    assert set(mistral_ms.__all__) <= set(dir(mistral_ms))
    for name in mistral_ms.__all__:
        assert getattr(mistral_ms, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = mistral_ms.Nothing


@pytest.mark.slow
def test_compiled_steps_give_the_same_tokens(model):
    """A second call of the same width compiles nothing."""
    eager = model.generate([[1, 5, 9]], max_new_tokens=4, compiled=False)
    assert model.generate([[1, 5, 9]], max_new_tokens=4) == eager
    again = model.generate([[1, 5, 9]], max_new_tokens=4, return_dict_in_generate=True)
    assert list(again.completions[0].token_ids) == eager[0][3:]
    assert again.compile_seconds < 0.1


def test_a_gates_state_is_saved_as_it_is(tmp_path):
    """Float32 beside weights in 16 bits."""
    config = AutoConfig.for_model(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1,
        moe={"num_local_experts": 4, "gate": "sigmoid_top_k"},
    )  # fmt: skip
    own = AutoModelForCausalLM.from_config(config, dtype="float16")
    bias = own.model.weights()["layers.0.moe.router.e_score_correction_bias"]
    bias.set_data(Tensor(np.float32([0.1001, 0.1002, 0.10021, -0.3001])))
    own.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="float16")
    found = again.model.weights()["layers.0.moe.router.e_score_correction_bias"]
    np.testing.assert_array_equal(found.asnumpy(), bias.asnumpy())


def test_an_engine_serves_smaller_batches_and_other_ends(model):
    two = model.generate([[1, 5], [1, 9, 4]], max_new_tokens=3, compiled=False)
    engine = model._engine
    one = model.generate([[1, 5]], max_new_tokens=3, compiled=False)
    assert model._engine is engine
    assert one[0] == two[0]
    before, model.eos_ids = model.eos_ids, (two[0][2],)
    try:
        assert model.generate([[1, 5]], max_new_tokens=3, compiled=False)[0] == two[0][:3]
    finally:
        model.eos_ids = before


def test_a_model_whose_layers_were_replaced_does_not_generate():
    own = AutoModelForCausalLM.from_config(DENSE)
    moeify(own.model, 2)
    with pytest.raises(WeightError, match="another model than its configuration"):
        own.generate([[1, 2]], max_new_tokens=1, compiled=False)
