"""Every form in which torch stores a tensor is read as torch reads it, or refused.

The oracle is torch.load without a memory map.
"""

import tracemalloc
import zipfile
from collections import OrderedDict

import numpy as np
import pytest
import torch

from mistral_ms.checkpoint.pickle_file import PickleStore
from mistral_ms.errors import CheckpointError

BASE = torch.arange(24.0).reshape(4, 6)


def shared():
    return {"whole": BASE, "rows": BASE[1:3], "flat": BASE.reshape(-1), "again": BASE}


def views():
    return {
        "transposed": BASE.T,
        "columns": BASE[:, 1:4],
        "every other": BASE[::2, ::3],
        "expanded": BASE[:, :1].expand(4, 5),
        "bfloat16": BASE.bfloat16().T,
        "scalar": BASE[1, 2],
        "empty": BASE[:0],
        "parameter": torch.nn.Parameter(BASE.half()[2:]),
        "negated": torch._neg_view(BASE),
    }


def repack(path, method, only=""):
    """What a zip program makes of an archive: entries whose name ends on ``only`` compressed."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            how = method if name.endswith(only) else zipfile.ZIP_STORED
            archive.writestr(name, data, how)


def check(path):
    """Compares all of every tensor, and a part from the middle of it, with torch's reading."""
    expected = torch.load(path, weights_only=True, mmap=False)
    store = PickleStore([path])
    assert sorted(store.tensors) == sorted(expected)
    for name, tensor in expected.items():
        tensor = tensor.detach().resolve_neg()
        bits = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
        values = bits.contiguous().numpy().reshape(-1)
        for start, stop in [(0, values.size), (values.size // 3, values.size // 2)]:
            found = store.flat(name, start, stop).view(values.dtype)
            np.testing.assert_array_equal(found, values[start:stop], err_msg=name)
    store.close()


@pytest.mark.parametrize("content", [shared, views])
@pytest.mark.parametrize("form", ["stored", "deflated", "one entry deflated", "legacy"])
def test_tensors_are_what_torch_reads_without_a_map(tmp_path, content, form):
    path = tmp_path / "pytorch_model.bin"
    torch.save(content(), path, _use_new_zipfile_serialization=form != "legacy")
    if form == "deflated":
        repack(path, zipfile.ZIP_DEFLATED)
    elif form == "one entry deflated":
        repack(path, zipfile.ZIP_DEFLATED, only="data/1" if content is views else "data/0")
    check(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compression_that_torch_does_not_know_is_refused(tmp_path, method):
    torch.save(shared(), tmp_path / "x.bin")
    repack(tmp_path / "x.bin", method)
    with pytest.raises(CheckpointError, match=r"damaged, .*x\.bin: .*unsupported method"):
        PickleStore([tmp_path / "x.bin"])


@pytest.mark.parametrize("zipped", [True, False])
def test_a_tensor_without_values_is_refused(tmp_path, zipped):
    meta = {"w": torch.empty(3, device="meta")}
    torch.save(meta, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"unsupported tensor: .*x\.bin: w: .*on meta"):
        PickleStore([tmp_path / "x.bin"])


@pytest.mark.parametrize("zipped", [True, False])
def test_nested_tensors_are_refused_and_their_key_named(tmp_path, zipped):
    nested = {"epoch": torch.ones(1), "model": {"w": BASE}}
    torch.save(nested, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        CheckpointError, match=r"not a state dict: .*dict with a dict under 'model'"
    ):
        PickleStore([tmp_path / "x.bin"])


class Forged:
    """A tensor over BASE's 24 numbers with an offset, size and strides of one's own."""

    def __init__(self, offset, size, strides):
        storage = torch.storage.TypedStorage(
            wrap_storage=BASE.untyped_storage(), dtype=torch.float32, _internal=True
        )
        self.arguments = (storage, offset, size, strides, False, OrderedDict())

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, self.arguments


@pytest.mark.parametrize("form", ["stored", "deflated", "legacy"])
@pytest.mark.parametrize(
    "geometry",
    [(0, (8, 6), (6, 1)), (20, (6,), (1,)), (-2, (2,), (1,)), (23, (24,), (-1,))],
    ids=["too large", "behind the end", "before the start", "negative stride"],
)
def test_a_tensor_outside_its_storage_is_refused(tmp_path, geometry, form):
    path = tmp_path / "x.bin"
    torch.save({"w": Forged(*geometry)}, path, _use_new_zipfile_serialization=form != "legacy")
    if form == "deflated":
        repack(path, zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match=r"damaged, truncated or unsafe pickle: .*x\.bin"):
        PickleStore([path])


def test_an_archive_without_its_directory_is_refused(tmp_path):
    torch.save(shared(), tmp_path / "x.bin")
    raw = (tmp_path / "x.bin").read_bytes()
    (tmp_path / "x.bin").write_bytes(raw[: raw.rindex(b"PK\x05\x06")])
    with pytest.raises(CheckpointError, match=r"damaged, truncated or unsafe pickle: .*x\.bin"):
        PickleStore([tmp_path / "x.bin"])


def entry_of(raw, name, header):
    """Where the local header of the first entry of this name lies."""
    at = raw.index(name) - header
    assert raw[at : at + 4] == b"PK\x03\x04"
    return at


def test_an_entry_that_is_shorter_than_its_tensor_is_not_read_beyond_its_end(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"one": BASE, "two": BASE + 1}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data[:40] if name.endswith("data/0") else data)
    with pytest.raises(CheckpointError, match=r"record size \(40 bytes\) does not match"):
        PickleStore([path])


def test_a_header_that_shifts_its_bytes_is_noticed(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"one": BASE}, path)
    raw = bytearray(path.read_bytes())
    raw[entry_of(raw, b"a/data/0", 30) + 28] ^= 4  # the length of the header's extra field
    path.write_bytes(raw)
    check(path)  # read whole, by the archive's directory, or refused by torch


def test_a_legacy_pickle_with_a_damaged_length_asks_for_no_more_than_it_has(tmp_path):
    path = tmp_path / "a.pth"
    torch.save({"one": BASE}, path, _use_new_zipfile_serialization=False)
    raw = bytearray(path.read_bytes())
    at = raw.index(b"X\x03\x00\x00\x00one")  # a string of 3 bytes
    raw[at + 4] = 0x7F  # of 2 GB now
    path.write_bytes(raw)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="damaged, truncated or unsafe"):
        PickleStore([path])
    assert tracemalloc.get_traced_memory()[1] < 1 << 26
    tracemalloc.stop()
