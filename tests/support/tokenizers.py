"""Tokenizer directories as they are published, around a small vocabulary that converts at once."""

import functools
import io
import json

from mistral_ms.data import demo_text

SIZE = 420  # pieces of the small vocabulary


@functools.cache
def small_model():
    """A sentencepiece model with the settings of Mistral's, small so that it converts at once."""
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(demo_text().splitlines()),
        model_writer=out,
        model_type="bpe",
        vocab_size=SIZE,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
    )
    return out.getvalue()


def write(directory, config=None, **files):
    """A directory with a sentencepiece model and these JSON files."""
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.model").write_bytes(small_model())
    (directory / "config.json").write_text(json.dumps({"model_type": "mixtral"}))
    base = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(base | (config or {})))
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def token(content, special=True):
    return {
        "content": content,
        "special": special,
        "normalized": False,
        "lstrip": False,
        "rstrip": False,
        "single_word": False,
    }


def auto(directory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)
