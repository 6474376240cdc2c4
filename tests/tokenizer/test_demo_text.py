"""The packaged text of the demo is what the demo and its documentation count on."""

import hashlib

from mistral_ms.data import DEMO_TEXT, demo_text
from mistral_ms.tokenizer import packaged_tokenizer


def test_frozen():
    """Losses that the documentation states were measured on exactly this text."""
    digest = hashlib.sha256(DEMO_TEXT.read_bytes()).hexdigest()
    assert digest == "492e5c4d08f764f3cb68f49353632efef1070d6d1b0ad5a24ed8ec1cdec47372"


def test_size_and_form():
    assert 16000 <= DEMO_TEXT.stat().st_size <= 16400
    text = demo_text()
    assert text.endswith("\n")
    assert "\r" not in text and "\t" not in text
    assert all(len(line.rstrip()) == len(line) for line in text.splitlines())


def test_no_paragraph_is_repeated():
    paragraphs = [p for p in demo_text().split("\n\n") if p]
    assert len(paragraphs) >= 40
    assert len(set(paragraphs)) == len(paragraphs)


def test_the_packaged_tokenizer_gives_it_back():
    tokenizer = packaged_tokenizer()
    ids = tokenizer.encode(demo_text())
    assert tokenizer.decode(ids) == demo_text()
    assert len(set(ids)) > 1000  # a varied vocabulary is what makes the generated text readable
