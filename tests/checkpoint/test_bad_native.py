"""Damage to checkpoints of ours: the manifest must notice."""

import json
import shutil

import pytest

from mistral_ms.checkpoint import open_checkpoint
from mistral_ms.errors import CheckpointError


@pytest.fixture
def ours(tmp_path, tiny_config, save_random):
    save_random(tmp_path / "ours", tiny_config, max_shard_bytes=8_000)
    return tmp_path / "ours"


def refuse(path, message):
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_without_complete_it_is_incomplete(ours):
    (ours / "COMPLETE").unlink()
    refuse(ours, "incomplete checkpoint: .*COMPLETE manifest")


def test_a_shard_of_another_size(ours):
    shard = next(ours.glob("model-00001*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    refuse(ours, r"truncated file: .*model-00001.*: \d+ bytes: COMPLETE says \d+")
    shard.write_bytes(shard.read_bytes() + b"\0\0")
    refuse(ours, "wrong size: .*model-00001")


@pytest.mark.parametrize("pattern", ["model-00002*", "config.json", "*.index.json"])
def test_a_missing_file(ours, pattern):
    next(ours.glob(pattern)).unlink()
    refuse(ours, "missing file")


def test_a_shard_that_the_manifest_does_not_list(ours):
    shutil.copy(next(ours.glob("model-00001*")), ours / "model-00099-of-00099.safetensors")
    refuse(ours, "extra shard: .*model-00099.*manifest does not list it")


def test_a_manifest_that_names_a_file_outside(ours):
    manifest = json.loads((ours / "COMPLETE").read_text())
    manifest["files"]["../x"] = {"size": 1, "sha256": ""}
    (ours / "COMPLETE").write_text(json.dumps(manifest))
    refuse(ours, "file outside the checkpoint: .*COMPLETE")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ('{"format":' + "[" * 100_000, "not JSON: .*COMPLETE"),
        ("{}", "damaged manifest"),
        ('{"format": 1, "files": {"config.json": {}}}', "damaged manifest"),
        ('{"format": 1, "files": 3}', "damaged manifest"),
        ('{"format": 2, "files": {}}', "unknown format version: .*this release reads format 1"),
    ],
    ids=["cut", "nested", "empty", "no-size", "no-files", "newer"],
)
def test_a_damaged_manifest(ours, text, message):
    (ours / "COMPLETE").write_text(text)
    refuse(ours, message)


def test_a_newer_format_is_refused(ours):
    path = ours / "config.json"
    text = path.read_text().replace('"format": 1', '"format": 7')
    path.write_text(text)
    refuse(ours, r"unknown format version: .*mistral_ms\.format: 7")
