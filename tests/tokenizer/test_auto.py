"""Directories as derivatives publish them: the ids are those of the tokenizer AutoTokenizer loads.

Every directory here is written by transformers or by hand, and transformers reads it as well.
"""

import json
import shutil
from pathlib import Path

import pytest
from support.tokenizers import SIZE, auto, small_model, token, write

from mistral_ms.errors import TokenizerError
from mistral_ms.tokenizer import (
    MistralChat,
    PieceKind,
    StreamDecoder,
    load_tokenizer,
    packaged_tokenizer,
)

TEXTS = (
    "Hello world",
    " leading",
    "  two",
    "a<|im_end|>b",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<s>[INST] hi [/INST] yo</s>",
    "<s> x </s>  y",
    "plain <tool> and<tool>more",
    "你好 🤗\n\n\ttab",
    "",
)


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    """ChatML tokens added by transformers to the converted v1 vocabulary, as fine-tuners do."""
    from transformers import AddedToken

    directory = tmp_path_factory.mktemp("chatml")
    tokenizer = auto(write(directory / "base", {"legacy": True}))
    tokenizer.add_special_tokens(
        {"eos_token": AddedToken("<|im_end|>", special=True, normalized=False)}
    )
    tokenizer.add_tokens(
        [AddedToken("<|im_start|>", special=True, normalized=False)], special_tokens=True
    )
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    tokenizer.save_pretrained(directory / "saved")
    (directory / "saved" / "tokenizer.model").unlink(missing_ok=True)
    path = directory / "saved" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("add_prefix_space", None)
    path.write_text(json.dumps(config))
    (directory / "saved" / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    return directory / "saved"


def byte_level(directory):
    """A small byte-level vocabulary with a Llama-3-like set of special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    directory.mkdir(exist_ok=True)
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|begin|>", "<|end|>", "<|eot|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(["hello world, 你好 你好"] * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="<|begin|> $A", special_tokens=[("<|begin|>", 0)]
    )
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "bos_token": "<|begin|>",
                "eos_token": "<|eot|>",
            }
        )
    )
    return directory


# One directory each: what is in it that a reader could overlook.
MAKE = {
    "plain": lambda d: write(d),
    "no bos": lambda d: write(d, {"add_bos_token": False}),
    "not legacy": lambda d: write(d, {"legacy": False}),
    "no space before text": lambda d: write(d, {"add_prefix_space": False}),
    "added_tokens_decoder": lambda d: write(
        d,
        {
            "eos_token": "<|im_end|>",
            "added_tokens_decoder": {
                "0": token("<unk>"),
                "1": token("<s>"),
                "2": token("</s>"),
                str(SIZE + 0): token("<|im_end|>"),
                str(SIZE + 1): token("<|im_start|>"),
                str(SIZE + 2): token("<tool>", special=False),
            },
        },
    ),
    "added_tokens.json": lambda d: write(
        d,
        {"eos_token": None},
        added_tokens={"<|im_end|>": SIZE + 0, "<|im_start|>": SIZE + 1},
        special_tokens_map={
            "bos_token": "<s>",
            "eos_token": {"content": "<|im_end|>", "lstrip": False, "rstrip": False,
                          "normalized": False, "single_word": False},
            "unk_token": "<unk>",
            "additional_special_tokens": ["<|im_start|>"],
        },
    ),
    "not legacy, added": lambda d: write(
        d,
        {
            "legacy": False,
            "added_tokens_decoder": {
                str(SIZE + 0): token("<|im_end|>"), str(SIZE + 1): token("<|im_start|>"),
            },
        },
    ),
    "pad token beyond": lambda d: write(d, {"pad_token": "[PAD]"}),
    "byte level": byte_level,
}  # fmt: skip


@pytest.fixture(scope="module", params=[*MAKE, "json", "json and model", "json remade"])
def directory(request, tmp_path_factory, chatml):
    path = tmp_path_factory.mktemp("directory") / "model"
    if request.param in MAKE:
        return MAKE[request.param](path)
    shutil.copytree(chatml, path)
    if request.param != "json":
        (path / "tokenizer.model").write_bytes(small_model())
    if request.param == "json remade":
        file = path / "tokenizer_config.json"
        changes = {"add_prefix_space": True, "legacy": False}
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return path


@pytest.fixture(scope="module")
def pair(directory):
    """Our tokenizer and transformers'."""
    return load_tokenizer(directory), auto(directory)


def test_ids_equal_those_of_auto_tokenizer(pair):
    ours, theirs = pair
    for text in TEXTS:
        expected = theirs(text).input_ids
        ids, _ = ours.encode_special(text)
        assert [ours.bos_id] * ours.adds_bos + ids == expected, text
        expected = theirs(text, split_special_tokens=True).input_ids
        assert ours.encode(text, bos=ours.adds_bos) == expected, text
    assert ours.vocab_size == len(theirs)
    assert ours.eos_ids == (theirs.eos_token_id,)
    assert ours.bos_id == theirs.bos_token_id


def test_every_piece_decodes_as_auto_tokenizer_does(pair):
    ours, theirs = pair
    for text in TEXTS:
        ids, _ = ours.encode_special(text)
        for skip in (True, False):
            expected = theirs._tokenizer.decode(ids, skip_special_tokens=skip)
            # transformers keeps a first space where a control token that is left out came before
            assert ours.decode(ids, skip).lstrip(" ") == expected.lstrip(" "), (text, skip)
    special = {i for i, t in theirs.added_tokens_decoder.items() if t.special}
    for i in range(len(theirs)):
        assert (ours.piece(i).kind in (PieceKind.CONTROL, PieceKind.UNKNOWN)) == (i in special), i


def test_spans_of_the_ids_spell_the_text(pair):
    ours, _ = pair
    for text in TEXTS:
        ids, spans = ours.encode_special(text)
        covered = {n for a, b in spans for n in range(a, b)}
        assert len(ids) == len(spans)
        assert covered >= {n for n, c in enumerate(text) if c != " "}, text


def test_the_size_that_only_tokenizer_json_has_is_said(chatml, tmp_path):
    shutil.copytree(chatml, tmp_path / "both")
    (tmp_path / "both" / "tokenizer.model").write_bytes(small_model())
    (note,) = load_tokenizer(tmp_path / "both").notes
    assert f"tokenizer.json has {SIZE + 3} ids, tokenizer.model {SIZE}" in note


def test_two_vocabularies_in_one_directory(chatml, tmp_path):
    shutil.copytree(chatml, tmp_path / "both")
    other = packaged_tokenizer("v1").files["tokenizer.model"]
    shutil.copyfile(other, tmp_path / "both" / "tokenizer.model")
    with pytest.raises(
        TokenizerError,
        match=r"contradicting tokenizer files: id \d+: '.*' in tokenizer.json \(423 ids\), "
        r"'.*' in .*tokenizer.model \(32000 ids\): both must hold",
    ):
        load_tokenizer(tmp_path / "both")


def test_an_added_token_with_two_ids(tmp_path):
    path = write(tmp_path / "m", {"added_tokens_decoder": {str(SIZE + 5): token("<|im_end|>")}})
    with pytest.raises(TokenizerError, match=r"'<\|im_end\|>' has the id 420: .*say 425"):
        load_tokenizer(path)


def test_two_names_of_eos_are_said(tmp_path):
    path = write(tmp_path / "m", special_tokens_map={"eos_token": "<unk>"})
    assert load_tokenizer(path).notes == (
        "special_tokens_map.json calls eos_token '<unk>', tokenizer_config.json '</s>'",
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"add_bos_token": "no"}, "add_bos_token: 'no' must be true or false"),
        ({"eos_token": 5}, "eos_token: 5 must be a token's text"),
        ({"added_tokens_decoder": {"x": {}}}, "added_tokens_decoder.x: not an id"),
        ({"added_tokens_decoder": {"3": {}}}, "added_tokens_decoder.3: must have a content"),
        ({"chat_template": 5}, "chat_template must be a text, or a list"),
    ],
)
def test_settings_of_a_wrong_type(tmp_path, config, message):
    with pytest.raises(TokenizerError, match=rf"damaged tokenizer: .*_config.json: {message}"):
        load_tokenizer(write(tmp_path / "m", config))


@pytest.fixture(scope="module")
def tekken():
    """Our reading of the real vocabulary and mistral-common's."""
    import mistral_common
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    path = Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"
    return load_tokenizer(path), Tekkenizer.from_file(path)


class TestTekken:
    def test_ids_and_text(self, tekken, all_texts):
        ours, theirs = tekken
        assert (ours.vocab_size, ours.bos_id, ours.eos_ids) == (131072, 1, (2,))
        for text in all_texts:
            ids = theirs.encode(text, bos=True, eos=False)
            assert ours.encode(text) == ids
            assert ours.decode(ids) == theirs.decode(ids) == text
            broken = ids[1:-1]
            assert ours.decode(broken) == theirs.decode(broken)

    def test_broken_characters_in_a_stream(self, tekken):
        ours, theirs = tekken
        ids = ours.encode("🤗龘é", bos=False)
        for cut in range(len(ids)):
            for ending in range(cut + 1, len(ids) + 1):
                stream = StreamDecoder(ours)
                text = "".join(stream.push(i) for i in ids[cut:ending]) + stream.flush()
                assert text == theirs.decode(ids[cut:ending])

    def test_control_tokens(self, tekken):
        ours, theirs = tekken
        ids, spans = ours.encode_special("[INST]你好[/INST]")
        text = theirs.encode("你好", bos=False, eos=False)
        assert ids == [
            theirs.get_special_token("[INST]"),
            *text,
            theirs.get_special_token("[/INST]"),
        ]
        assert (spans[0], spans[-1]) == ((0, 6), (8, 15))
        assert ours.decode(ids, skip_special=False) == "[INST]你好[/INST]"

    @pytest.mark.parametrize("version", ["v3", "v7"])
    @pytest.mark.parametrize("system", [True, False])
    def test_chat_ids_equal_mistral_commons(self, tekken, tmp_path, version, system):
        """Of the format that the file says it has; its first words are enough here."""
        from mistral_common.protocol.instruct.request import ChatCompletionRequest
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer

        (source,) = tekken[0].files.values()
        content = json.loads(source.read_text())
        content["vocab"] = content["vocab"][:1000]
        content["config"] |= {"default_vocab_size": 2000, "version": version}
        (tmp_path / "tekken.json").write_text(json.dumps(content))
        messages = [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "你好"},
            {"role": "assistant", "content": "🤗 hi"},
            {"role": "user", "content": "two\nlines"},
        ][not system :]
        chat = MistralChat(load_tokenizer(tmp_path / "tekken.json"))
        theirs = MistralTokenizer.from_file(str(tmp_path / "tekken.json"))
        expected = theirs.encode_chat_completion(ChatCompletionRequest(messages=messages)).tokens
        assert chat.version == version
        assert chat.encode_chat(messages) == expected
