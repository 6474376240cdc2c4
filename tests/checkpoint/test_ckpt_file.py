"""MindSpore's .ckpt files; MindSpore itself is the oracle, in both directions."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor

from mistral_ms.checkpoint import ckpt_file
from mistral_ms.checkpoint.ckpt_file import CkptStore, encode_record_head
from mistral_ms.checkpoint.file_set import FileSet
from mistral_ms.checkpoint.writer import Entry, write_ckpt
from mistral_ms.errors import CheckpointError

RNG = np.random.default_rng(0)
ARRAYS = {
    "model.a.weight": RNG.standard_normal((3, 5, 7)).astype(np.float32),
    "model.b": RNG.standard_normal(300).astype(np.float16),
    "c": RNG.integers(0, 1 << 16, (4, 9)).astype(np.uint16),  # bits of bfloat16
}
TYPES = {"float32": "F32", "float16": "F16", "uint16": "BF16"}


def to_tensor(array):
    if array.dtype == np.uint16:
        return Tensor((array.astype(np.uint32) << 16).view(np.float32)).astype(ms.bfloat16)
    return Tensor(array)


def save(path, arrays, **options):
    """Saved by MindSpore."""
    entries = [{"name": n, "data": Parameter(to_tensor(a), name=n)} for n, a in arrays.items()]
    ms.save_checkpoint(entries, str(path), **options)
    return path


def write(directory, arrays, name="w.ckpt", step=50):
    """Written by us, in chunks that fall anywhere."""

    def chunks(array):
        flat = array.reshape(-1)
        return lambda _: (flat[i : i + step] for i in range(0, flat.size, step))

    entries = [Entry(n, a.shape, TYPES[str(a.dtype)], chunks(a)) for n, a in arrays.items()]
    write_ckpt(FileSet(directory, hashed=False), name, entries)
    return directory / name


def read(store, name):
    info = store.tensors[name]
    out = np.empty(info.size, {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[info.dtype])
    store.read_into(name, 0, out)
    return out.reshape(info.shape)


def test_what_we_write_is_what_mindspore_writes(tmp_path):
    theirs = save(tmp_path / "theirs.ckpt", ARRAYS)
    assert write(tmp_path, ARRAYS).read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("slice_bytes", [64, 100, 512 << 20])
def test_tensors_in_slices(tmp_path, monkeypatch, slice_bytes):
    """MindSpore reads what we cut; we read any range of it."""
    monkeypatch.setattr(ckpt_file, "SLICE_BYTES", slice_bytes)
    path = write(tmp_path, ARRAYS)
    theirs = ms.load_checkpoint(str(path))
    store = CkptStore([path])
    assert list(store.tensors) == list(theirs) == list(ARRAYS)
    for name, array in ARRAYS.items():
        expected = theirs[name].astype(ms.float32).asnumpy()
        assert np.array_equal(
            expected, to_tensor(array).astype(ms.float32).asnumpy(), equal_nan=True
        )
        assert np.array_equal(read(store, name), array)
        flat, size = array.reshape(-1), array.size
        for start, stop in [(0, size), (0, 1), (15, 17), (20, size - 3), (31, 33)]:
            assert np.array_equal(store.flat(name, start, stop), flat[start:stop])
            part = np.empty(stop - start, array.dtype)
            store.read_into(name, start, part)
            assert np.array_equal(part, flat[start:stop])
    store.close()


def test_what_a_training_leaves_beside_the_weights(tmp_path):
    """Scalars, integers, text, and the CRC at the end."""
    state = {"epoch_num": 3, "loss_scale": 1.5, "name": "run", "on": True}
    counter = Parameter(Tensor([7], ms.int32), name="global_step")
    scalar = Parameter(Tensor(2.5, ms.float32), name="beta1_power")
    path = tmp_path / "w.ckpt"
    entries = [{"name": p.name, "data": p} for p in (counter, scalar)]
    ms.save_checkpoint(entries, str(path), append_dict=state, crc_check=True)
    store = CkptStore([path])
    found = {name: (info.shape, info.dtype) for name, info in store.tensors.items()}
    assert found["global_step"] == ((1,), "I32")
    assert found["beta1_power"] == ((), "F32")
    assert {"epoch_num", "loss_scale", "on", "name"} < set(found)
    out = np.empty(1, np.float32)
    store.read_into("beta1_power", 0, out)
    assert out[0] == 2.5


def test_a_tensor_is_stored_once(tmp_path):
    paths = [write(tmp_path, {"a": ARRAYS["model.b"]}, name) for name in ("1.ckpt", "2.ckpt")]
    with pytest.raises(CheckpointError, match=r"stored twice: .*2\.ckpt: a, also in 1\.ckpt"):
        CkptStore(paths)


def test_every_truncation_is_noticed(tmp_path):
    whole = write(tmp_path, {"a": ARRAYS["c"], "b": ARRAYS["c"]}).read_bytes()
    between = (
        len(whole) // 2
    )  # where one record ends, nothing of the file says that another follows
    for length in range(len(whole)):
        path = tmp_path / "cut.ckpt"
        path.write_bytes(whole[:length])
        if length == between:
            assert list(CkptStore([path]).tensors) == ["a"]
            continue
        with pytest.raises(CheckpointError, match=r"^damaged"):
            CkptStore([path])


def test_changed_bytes_are_an_error_or_another_name(tmp_path):
    """No byte before the elements can change without a message, or it is in a name."""
    array = ARRAYS["c"]
    whole = write(tmp_path, {"a": array}).read_bytes()
    head = encode_record_head("a", "BF16", array.shape, array.nbytes)
    assert whole.startswith(head)
    path = tmp_path / "changed.ckpt"
    for position in range(len(head)):
        for bit in range(8):
            changed = bytearray(whole)
            changed[position] ^= 1 << bit
            path.write_bytes(changed)
            try:
                store = CkptStore([path])
            except CheckpointError as error:
                assert str(path) in str(error)
            else:
                ((name, info),) = store.tensors.items()
                assert info.size * 2 <= array.nbytes
                assert (name, info.shape, info.dtype) != ("a", array.shape, "BF16")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"BFloat16", b"BFloat61", r"unknown dtype: .*: a: BFloat61: one of Float32, "),
        (b"BFloat16", b"Float64\0", r"unknown dtype"),
        (b"\x08\x04\x08\x09", b"\x08\x05\x08\x09", r"72 bytes: \[5, 9\] of BFloat16 needs 90"),
    ],
)
def test_damaged_records(tmp_path, old, new, message):
    whole = write(tmp_path, {"a": ARRAYS["c"]}).read_bytes()
    assert old in whole
    path = tmp_path / "damaged.ckpt"
    path.write_bytes(whole.replace(old, new, 1))
    with pytest.raises(CheckpointError, match=message):
        CkptStore([path])


def test_encrypted_and_endless_files(tmp_path, monkeypatch):
    path = save(tmp_path / "w.ckpt", ARRAYS, enc_key=b"0123456789abcdef", enc_mode="AES-GCM")
    with pytest.raises(CheckpointError, match=r"^damaged or encrypted .*saved anew without a key"):
        CkptStore([path])
    monkeypatch.setattr(ckpt_file, "MAX_RECORDS", 2)
    with pytest.raises(CheckpointError, match="at most 2 records"):
        CkptStore([write(tmp_path, ARRAYS, "many.ckpt")])
