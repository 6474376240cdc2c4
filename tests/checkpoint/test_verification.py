"""A damaged checkpoint of ours is noticed by whoever reads it, whatever it is read for."""

import shutil

import numpy as np
import pytest
from support.parts import LAYOUTS, MODEL, save, whole

from mistral_ms.checkpoint import (
    convert,
    open_checkpoint,
    our_shapes,
    presplit,
    save_native,
    verification,
)
from mistral_ms.config import MoEArchitecture
from mistral_ms.errors import CheckpointError
from mistral_ms.parallel.topology import Topology, written_parts
from mistral_ms.weights import specs

SPARSE = MODEL.model_copy(update={"moe": MoEArchitecture(num_local_experts=4)})


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """``ours`` has one file of weights and a tokenizer, ``parts`` is of a training's four ranks."""
    root = tmp_path_factory.mktemp("sound")
    save(root / "parts", whole(1), LAYOUTS["dp4 ep2"])
    rng = np.random.default_rng(0)
    arrays = {n: rng.standard_normal(s, np.float32) for n, s in our_shapes(SPARSE).items()}
    tensors = [(n, a.shape, "float32", a) for n, a in arrays.items()]
    save_native(root / "ours", SPARSE, tensors, {"tokenizer.model": b"pieces"})
    return root


@pytest.fixture
def ours(sound, tmp_path):
    return shutil.copytree(sound / "ours", tmp_path / "ours")


def flip(path, position):
    """Damages a file: one bit of one byte; counted from the end when negative."""
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)


def read_all(path, **options):
    with open_checkpoint(path, **options) as source:
        return {name: source.read(name) for name in source.names()}


WEIGHTS = "model-00001-of-00001.safetensors"
READERS = {
    "convert to hf": lambda path, **o: convert(path, path.parent / "out", "hf", **o),
    "convert to mistral": lambda path, **o: convert(path, path.parent / "out", "mistral", **o),
    "convert to ours": lambda path, **o: convert(path, path.parent / "out", "mindspore", **o),
    "presplit": lambda path, **o: presplit(
        path, path.parent / "out", ranks(SPARSE), "dp4 ep2", **o
    ),
    "read": read_all,
}


def ranks(config):
    topology = Topology(LAYOUTS["dp4 ep2"])
    return [written_parts(specs(config), topology, rank) for rank in range(4)]


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("position", [-1, "middle"])
def test_damaged_weights(ours, reader, position):
    shard = ours / WEIGHTS
    flip(shard, shard.stat().st_size // 2 if position == "middle" else position)
    with pytest.raises(CheckpointError, match=rf"wrong checksum: .*{WEIGHTS}: .*copy the"):
        READERS[reader](ours)
    assert [p.name for p in ours.parent.iterdir()] == ["ours"], "nothing is left of a target"
    READERS[reader](ours, verify=False)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.model", "model.safetensors.index.json"])
def test_damaged_small_files_are_noticed_when_it_is_opened(ours, name):
    text = (ours / name).read_bytes()
    (ours / name).write_bytes(text.replace(b"\n", b" ", 1) if b"\n" in text else b"Pieces")
    with pytest.raises(CheckpointError, match=rf"wrong checksum: .*{name}"):
        open_checkpoint(ours)
    open_checkpoint(ours, verify=False).close()


def test_sizes_are_compared_even_without_digests(ours):
    with (ours / "tokenizer.model").open("ab") as file:
        file.write(b"!")
    with pytest.raises(CheckpointError, match=r"wrong size: .*tokenizer\.model"):
        open_checkpoint(ours, verify=False)


def test_looking_reads_no_weights_and_a_failure_is_not_replaced(ours):
    flip(ours / WEIGHTS, -1)
    with open_checkpoint(ours) as source:
        assert source.names()
    with pytest.raises(ZeroDivisionError), open_checkpoint(ours) as source:
        source.read("norm.weight")
        raise ZeroDivisionError
    with pytest.raises(CheckpointError, match="wrong checksum"), open_checkpoint(ours) as source:
        source.read("norm.weight")


def test_a_header_that_says_something_else(ours):
    """Two names of one shape exchanged: every size and every shape is as before."""
    shard = ours / WEIGHTS
    one, two = b"layers.0.moe.experts.w1", b"layers.1.moe.experts.w1"
    raw = shard.read_bytes()
    raw = raw.replace(one, b"?" * len(one), 1).replace(two, one, 1).replace(b"?" * len(one), two, 1)
    shard.write_bytes(raw)
    with pytest.raises(CheckpointError, match="wrong checksum"):
        convert(ours, ours.parent / "out", "hf")


def test_a_conversion_reads_its_source_once(ours, monkeypatch):
    """All bytes but the header are hashed as they pass."""
    again = []
    real = verification._FileDigest._read_up_to

    def count(digest, position):
        if digest.path.name == WEIGHTS:
            again.append(position - digest._position)
        real(digest, position)

    monkeypatch.setattr(verification._FileDigest, "_read_up_to", count)
    convert(ours, ours.parent / "out", "hf")
    header = int.from_bytes((ours / WEIGHTS).read_bytes()[:8], "little") + 8
    assert sum(again) == header


def test_files_that_nobody_reads_are_not_read_for_their_digest(sound, tmp_path):
    parts = shutil.copytree(sound / "parts", tmp_path / "parts")
    flip(next(parts.glob("optimizer-*.safetensors")), -1)
    assert sorted(read_all(parts)) == sorted(our_shapes(MODEL))


@pytest.mark.parametrize("victim", range(4))
def test_ranks_that_read_together_share_the_work(sound, tmp_path, victim):
    """Whichever file is damaged, exactly one of them says so, whether it needed it or not."""
    parts = shutil.copytree(sound / "parts", tmp_path / "parts")
    flip(parts / f"model-rank-{victim:05d}.safetensors", -1)
    told = []
    for rank, tensor_slices in enumerate(ranks(MODEL)):
        try:
            with open_checkpoint(parts, rank=rank, world=4) as source:
                for name, tensor_slice in tensor_slices.items():
                    source.read_slice(name, tensor_slice)
        except CheckpointError as error:
            told.append((rank, f"model-rank-{victim:05d}" in str(error)))
    assert len(told) == 1 and told[0][1], told
