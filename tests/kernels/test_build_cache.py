"""The cache of objects: by what they are made of, for all checkouts, by many processes at once.

A script stands in for the compiler: it notes that it was called and writes what it was given.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ascend_kernels import build_twin as builder

ROOT = Path(builder.__file__).parents[1]
COMPILER = """#!/bin/sh
if [ "$1" = --version ]; then cat "$STAND_IN/version"; exit; fi
for argument; do output=$argument; done
echo "$output" >> "$STAND_IN/calls"
echo half > "$output"
sleep "$(cat "$STAND_IN/seconds")"
echo "$@" > "$output"
"""
SCRIPT = "from ascend_kernels.build_twin import build_twin; print(build_twin())"


class StandIn:
    """A compiler that takes no time, and a cache of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cache = folder / "cache" / "kernels"
        (folder / "bin").mkdir()
        tool = folder / "bin" / "g++"
        tool.write_text(COMPILER)
        tool.chmod(0o755)
        self.says("g++ 12", seconds=0)

    def says(self, version: str, seconds: float) -> None:
        (self.folder / "version").write_text(version)
        (self.folder / "seconds").write_text(str(seconds))
        builder._version.cache_clear()

    def calls(self) -> list[str]:
        """What was made since the last time one asked."""
        log = self.folder / "calls"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return [Path(line).name for line in lines]

    def environ(self) -> dict[str, str]:
        return {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "STAND_IN": str(self.folder),
            "MISTRAL_MS_CACHE": str(self.folder / "cache"),
        }

    def start(self, checkout: Path = ROOT) -> subprocess.Popen:
        """Another process that builds everything."""
        environ = os.environ | self.environ() | {"PYTHONPATH": f"{checkout}:{ROOT}"}
        command = [sys.executable, "-c", SCRIPT]
        return subprocess.Popen(
            command, env=environ, stdout=subprocess.PIPE, text=True, start_new_session=True
        )


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    made = StandIn(tmp_path)
    for name, value in made.environ().items():
        monkeypatch.setenv(name, value)
    yield made
    builder._version.cache_clear()


def everything() -> int:
    return len(builder.all_units()) + 1  # and the library


def test_a_second_build_compiles_nothing_and_gives_the_same_library(stand_in):
    first = builder.build_twin()
    assert len(stand_in.calls()) == everything()
    assert builder.build_twin() == first
    assert not stand_in.calls()


def test_what_an_object_is_made_of_decides(stand_in, tmp_path):
    source, header, part = (tmp_path / "src" / name for name in ("a.cpp", "a.h", "part.cpp"))
    source.parent.mkdir()
    for path in (source, header, part):
        path.write_text(f"// {path.name}")
    unit = builder.Unit(source, parts=(part,))
    made = {builder.build_twin(units=[unit])}
    for path in (source, header, part):
        path.write_text(f"// {path.name} has changed")
        made.add(builder.build_twin(units=[unit]))
    made.add(builder.build_twin(units=[builder.Unit(source, ("-DA",), parts=(part,))]))
    made.add(builder.build_twin(units=[unit], strict=True))
    made.add(builder.build_twin(units=[unit], sanitize=True))
    stand_in.says("g++ 13", seconds=0)
    made.add(builder.build_twin(units=[unit]))
    assert len(made) == 8
    assert len(stand_in.calls()) == 2 * 8  # an object and a library each


def test_processes_that_build_at_once_share_the_work(stand_in):
    """Each object is made once, and nobody takes one that is half written."""
    stand_in.says("g++ 12", seconds=0.1)
    running = [stand_in.start() for _ in range(3)]
    made = [process.communicate(timeout=60)[0].strip() for process in running]
    assert len(set(made)) == 1
    calls = stand_in.calls()
    assert len(calls) == len(set(calls)) == everything()
    assert "half" not in {path.read_text().strip() for path in stand_in.cache.glob("*-*")}


def test_two_checkouts_share_their_objects(stand_in, tmp_path):
    here = builder.build_twin()
    stand_in.calls()
    skipped = shutil.ignore_patterns("build", "__pycache__")
    shutil.copytree(ROOT / "ascend_kernels", tmp_path / "other" / "ascend_kernels", ignore=skipped)
    there = stand_in.start(tmp_path / "other").communicate(timeout=60)[0].strip()
    assert there == str(here)
    assert not stand_in.calls()


def test_a_build_that_was_killed_disturbs_no_later_one(stand_in):
    """Its compilers may go on: they must not write into the files of the later build."""
    stand_in.says("g++ 12", seconds=60)
    process = stand_in.start()
    try:
        while not list(stand_in.cache.glob("*.part")):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.wait()
        stand_in.says("g++ 12", seconds=0)
        left = set(stand_in.calls())
        builder.build_twin()
        made = stand_in.calls()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
    # the killed one's last compiler may have begun since, and says so then
    made = [name for name in made if name.endswith(f".{os.getpid()}.part")]
    assert len(made) == everything()
    assert not left & set(made)


def test_what_nobody_used_for_a_month_goes(stand_in):
    library = builder.build_twin()
    month = (builder.KEEP_DAYS + 1) * 24 * 3600
    old, used = stand_in.cache / "gone-0.o", stand_in.cache / "used-0.o"
    for path, age in ((old, month), (used, month / 2)):
        path.write_text("x")
        os.utime(path, times=(path.stat().st_mtime - age,) * 2)
    assert builder.build_twin() == library
    assert not old.exists()
    assert used.exists()


def test_without_a_home_to_write_objects_lie_beside_the_sources(stand_in, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MISTRAL_MS_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(builder, "OBJECTS", tmp_path / "build")
    assert builder.build_twin().parent == tmp_path / "build"
