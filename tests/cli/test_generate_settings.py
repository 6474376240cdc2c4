"""What ``generate`` makes of a checkpoint's own settings, in this process, against transformers."""

import json
import re
import sys

import pytest
import torch
from support.tokenizers import SIZE, auto, token, write
from transformers import MistralConfig, MistralForCausalLM

from mistral_ms.cli import main
from mistral_ms.cli.generate import Setting
from mistral_ms.errors import GenerationError, TokenizerError
from mistral_ms.inference.settings import read_checkpoint_settings
from mistral_ms.tokenizer import load_tokenizer

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def save(path, **generation):
    """A one-layer Mistral with ChatML tokens, one of which has no row in the model."""
    added = {
        str(SIZE): token("<|im_end|>"),
        str(SIZE + 1): token("<|im_start|>"),
        str(SIZE + 2): token("[PAD]"),
    }
    settings = {"eos_token": "<|im_end|>", "pad_token": "[PAD]", "chat_template": CHATML}
    write(path, settings | {"added_tokens_decoder": added})
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=SIZE + 2,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.3,
        sliding_window=None,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = MistralForCausalLM(config).eval()
    model.generation_config.eos_token_id = [2, SIZE]
    for key, value in generation.items():
        setattr(model.generation_config, key, value)
    model.save_pretrained(path)
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "m"
    return path, save(path), auto(path)


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    def call(*arguments):
        line = ["run_mixtral.py", "generate", *map(str, arguments), "--json", "o.json"]
        monkeypatch.setattr(sys, "argv", [*line, "--pynative"])
        monkeypatch.setenv("COLUMNS", "300")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as info:
            main()
        captured = capsys.readouterr()
        path = tmp_path / "o.json"
        shown = json.loads(path.read_text())["outputs"] if path.exists() else []
        return info.value.code or 0, [o["token_ids"] for o in shown], captured.err

    return call


def hf(checkpoint, ids, eos, new=16):
    out = checkpoint[1].generate(
        torch.tensor([ids]), max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=eos
    )
    return out[0, len(ids) :].tolist()


def test_a_chat_ends_at_the_tokens_of_generation_config(checkpoint, run):
    """The end token is one that the model would come to in the middle of its text."""
    path, _, theirs = checkpoint
    question = [{"role": "user", "content": "The tide"}]
    ids = theirs.apply_chat_template(question, add_generation_prompt=True, return_dict=False)
    free = hf(checkpoint, ids, eos=None)
    end = next(i for n, i in enumerate(free) if n >= 3 and i not in free[:n])
    file = path / "generation_config.json"
    before = file.read_text()
    file.write_text(json.dumps(json.loads(before) | {"eos_token_id": [2, end], "num_beams": 3}))
    try:
        code, (found,), err = run(path, "--chat", "--prompt", "The tide", "--max-new-tokens", 16)
    finally:
        file.write_text(before)
    assert code == 0, err
    assert found == hf(checkpoint, ids, eos=[2, end])
    assert found[-1] == end and len(found) < len(free)
    assert "not supported and not used: num_beams 3" in err
    assert "the tokenizer ends texts with 420 ('<|im_end|>')" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--prompt", "a [PAD]", "--special-tokens"), r"prompt 0: 422 \('\[PAD\]'\): 0 to 421"),
        (("--prompt", "a<|im_end|>", "--chat"), r"message 0: '<\|im_end\|>': a message must not"),
        (("--prompt", "a", "--chat", "--no-bos"), "go with plain prompts"),
        (("--prompt", "a", "--tools", "t.json"), "go with --chat"),
        (("--prompt", "a", "--chat", "--tools", "t.json"), "cannot read: t.json"),
        (("--prompt", "a", "--temperature", "-1"), "temperature"),
    ],
)
def test_bad_input(checkpoint, run, options, message):
    code, _, err = run(checkpoint[0], *options)
    assert code == 2
    assert len(err) < 2000
    assert re.search(message, err), err


def setting(**changes):
    values = dict(given={}, sampling_defaults=False, chats=False, chat_template=None, tools=None,
                  bos=None, special_tokens=False)  # fmt: skip
    return Setting(**values | changes)


def test_prompts_equal_auto_tokenizer(checkpoint, tmp_path):
    path, _, theirs = checkpoint
    text = "<|im_start|>user\nHi<|im_end|>"
    ours = load_tokenizer(path)
    (found,) = setting(special_tokens=True).prompt_ids(ours, (), [text])
    assert found == theirs(text).input_ids
    (found,) = setting().prompt_ids(ours, (), [text])
    assert found == theirs(text, split_special_tokens=True).input_ids
    without = write(tmp_path / "w", {"add_bos_token": False})
    for bos, expected in ((None, False), (True, True), (False, False)):
        (found,) = setting(bos=bos).prompt_ids(load_tokenizer(without), (), ["Hi"])
        assert (found[0] == 1) is expected
        assert found[expected:] == auto(without)("Hi").input_ids


def test_sampling_of_the_checkpoint_is_used_only_when_asked_for():
    sampling = {"temperature": 0.7, "top_p": 0.9, "top_k": 40, "repetition_penalty": 1.1}
    assert setting().request(sampling).greedy
    asked = setting(sampling_defaults=True, given={"top_k": 3}).request(sampling)
    assert (asked.temperature, asked.top_p, asked.top_k) == (0.7, 0.9, 3)
    assert asked.repetition_penalty == 1.1


def test_settings_of_a_checkpoint(checkpoint):
    path, _, _ = checkpoint
    from mistral_ms.checkpoint import open_checkpoint

    with open_checkpoint(path, "hf") as source:
        settings = read_checkpoint_settings(path, source.config, load_tokenizer(path))
    assert settings.eos_ids == (2, SIZE)


def test_tools_of_a_wrong_type(tmp_path):
    for text in ("{", '{"a": 1}', "[1]"):
        (tmp_path / "t.json").write_text(text)
        with pytest.raises(GenerationError, match=r"t\.json: "):
            setting(tools=tmp_path / "t.json").read_tools()


def test_mistrals_formats_take_no_tools(checkpoint):
    chat = setting(chat_template="mistral").chat(load_tokenizer(checkpoint[0]), ())
    with pytest.raises(TokenizerError, match="tools are not supported"):
        chat.encode_chat([{"role": "user", "content": "a"}], [{"type": "function"}])
