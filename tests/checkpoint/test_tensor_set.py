"""Further tensors of a checkpoint: the same care as with weights."""

import json

import numpy as np
import pytest
from support.series import CONFIG, arrays, write_checkpoint

from mistral_ms.checkpoint import open_tensor_set, read_state, save_native
from mistral_ms.errors import CheckpointError


@pytest.fixture
def saved(tmp_path):
    write_checkpoint(tmp_path / "c", 3)
    return tmp_path / "c"


def test_reads_what_was_written(saved):
    _, state = arrays(3)
    with open_tensor_set(saved, "optimizer") as found:
        assert set(found.names()) == set(state)
        for name, values in state.items():
            assert found.shape(name) == values.shape
            got = found.read(name)
            assert got.dtype == np.float32
            assert np.array_equal(got, values)
    assert read_state(saved) == {"format": 1, "step": 3}


def test_sixteen_bits_stay_sixteen_bits(tmp_path):
    weights, _ = arrays(1)
    half = np.arange(6, dtype=np.float16).reshape(2, 3)
    bits = np.arange(6, dtype=np.uint16)
    save_native(
        tmp_path / "c",
        CONFIG,
        [(n, a.shape, "float32", a) for n, a in weights.items()],
        extra_tensors={"extra": [("a", (2, 3), "float16", half), ("b", (6,), "bfloat16", bits)]},
    )
    with open_tensor_set(tmp_path / "c", "extra") as found:
        assert found.read("a").dtype == np.float16
        assert np.array_equal(found.read("a"), half)
        assert np.array_equal(found.read("b"), bits)


def test_a_set_that_is_not_there(saved):
    with pytest.raises(CheckpointError, match=r"no such tensors: .*momentum-\*\.safetensors"):
        open_tensor_set(saved, "momentum")


def test_a_shard_that_the_manifest_does_not_list(saved):
    manifest = json.loads((saved / "COMPLETE").read_text())
    del manifest["files"]["optimizer-00001-of-00001.safetensors"]
    (saved / "COMPLETE").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"extra shard: .*the manifest does not list it"):
        open_tensor_set(saved, "optimizer")


def test_an_index_that_promises_more(saved):
    path = saved / "optimizer.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["exp_avg.x"] = "optimizer-00001-of-00001.safetensors"
    path.write_text(json.dumps(index))
    manifest = json.loads((saved / "COMPLETE").read_text())
    manifest["files"][path.name]["size"] = path.stat().st_size
    (saved / "COMPLETE").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"missing tensor: .*exp_avg\.x"):
        open_tensor_set(saved, "optimizer")


def test_weights_alone_are_no_training(tmp_path):
    weights, _ = arrays(1)
    save_native(tmp_path / "c", CONFIG, [(n, a.shape, "float32", a) for n, a in weights.items()])
    with pytest.raises(CheckpointError, match=r"not a checkpoint of a training: .*init_from"):
        read_state(tmp_path / "c")


def test_nothing_is_read_from_an_incomplete_checkpoint(saved):
    (saved / "COMPLETE").unlink()
    with pytest.raises(CheckpointError, match="incomplete checkpoint"):
        read_state(saved)


def test_an_empty_set_is_refused(tmp_path):
    weights, _ = arrays(1)
    tensors = [(n, a.shape, "float32", a) for n, a in weights.items()]
    with pytest.raises(CheckpointError, match=r"no tensors: .*: optimizer: .*at least one"):
        save_native(tmp_path / "c", CONFIG, tensors, extra_tensors={"optimizer": []})
    assert not (tmp_path / "c").exists()
