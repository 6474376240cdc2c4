"""The real tokenizers, Hugging Face's readings of them, and texts that are hard to tokenise."""

import functools
import random
import shutil

import pytest

from mistral_ms.tokenizer import packaged_tokenizer

VERSIONS = (
    "v1",
    pytest.param("v2", marks=pytest.mark.slow),
    "v3",
    pytest.param("v7", marks=pytest.mark.slow),
)
"""Loading one with transformers takes seconds; v1 and v3 differ most."""

PLAIN_TEXTS = {
    "empty": "",
    "words": "Hello world",
    "leading_space": " leading",
    "many_spaces": "   three   spaces  ",
    "only_spaces": "  ",
    "newlines": "\n\nline\r\nline\n",
    "tabs": "\t tab\ttab",
    "code": "def f(x):\n    return x  # c\n",
    "digits": "0123456789 3.14159",
    "accents": "héllo wörld ÅÅ",
    "combining": "e\u0301 n\u0303 \u1112\u1161\u11ab",
    "chinese": "你好，世界",
    "rare_chinese": "𠜎𠜱 龘",
    "japanese": "日本語テキスト",
    "arabic": "مرحبا بالعالم",
    "hindi": "नमस्ते",
    "emoji": "👩\u200d👩\u200d👧\u200d👦 family 🏳️\u200d🌈",
    "maths": "𝔘𝔫𝔦 Ⅳ ①",
    "private_use": "\ue000 private \U0010fffd",
    "controls": "\x00null \x01\x07\x1b\x7f",
    "invisible": "\ufeffbom \u200b zero\u200bwidth \xa0nbsp\u2028\u2029",
    "replacement": "\ufffd",
    "word_start_mark": "▁a ▁ b▁▁c▁",
    "byte_name": "<0x41> <0xE4>",
    "long_word": "supercalifragilistic" * 30,
    "one_letter": "a" * 500,
}
SPECIAL_TEXTS = {
    "bos": "<s>",
    "eos_inside": "a </s> b",
    "unknown": "\n <unk>x",
    "a_whole_turn": "<s>[INST] hi [/INST] yo</s>",
    "instruction": "x[/INST]y [INST]",
    "unnamed_control": "[control_700]x",
    "tools": "[AVAILABLE_TOOLS][TOOL_CALLS]",
    "system": "[SYSTEM_PROMPT]a[/SYSTEM_PROMPT]",
}


def random_texts(count, seed=0):
    """Short strings over an alphabet in which everything meets everything."""
    generator = random.Random(seed)
    alphabet = "ab. \n\t▁é你🤗\u0301\x00\x07<s>[INST]/"
    return ["".join(generator.choices(alphabet, k=generator.randint(1, 14))) for _ in range(count)]


@pytest.fixture(scope="session")
def plain_texts():
    return PLAIN_TEXTS


@pytest.fixture(scope="session")
def all_texts():
    return [*PLAIN_TEXTS.values(), *SPECIAL_TEXTS.values(), *random_texts(300)]


@pytest.fixture(scope="session", params=VERSIONS)
def version(request):
    return request.param


@pytest.fixture(scope="session")
def tokenizer(version):
    return packaged_tokenizer(version)


@functools.cache  # kept between modules, for which pytest would make session fixtures anew
def slow(version, legacy):
    from transformers import LlamaTokenizer

    path = packaged_tokenizer(version).files["tokenizer.model"]
    return LlamaTokenizer(str(path), legacy=legacy)


@functools.cache
def converted(version, parent):
    from transformers import LlamaTokenizerFast

    directory = parent / version
    directory.mkdir()
    path = packaged_tokenizer(version).files["tokenizer.model"]
    shutil.copyfile(path, directory / "tokenizer.model")
    LlamaTokenizerFast.from_pretrained(str(directory), legacy=True).save_pretrained(directory)
    (directory / "tokenizer.model").unlink(missing_ok=True)
    return directory


@pytest.fixture(scope="session")
def hf_slow(version):
    """Hugging Face's sentencepiece tokenizer, as Mixtral's repositories configure it."""
    return slow(version, legacy=True)


@pytest.fixture(scope="session")
def hf_slow_non_legacy(version):
    return slow(version, legacy=False)


@pytest.fixture(scope="session")
def conversions(tmp_path_factory):
    return tmp_path_factory.mktemp("converted")


@pytest.fixture(scope="session")
def hf_directory(version, conversions):
    """What LlamaTokenizerFast saves after converting the sentencepiece model."""
    return converted(version, conversions)


@pytest.fixture(scope="session")
def hf_fast(hf_directory):
    from transformers import LlamaTokenizerFast

    return LlamaTokenizerFast.from_pretrained(str(hf_directory))
