"""The file format, with the safetensors library as the oracle in both directions."""

import contextlib
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch

from mistral_ms.checkpoint.dtypes import BITS
from mistral_ms.checkpoint.safetensors_file import SafetensorsStore, encode_header, read_header
from mistral_ms.errors import CheckpointError


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.safetensors"


def write_raw(path, header, data, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_reads_what_the_library_writes(file):
    state = {
        "a": torch.randn(5, 7),
        "b": torch.randn(3).to(torch.bfloat16),
        "c": torch.randn(2, 2, 2).half(),
        "empty": torch.zeros(0, 4),
    }
    safetensors.torch.save_file(state, file, metadata={"format": "pt"})
    header = read_header(file)
    store = SafetensorsStore({file: header})
    assert header.metadata == {"format": "pt"}
    assert {n: i.shape for n, i in header.tensors.items()} == {n: t.shape for n, t in state.items()}
    for name in ("a", "b", "c"):
        expected = state[name].reshape(-1)[3:6] if name == "a" else state[name].reshape(-1)
        start = 3 if name == "a" else 0
        view = store.flat(name, start, start + expected.numel())
        read = np.empty_like(view)
        store.read_into(name, start, read)
        assert view.tobytes() == read.tobytes() == expected.view(torch.uint8).numpy().tobytes()
    store.close()


def test_a_file_that_shrinks_while_it_is_open_is_noticed(file):
    safetensors.torch.save_file({"a": torch.randn(5000)}, file)
    store = SafetensorsStore({file: read_header(file)})
    with file.open("r+b") as handle:
        handle.truncate(9000)
    with pytest.raises(CheckpointError, match=r"truncated file: .*a: it changed meanwhile"):
        store.read_into("a", 0, np.empty(5000, np.float32))


def test_the_library_reads_what_we_write(file):
    tensors = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "层.0": np.ones(3, np.float16)}
    names = [("x", "F32", (2, 3)), ("层.0", "F16", (3,))]
    header = encode_header(names, {"format": "pt"})
    file.write_bytes(header + b"".join(t.tobytes() for t in tensors.values()))
    assert len(header) % 8 == 0
    with safetensors.safe_open(file, "np") as handle:
        assert handle.metadata() == {"format": "pt"}
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(handle.get_tensor(name), tensor)


@pytest.mark.parametrize("dtype", sorted(BITS))
def test_the_width_of_every_dtype_agrees_with_the_library(file, dtype):
    nbytes = 8 * BITS[dtype] // 8
    write_raw(file, {"x": entry(dtype, [8], 0, nbytes)}, b"\0" * nbytes)
    with safetensors.safe_open(file, "np") as handle:
        assert handle.get_slice("x").get_shape() == [8]
    assert read_header(file).tensors["x"].nbytes == nbytes


LIES = {
    "overlap": ({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 4, 12)}, "must not overlap"),
    "gap": ({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 8, 12)}, "must not leave a gap"),
    "gap at the start": ({"a": entry("F32", [2], 4, 12)}, "must not leave a gap"),
    "size is not shape": ({"a": entry("F32", [4], 0, 12)}, r"F32 \[4\] needs 16 bytes"),
    "backwards": ({"a": entry("F32", [1], 12, 0)}, "needs 4 bytes"),
    "half a byte": ({"a": entry("F4", [3], 0, 12)}, "needs 1.5 bytes"),
    "negative": ({"a": entry("F32", [-3], 0, 12)}, "whole numbers"),
    "not a number": ({"a": entry("F32", [True], 0, 12)}, "whole numbers"),
    "three offsets": ({"a": {**entry("F32", [3], 0, 12), "data_offsets": [0, 4, 12]}}, "whole"),
    "dtype": ({"a": entry("F31", [3], 0, 12)}, "no such dtype"),
    "dtype is a list": ({"a": entry(["F32"], [3], 0, 12)}, "no such dtype"),
    "keys": ({"a": {"dtype": "F32", "shape": [3]}}, "exactly the keys"),
    "metadata": ({"__metadata__": [1], "a": entry("F32", [3], 0, 12)}, "must be an object"),
    "metadata value": (
        {"__metadata__": {"format": 0}, "a": entry("F32", [3], 0, 12)},
        "__metadata__: format: 0: must be a string",
    ),
    "not an object": ([1, 2], "must be a JSON object"),
    "not JSON": (b"{nonsense", "must be JSON"),
    "deeply nested": (b'{"a":' + b"[" * 100_000, "damaged header: .*must be JSON"),
    "twice": (
        b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]},'
        b'"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}',
        "occurs twice",
    ),
    "too much data": ({"a": entry("F32", [2], 0, 8)}, "damaged header: .*the header describes"),
}


@pytest.mark.parametrize("lie", sorted(LIES))
def test_a_header_that_lies_is_refused(file, lie):
    header, message = LIES[lie]
    write_raw(file, header, b"\0" * 12)
    with pytest.raises(CheckpointError, match=message):
        read_header(file)


@pytest.mark.parametrize("keep", [0, 5, 8, 40, -1])
def test_a_truncated_file_is_refused(file, keep):
    write_raw(file, {"a": entry("F32", [3], 0, 12)}, b"\0" * 12)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"truncated file: .*model\.safetensors"):
        read_header(file)


def test_a_header_longer_than_the_format_allows_is_refused(file):
    write_raw(file, {"a": entry("F32", [3], 0, 12)}, b"\0" * 12, length=1 << 60)
    with pytest.raises(CheckpointError, match="at most 16777216 bytes"):
        read_header(file)


def test_a_missing_file_is_named(file):
    with pytest.raises(CheckpointError, match=r"cannot read: .*model\.safetensors: No such file"):
        read_header(file)


def test_a_tensor_in_two_files_is_refused(tmp_path):
    headers = {}
    for name in ("one.safetensors", "two.safetensors"):
        write_raw(tmp_path / name, {"a": entry("F32", [3], 0, 12)}, b"\0" * 12)
        headers[tmp_path / name] = read_header(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"tensor in two files: .*a, also in one"):
        SafetensorsStore(headers)


def open_files(directory):
    """Names of the files in ``directory`` that this process holds open, maps included."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists them is gone again
            found.append(descriptor.readlink())
    return [path.name for path in found if path.parent == directory]


@pytest.mark.parametrize("cause", ["tensor in two files", "cannot read"])
def test_a_store_that_cannot_be_opened_leaves_no_file_open(tmp_path, cause):
    headers = {}
    for name in ("one", "two"):
        tensor = "a" if cause == "tensor in two files" else name
        write_raw(tmp_path / name, {tensor: entry("F32", [3], 0, 12)}, b"\0" * 12)
        headers[tmp_path / name] = read_header(tmp_path / name)
    if cause == "cannot read":
        (tmp_path / "two").write_bytes(b"")  # opens, but an empty file cannot be mapped
    # The exception keeps the store alive, so that what it holds is still there to be seen.
    with pytest.raises(CheckpointError, match=cause) as caught:
        SafetensorsStore(headers)
    assert open_files(tmp_path) == [], caught
