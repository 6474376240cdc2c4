import functools
import json

import numpy as np
import pytest

from mistral_ms.config import DataConfig
from mistral_ms.datasets import build_dataset, description
from mistral_ms.tokenizer import packaged_tokenizer

TEXTS = [
    "The harbour wakes before the town.",
    "Eight experts,\ntwo of them awake.",
    "é🤗",
    "a b " * 9,
]


@pytest.fixture(scope="session", autouse=True)
def digest_once():
    """The digest of a vocabulary takes a quarter of a second, and dozens of datasets are built."""
    original = description.vocabulary_digest
    description.vocabulary_digest = functools.cache(original)
    yield
    description.vocabulary_digest = original


@pytest.fixture(scope="session")
def tokenizer():
    return packaged_tokenizer()


@pytest.fixture
def jsonl(tmp_path):
    """Writes objects, or raw lines, one a line."""

    def write(*records, name="in.jsonl"):
        lines = [r if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
        path = tmp_path / name
        path.write_bytes(b"\n".join(lines) + b"\n")
        return path

    return write


@pytest.fixture(scope="module")
def dataset(tokenizer, tmp_path_factory):
    """A dataset of four documents, and the configuration it was made with."""
    home = tmp_path_factory.mktemp("dataset")
    source = home / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    config = DataConfig(seq_length=6)
    build_dataset([source], tokenizer, config, home / "packed")
    return home / "packed"


@pytest.fixture(scope="module")
def expected(tokenizer):
    """The sequences of ``dataset`` by the plainest loop: ids, labels, positions."""
    stream, first = [], []
    for text in TEXTS:
        ids = [1, *tokenizer.encode(text, bos=False), 2]
        first += [True] + [False] * (len(ids) - 1)
        stream += ids
    rows = []
    for start in range(0, len(stream) - 1, 6):
        ids, labels, positions = [0] * 6, [-100] * 6, [-1] * 6
        for column in range(6):
            place = start + column
            if place + 1 < len(stream):
                ids[column], positions[column] = stream[place], column
                labels[column] = -100 if first[place + 1] else stream[place + 1]
        rows.append((ids, labels, positions))
    return [np.array(each, np.int32) for each in zip(*rows, strict=True)]
