"""Damaged datasets, and models that do not fit."""

import json
import shutil

import pytest

from mistral_ms.config import ModelConfig
from mistral_ms.datasets import MindRecordSequences, check_fit, read_info, verify
from mistral_ms.errors import DataError
from mistral_ms.tokenizer import packaged_tokenizer

RECORDS = "sequences-00000.mindrecord"


@pytest.fixture
def copy(dataset, tmp_path):
    return shutil.copytree(dataset, tmp_path / "copy")


def edit(path, **changes):
    values = json.loads((path / "dataset.json").read_text())
    (path / "dataset.json").write_text(json.dumps(values | changes))


def listed(path):
    return json.loads((path / "dataset.json").read_text())["files"]


def truncate(path):
    data = (path / RECORDS).read_bytes()
    (path / RECORDS).write_bytes(data[:-1])


DAMAGE = {
    "no_description": (
        lambda path: (path / "dataset.json").unlink(),
        r"incomplete dataset: .*copy: a finished one has a dataset.json",
    ),
    "no_directory": (shutil.rmtree, r"no dataset: .*copy"),
    "not_json": (lambda path: (path / "dataset.json").write_text("{"), r"damaged .*not JSON: "),
    "no_object": (lambda path: (path / "dataset.json").write_text("[]"), "list: must be an object"),
    "format": (lambda path: edit(path, format=2), "format 2: this release reads format 1"),
    "key": (lambda path: edit(path, extra=1), "unknown key: dataset.json: extra"),
    "outside": (
        lambda path: edit(path, files=[{"name": "../a", "size": 1, "sha256": "", "sequences": 1}]),
        "'../a': files must lie in the dataset's own directory",
    ),
    "index not listed": (
        lambda path: edit(path, files=[file for file in listed(path) if file["sequences"]]),
        rf"no {RECORDS}\.db: MindRecord's index is listed",
    ),
    "sum": (lambda path: edit(path, files=[]), r"sequences: must be the sum over the files"),
    "missing": (lambda path: (path / RECORDS).unlink(), rf"{RECORDS}: missing: dataset.json names"),
    "truncated": (truncate, rf"damaged dataset: .*{RECORDS}: \d+ bytes: dataset.json says \d+"),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_found_when_a_dataset_is_opened(damage, message, copy):
    damage(copy)
    for read in (read_info, verify, lambda path: MindRecordSequences(path, 2, 0)):
        with pytest.raises(DataError, match=message):
            read(copy)


@pytest.mark.parametrize("name", [RECORDS, f"{RECORDS}.db"])
def test_a_flipped_byte_is_found_on_verification(name, copy):
    data = bytearray((copy / name).read_bytes())
    data[-3] ^= 1
    (copy / name).write_bytes(data)
    with pytest.raises(DataError, match=rf"damaged dataset: .*{name}: sha256 .*dataset.json says"):
        verify(copy)


def test_verification_reports_progress(copy):
    calls = []
    info = verify(copy, lambda *numbers: calls.append(numbers))
    total = sum(file.size for file in info.files)
    assert calls[-1] == (total, total)


def test_records_that_are_none_are_found_on_reading(copy):
    size = (copy / RECORDS).stat().st_size
    (copy / RECORDS).write_bytes(bytes(size))
    with pytest.raises(DataError, match=rf"damaged dataset: .*{RECORDS}, sequence \d"):
        MindRecordSequences(copy, 2, 0).batch(0)


def model(**values):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1}
    return ModelConfig(**{"vocab_size": 32000, **sizes, **heads, **values})


def test_models_that_fit(dataset):
    info = read_info(dataset)
    check_fit(dataset, info, model(max_position_embeddings=6))
    check_fit(dataset, info, model(), packaged_tokenizer("v1"))
    check_fit(dataset, info, model(vocab_size=32064), packaged_tokenizer("v1"))  # rows to spare
    MindRecordSequences(dataset, 2, 0).check_model(model())


@pytest.mark.parametrize(
    ("values", "version", "message"),
    [
        (
            {"max_position_embeddings": 5},
            None,
            r"sequences too long for the model: .*: seq_length 6: .*max_position_embeddings is 5",
        ),
        (
            {"vocab_size": 31999},
            None,
            r"another vocabulary: .*: 32000 ids, sha256 \w+ .*: the model has vocab_size 31999",
        ),
        ({"vocab_size": 32768}, None, r"32000 ids.*the model has vocab_size 32768"),
        ({"vocab_size": 31999}, "v1", r"32000 ids.*the model has vocab_size 31999"),
        (
            {"vocab_size": 32768},
            "v3",
            r"32000 ids, sha256 \w+ \(.*model.v1\): the model has 32768 ids, sha256 \w+ \(.*v3\)",
        ),
    ],
)
def test_models_that_do_not_fit(values, version, message, dataset):
    tokenizer = packaged_tokenizer(version) if version else None
    with pytest.raises(DataError, match=message):
        check_fit(dataset, read_info(dataset), model(**values), tokenizer)
