"""All or nothing: whatever fails, no half-written target stays and an old one is untouched."""

import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from mistral_ms import staging
from mistral_ms.checkpoint import convert, file_set, inspect, stream, writer
from mistral_ms.checkpoint.file_set import FileWriter
from mistral_ms.checkpoint.files import MANIFEST
from mistral_ms.checkpoint.target import TargetDirectory
from mistral_ms.errors import CheckpointError


@pytest.fixture
def source(tmp_path, tiny_config, save_random):
    save_random(tmp_path / "src", tiny_config)
    return tmp_path / "src"


def content(directory):
    return {p.name: p.read_bytes() for p in sorted(directory.iterdir())}


def names(directory):
    return sorted(p.name for p in directory.iterdir())


class Fail:
    """Fails on the n-th chunk, from whichever worker."""

    def __init__(self, after, error):
        self.left, self.error = after, error

    def __call__(self, done, total):
        self.left -= 1
        if self.left < 0:
            raise self.error


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("after", [0, 7])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("boom")], ids=type)
def test_a_failure_on_the_way_leaves_everything_as_it_was(source, overwrite, after, error):
    dst = source.parent / "dst"
    if overwrite:
        convert(source, dst, "hf")
    before = names(source.parent), content(dst) if overwrite else None
    with pytest.raises(type(error)):
        options = {"max_shard_bytes": 2_000, "progress": Fail(after, error)}
        convert(source, dst, "mistral_ms", overwrite=overwrite, **options)
    assert (names(source.parent), content(dst) if overwrite else None) == before


def test_an_interrupt_while_workers_write_stops_them_all(source):
    """Ctrl-C reaches the main thread, which only waits: the workers must end all the same."""
    started, go_on = threading.Event(), threading.Event()

    def progress(done, total):
        started.set()
        go_on.wait(10)

    def interrupt():
        started.wait(10)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        go_on.set()

    # MindSpore, once it has compiled something, answers Ctrl-C by ending the process; a shell may
    # have told a background job to ignore it. Python's own answer is what is tested.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=interrupt).start()
    try:
        with pytest.raises(KeyboardInterrupt):
            convert(source, source.parent / "dst", "hf", max_shard_bytes=2_000, progress=progress)
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
    assert names(source.parent) == ["src"]


def test_when_one_shard_fails_the_others_stop_soon(source, monkeypatch):
    monkeypatch.setattr(stream, "CHUNK_BYTES", 40)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    calls = []

    def progress(done, total):
        calls.append(total - done)
        time.sleep(0.001)
        if len(calls) == 20:
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        convert(source, source.parent / "dst", "hf", max_shard_bytes=3_000, progress=progress)
    # 40 bytes a call: had the other workers gone on, little would be left. The bound is generous,
    # for the main thread must be scheduled before it can stop them.
    assert calls[-1] > (calls[0] + 40) / 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_fills_up_on_the_way(source, monkeypatch, number):
    written = []

    class Full(FileWriter):
        def write(self, data):
            written.append(self.path)
            if len(written) > 12:
                monkeypatch.setattr(os, "write", refuse)
            super().write(data)

    def refuse(descriptor, data):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(file_set, "FileWriter", Full)
    with pytest.raises(CheckpointError, match=r"disk full: .*nothing was changed: free some space"):
        convert(source, source.parent / "dst", "hf")
    assert names(source.parent) == ["src"]


def test_a_short_write_is_continued(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: real(fd, data[:3]))
    file = FileWriter(tmp_path / "f", hashed=True)
    file.write(b"0123456789")
    file.close()
    assert (tmp_path / "f").read_bytes() == b"0123456789"


def test_a_file_size_limit_of_the_system(source):
    """RLIMIT_FSIZE makes the kernel itself refuse the write, without root and without mocks."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(
            CheckpointError, match=r"disk full: .*model\.safetensors: File too large"
        ):
            convert(source, source.parent / "dst", "hf")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert names(source.parent) == ["src"]


def test_a_disk_that_is_known_to_be_too_small(source, monkeypatch):
    usage = SimpleNamespace(total=10**9, used=10**9 - 100, free=100)
    monkeypatch.setattr(file_set.shutil, "disk_usage", lambda path: usage)
    message = r"disk full: .*dst: 0\.00 GB free: .*are needed; nothing was changed"
    with pytest.raises(CheckpointError, match=message):
        convert(source, source.parent / "dst", "hf")
    assert names(source.parent) == ["src"]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 64 KB; only root can mount one."""
    place = tmp_path / "small"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip(
            "only root can mount a small tmpfs; without it "
            "test_a_disk_that_is_known_to_be_too_small (disk_usage replaced), "
            "test_a_disk_that_fills_up_on_the_way (os.write replaced) and "
            "test_a_file_size_limit_of_the_system (the kernel refuses) cover the same two paths"
        )
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("noticed", ["before", "meanwhile"])
def test_a_really_full_disk(source, small_disk, monkeypatch, noticed):
    if noticed == "meanwhile":  # somebody else fills the disk after we looked
        monkeypatch.setattr(TargetDirectory, "require_space", lambda self, nbytes: None)
    (small_disk / "other").write_bytes(b"x" * 50_000)
    message = "free: .* are needed" if noticed == "before" else "No space left on device"
    with pytest.raises(CheckpointError, match=f"disk full: .*{message}"):
        convert(source, small_disk / "dst", "hf")
    assert names(small_disk) == ["other"]


def test_an_existing_target_is_not_overwritten_unasked(source):
    dst = source.parent / "dst"
    dst.mkdir()
    with pytest.raises(CheckpointError, match=r"target exists: .*dst: .*--overwrite"):
        convert(source, dst)
    assert names(dst) == []


@pytest.mark.parametrize("before", ["hf", "mistral", "mistral_ms"])
def test_overwrite_replaces_a_checkpoint_of_any_kind(source, before):
    dst = source.parent / "dst"
    convert(source, dst, before)
    convert(source, dst, "mistral_ms", dtype="bf16", overwrite=True)
    assert inspect(dst, verify=True).ok
    assert inspect(dst).dtypes.keys() == {"BF16"}
    assert names(source.parent) == ["dst", "src"]


@pytest.mark.parametrize("what", ["notes.txt", "model.py", "runs/", "config.yaml", ".git/"])
def test_overwrite_never_deletes_a_directory_with_unknown_files(source, what):
    dst = source.parent / "dst"
    convert(source, dst, "hf")
    if what.endswith("/"):
        (dst / what).mkdir()
    else:
        (dst / what).write_text("precious")
    before = names(dst)
    with pytest.raises(CheckpointError, match=rf"target is not a checkpoint: .*{what.strip('/')}"):
        convert(source, dst, "hf", overwrite=True)
    assert names(dst) == before


def test_overwrite_does_not_replace_a_file(source):
    (source.parent / "dst").write_text("precious")
    with pytest.raises(CheckpointError, match="target is not a directory"):
        convert(source, source.parent / "dst", overwrite=True)


def test_a_target_that_appears_meanwhile_is_not_replaced(source):
    dst = source.parent / "dst"

    def progress(done, total):
        dst.mkdir(exist_ok=True)

    with pytest.raises(CheckpointError, match="target exists"):
        convert(source, dst, progress=progress)
    assert names(source.parent) == ["dst", "src"]


def fail_rename(monkeypatch, *parts):
    """Lets every renaming fail of a directory whose name contains one of ``parts``."""
    real = Path.rename

    def rename(self, where):
        if any(part in self.name for part in parts):
            raise OSError(errno.EIO, "I/O error")
        return real(self, where)

    monkeypatch.setattr(Path, "rename", rename)


@pytest.mark.parametrize("which", [".partial-", "dst"], ids=["the-second", "the-first"])
def test_the_old_target_returns_when_a_rename_fails(source, monkeypatch, which):
    dst = source.parent / "dst"
    convert(source, dst, "hf")
    before = content(dst)
    fail_rename(monkeypatch, which)
    message = r"cannot write: .*dst: I/O error: nothing was changed"
    with pytest.raises(CheckpointError, match=message):
        convert(source, dst, "mistral", overwrite=True)
    assert content(dst) == before
    assert names(source.parent) == ["dst", "src"]


def test_an_old_target_that_cannot_return_is_kept_and_named(source, monkeypatch):
    dst = source.parent / "dst"
    convert(source, dst, "hf")
    before = content(dst)
    fail_rename(monkeypatch, ".partial-", ".old-")
    message = r"dst: I/O error: the old checkpoint is whole, but its name is now .*\.dst\.old-"
    with pytest.raises(CheckpointError, match=message):
        convert(source, dst, "mistral", overwrite=True)
    (aside,) = source.parent.glob(".dst.old-*")
    assert content(aside) == before
    assert names(source.parent) == [aside.name, "src"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failure_after_the_rename_says_that_the_new_target_stands(source, monkeypatch, overwrite):
    dst = source.parent / "new" / "dst"
    if overwrite:
        convert(source, dst, "hf")
    real = staging.sync_directory

    def sync(path):
        if path == dst.parent:
            raise OSError(errno.EIO, "I/O error")
        real(path)

    monkeypatch.setattr(staging, "sync_directory", sync)
    message = r"perhaps not yet on the disk: .*dst: I/O error: the new checkpoint is complete"
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(source, dst, "mistral_ms", overwrite=overwrite)
    assert "nothing was changed" not in str(caught.value)
    assert inspect(dst, verify=True).ok
    assert inspect(dst).kind == "mistral_ms"
    assert names(dst.parent) == ["dst"]


def test_a_link_stays_and_what_it_leads_to_is_replaced(source):
    real, link = source.parent / "real", source.parent / "link"
    convert(source, real, "hf")
    link.symlink_to(real)
    convert(source, link, "mistral", overwrite=True)
    assert link.is_symlink()
    assert inspect(real).kind == "mistral"


def test_source_and_target_must_differ(source):
    (source.parent / "link").symlink_to(source)
    with pytest.raises(CheckpointError, match="source is the target"):
        convert(source, source.parent / "link", overwrite=True)


@pytest.mark.parametrize("fails", [False, True])
def test_missing_parents_are_made_and_go_again_on_failure(source, fails):
    dst = source.parent / "a" / "b" / "dst"
    progress = Fail(0, RuntimeError("boom")) if fails else None
    if fails:
        with pytest.raises(RuntimeError):
            convert(source, dst, progress=progress)
        assert names(source.parent) == ["src"]
    else:
        convert(source, dst)
        assert inspect(dst).ok


def test_a_parent_that_is_a_file(source):
    (source.parent / "file").write_text("x")
    with pytest.raises(CheckpointError, match="cannot write"):
        convert(source, source.parent / "file" / "dst")


def test_permissions_are_those_of_any_new_directory(source):
    old = os.umask(0o027)
    try:
        convert(source, source.parent / "dst")
    finally:
        os.umask(old)
    dst = source.parent / "dst"
    assert stat.S_IMODE(dst.stat().st_mode) == 0o750
    assert {stat.S_IMODE(p.stat().st_mode) for p in dst.iterdir()} == {0o640}


def test_everything_is_synced_before_the_rename_and_complete_is_last(source, monkeypatch):
    order = []
    real_fsync, real_rename = os.fsync, Path.rename

    def fsync(descriptor):
        order.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        real_fsync(descriptor)

    def rename(self, where):
        order.append("rename")
        return real_rename(self, where)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    convert(source, source.parent / "dst", "mistral_ms")
    assert set(order[: order.index(MANIFEST)]) == set(names(source.parent / "dst")) - {MANIFEST}
    after = order[order.index(MANIFEST) + 1 :]
    assert after[0].startswith(".dst.partial-")
    assert after[1:] == ["rename", source.parent.name]


def test_a_killed_process_leaves_no_target(source, tmp_path):
    """SIGKILL cannot be caught: a partial sibling may stay, but nothing under the target's name."""
    script = (
        "import sys, os, signal\n"
        "from mistral_ms.checkpoint import convert\n"
        "convert(sys.argv[1], sys.argv[2], 'mistral_ms',\n"
        "        progress=lambda d, t: os.kill(os.getpid(), signal.SIGKILL))\n"
    )
    command = [sys.executable, "-c", script, str(source), str(tmp_path / "dst")]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert not (tmp_path / "dst").exists()
    (partial,) = tmp_path.glob(".dst.partial-*")
    assert "incomplete" in (inspect(partial).problem or "")


@pytest.mark.parametrize(
    ("sizes", "limit", "least", "want"),
    [
        ([1] * 10, 100, 4, [3, 2, 3, 2]),
        ([5, 1, 1, 1, 1, 1], 100, 3, [1, 3, 2]),
        ([100, 1, 1, 1, 1, 1], 1000, 4, [1, 2, 2, 1]),
        ([1, 1], 100, 4, [1, 1]),
        ([1] * 10, 3, 2, [3, 3, 3, 1]),
    ],
)
def test_shards_that_are_written_at_the_same_time_are_about_equal(sizes, limit, least, want):
    """A limit in float32 numbers, and how many tensors each shard has."""
    entries = [writer.Entry(str(n), (n,), "F32", lambda w: iter(())) for n in sizes]
    shards = writer.split_shards(entries, 4 * limit, least)
    assert [len(shard) for shard in shards] == want
    assert [e for shard in shards for e in shard] == entries


def test_a_tensor_gets_its_own_shard_when_it_is_larger_than_the_limit():
    entries = [
        writer.Entry(str(i), (n,), "F32", lambda w: iter(())) for i, n in enumerate([3, 9, 1, 1])
    ]
    shards = writer.split_shards(entries, 12)
    assert [[e.name for e in shard] for shard in shards] == [["0"], ["1"], ["2", "3"]]
