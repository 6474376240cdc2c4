"""One writer at a time, all of it or nothing, and nothing is left behind: without MindSpore."""

import errno
import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from checkpoint.test_kill import CALLS
from support.parts import MODEL

from mistral_ms.checkpoint import convert, inspect, open_checkpoint, our_shapes, save_native
from mistral_ms.checkpoint.presplit import presplit
from mistral_ms.config import MoEArchitecture
from mistral_ms.errors import BusyError, CheckpointError
from mistral_ms.staging import Lock, StagedDirectory

SPARSE = MODEL.model_copy(update={"moe": MoEArchitecture(num_local_experts=4)})
SHAPES = our_shapes(SPARSE)
WHOLE = [{name: tuple(slice(0, n) for n in shape) for name, shape in SHAPES.items()}]
WRITERS = {
    "convert": lambda src, dst, **options: convert(src, dst, "hf", **options),
    "presplit": lambda src, dst, **options: presplit(src, dst, WHOLE, "one", **options),
}


POINTS = 16  # signals per writer, spread over all its calls


@pytest.fixture
def tmp_path():
    """In memory where there is such a place: hundreds of small files are synced here."""
    shared = Path("/dev/shm")
    root = tempfile.mkdtemp(dir=shared if os.access(shared, os.W_OK) else None)
    yield Path(root)
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two checkpoints of one shape; every number of the first is 1, of the second 2."""
    root = tmp_path_factory.mktemp("sources")
    for value in (1, 2):
        tensors = [(n, s, "float32", np.full(s, value, np.float32)) for n, s in SHAPES.items()]
        save_native(root / str(value), SPARSE, tensors, {"tokenizer.model": b"%d" % value})
    return root


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def in_fork(work):
    """Runs ``work`` in a fork; returns its exit status. It leaves as a command does on a signal."""
    child = os.fork()
    if child == 0:
        gc.freeze()  # what the tests have imported is not what is collected below
        status = 99
        try:
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
            signal.signal(signal.SIGINT, signal.default_int_handler)
            work()
            status = 0
        except SystemExit as end:
            status = end.code
        except KeyboardInterrupt:
            status = 130
        finally:
            gc.collect()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def at_call(number, do):
    """Calls ``do`` before the ``number``-th call that changes the disk; returns the count."""
    count = [0]

    def counting(original):
        def call(*args, **kwargs):
            count[0] += 1
            if count[0] == number:
                do()
            return original(*args, **kwargs)

        return call

    for name in CALLS:
        setattr(os, name, counting(getattr(os, name)))
    return count


class TestSecondWriter:
    @pytest.mark.parametrize("writer", WRITERS)
    def test_is_refused_by_name_and_the_first_one_goes_on(self, sources, tmp_path, writer):
        refused = []

        def progress(done, total):
            if not refused:
                with pytest.raises(BusyError) as caught:
                    WRITERS[writer](sources / "2", tmp_path / "dst")
                refused.append(str(caught.value))

        convert(sources / "1", tmp_path / "dst", progress=progress)
        assert f"in use: {tmp_path / 'dst'}: process {os.getpid()} on " in refused[0]
        assert names(tmp_path) == ["dst"]
        assert inspect(tmp_path / "dst", verify=True).ok

    @pytest.mark.parametrize("writer", WRITERS)
    def test_two_at_once_never_make_a_mixture(self, sources, tmp_path, writer):
        ended = []

        def write(value):
            try:
                WRITERS[writer](sources / str(value), tmp_path / "dst", overwrite=True)
                ended.append("done")
            except (BusyError, CheckpointError) as error:
                ended.append(type(error).__name__)

        for _ in range(10):
            threads = [threading.Thread(target=write, args=(value,)) for value in (1, 2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            with open_checkpoint(tmp_path / "dst") as source:
                values = {float(v) for n in SHAPES for v in np.unique(source.read(n))}
            assert len(values) == 1
            tokenizer = (tmp_path / "dst" / "tokenizer.model").read_bytes()
            assert tokenizer == b"%d" % values.pop()
            assert names(tmp_path) == ["dst"]
        assert "done" in ended and set(ended) <= {"done", "BusyError"}

    def test_in_another_process_is_named_with_its_command(self, tmp_path):
        script = (
            "import sys; from pathlib import Path; from mistral_ms.staging import Lock\n"
            "lock = Lock(Path(sys.argv[1]), Path('PLACE')).acquire(); print('held', flush=True)\n"
            "sys.stdin.read()"
        )
        lock = tmp_path / ".lock"
        command = [sys.executable, "-c", script, str(lock)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        with subprocess.Popen(command, **pipes) as other:
            assert other.stdout.readline() == b"held\n"
            with pytest.raises(BusyError, match=rf"process {other.pid} on .*{lock}.*one process"):
                Lock(lock, tmp_path).acquire()
            other.kill()
            other.wait()
            assert lock.exists()
            with Lock(lock, tmp_path) as mine:  # a lock ends with its process
                assert mine.held
                assert json.loads(lock.read_text())["process"] == os.getpid()
        assert not lock.exists()

    def test_forks_do_not_give_the_lock_back(self, tmp_path):
        with Lock(tmp_path / "lock", tmp_path) as lock:
            assert in_fork(lock.release) == 0
            with pytest.raises(BusyError):
                Lock(tmp_path / "lock", tmp_path).acquire()

    def test_a_file_system_without_locks(self, tmp_path, monkeypatch):
        import fcntl

        def refuse(descriptor, how):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(fcntl, "flock", refuse)
        first, second = StagedDirectory(tmp_path / "x"), StagedDirectory(tmp_path / "x")
        assert first.open() != second.open()
        first.close()
        assert second.directory.is_dir(), "leftovers stay: they may be somebody's"
        second.close()
        assert names(tmp_path) == []


class TestInterrupted:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    @pytest.mark.parametrize("writer", WRITERS)
    def test_wherever_it_is_nothing_is_left(self, sources, tmp_path, writer, number):
        counted = tmp_path / "count"

        def undisturbed():
            count = at_call(None, None)
            WRITERS[writer](sources / "1", tmp_path / "a" / "dst")
            counted.write_text(str(count[0]))

        assert in_fork(undisturbed) == 0
        total = int(counted.read_text())
        assert total > 20
        whole = 0
        for call in sorted({1 + (total - 1) * i // (POINTS - 1) for i in range(POINTS)}):
            root = tmp_path / str(call)

            def disturbed(root=root, call=call):
                at_call(call, lambda: os.kill(os.getpid(), number))
                WRITERS[writer](sources / "1", root / "a" / "dst")

            status = in_fork(disturbed)
            assert status in (128 + number, 0)  # a signal may arrive after the last call
            if root.exists():  # in its place with all its files, and nothing else
                assert names(root / "a") == ["dst"], call
                assert inspect(root / "a" / "dst", verify=True).ok
                whole += 1
        assert 0 < whole < POINTS / 2

    @pytest.mark.slow
    def test_in_a_replacement_the_old_or_the_new_one_is_there(self, sources, tmp_path):
        seen = set()
        for call in range(1, 200, 3):
            root = tmp_path / str(call)
            convert(sources / "2", root / "dst", "mindspore", overwrite=True)

            def disturbed(root=root, call=call):
                at_call(call, lambda: os.kill(os.getpid(), signal.SIGTERM))
                convert(sources / "1", root / "dst", "mindspore", overwrite=True)

            status = in_fork(disturbed)
            assert names(root) == ["dst"], call
            with open_checkpoint(root / "dst") as source:
                seen.add((status == 0, float(source.read("norm.weight")[0])))
            if status == 0:
                break
        assert {(False, 2.0), (True, 1.0)} <= seen

    @pytest.mark.parametrize("writer", WRITERS)
    def test_a_full_disk(self, sources, tmp_path, writer, monkeypatch):
        real, calls = os.write, []

        def full(descriptor, data):
            calls.append(descriptor)
            if len(calls) > 5:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(descriptor, data)

        monkeypatch.setattr(os, "write", full)
        with pytest.raises(CheckpointError, match="disk full: "):
            WRITERS[writer](sources / "1", tmp_path / "dst")
        assert names(tmp_path) == []


class TestNextStart:
    def kill(self, sources, root, call, **options):
        """A conversion that is killed before one of its calls."""

        def work():
            at_call(call, lambda: os.kill(os.getpid(), signal.SIGKILL))
            convert(sources / "1", root / "dst", "mindspore", **options)

        return in_fork(work)

    def test_removes_what_killed_writers_left_and_nothing_else(self, sources, tmp_path):
        for call in (12, 16, 20):
            assert self.kill(sources, tmp_path, call) == -signal.SIGKILL
        kept = [
            ".dst.partial-",
            ".dst.partial-1.txt",
            ".other.partial-abcdef",
            "dst.partial-abcdef",
        ]
        for name in kept:
            (tmp_path / name).mkdir()
        (tmp_path / ".dst.partial-fedcba").symlink_to(tmp_path / ".other.partial-abcdef")
        kept.append(".dst.partial-fedcba")
        assert [n for n in names(tmp_path) if n not in kept] != []
        convert(sources / "2", tmp_path / "dst")
        assert names(tmp_path) == sorted([*kept, "dst"])

    def test_between_the_renames_the_old_one_comes_back(self, sources, tmp_path):
        """Killed at each of the last calls of a replacement; the next start asks before its own."""
        came_back, counted = False, tmp_path / "count"

        def undisturbed():
            count = at_call(None, None)
            convert(sources / "1", tmp_path / "dst", "mindspore")
            counted.write_text(str(count[0]))

        assert in_fork(undisturbed) == 0
        for call in range(int(counted.read_text()) - 3, 200):
            root = tmp_path / str(call)
            convert(sources / "2", root / "dst", "mindspore")
            status = self.kill(sources, root, call, overwrite=True)
            came_back |= not (root / "dst").exists()
            with pytest.raises(CheckpointError, match="target exists"):
                convert(sources / "1", root / "dst")
            with open_checkpoint(root / "dst") as source:
                source.read("norm.weight")
            if status == 0:
                break
            convert(sources / "1", root / "dst", overwrite=True)
            assert names(root) == ["dst"]
        assert came_back, "no kill hit the moment between the renames"
