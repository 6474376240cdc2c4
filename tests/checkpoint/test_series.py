"""Numbered checkpoints: which one is the newest whole one, and what is kept."""

import shutil

import numpy as np
import pytest
from support.series import TENSORS, contents, write_checkpoint

from mistral_ms.checkpoint import CheckpointSeries
from mistral_ms.errors import CheckpointError


@pytest.fixture
def series(tmp_path):
    series = CheckpointSeries(tmp_path / "checkpoints", save_total_limit=None)
    for step in (5, 10, 15):
        series.save(step, lambda path, step=step: write_checkpoint(path, step))
    return series


def flip(path):
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


DAMAGE = {
    "a flipped byte in a shard": (
        lambda p: flip(p / "model-00001-of-00001.safetensors"),
        r"damaged: the bytes of model-00001-of-00001\.safetensors are not those",
    ),
    "a flipped byte of the optimizer": (
        lambda p: flip(p / "optimizer-00001-of-00001.safetensors"),
        r"damaged: the bytes of optimizer-00001-of-00001",
    ),
    "a truncated shard": (
        lambda p: cut(p / "model-00001-of-00001.safetensors"),
        r"truncated file: .*model-00001-of-00001\.safetensors: \d+ bytes: COMPLETE says \d+",
    ),
    "a missing shard": (
        lambda p: (p / "optimizer-00001-of-00001.safetensors").unlink(),
        r"missing file: .*optimizer-00001-of-00001",
    ),
    "another state": (lambda p: flip(p / "state.json"), r"damaged: the bytes of state\.json"),
    "no manifest": (lambda p: (p / "COMPLETE").unlink(), r"incomplete checkpoint: .*COMPLETE"),
    "an empty manifest": (lambda p: (p / "COMPLETE").write_bytes(b""), r"not JSON: .*COMPLETE"),
    "a cut manifest": (lambda p: cut(p / "COMPLETE"), r"not JSON: .*COMPLETE"),
    "another manifest": (lambda p: (p / "COMPLETE").write_text("{}"), r"damaged manifest"),
    "a manifest of nothing": (
        lambda p: (p / "COMPLETE").write_text('{"format": 1, "files": {}}'), r"extra shard",
    ),
    "nothing in it": (
        lambda p: (shutil.rmtree(p), p.mkdir()), r"incomplete checkpoint: .*step-00000015",
    ),
}  # fmt: skip


class TestNewest:
    def test_is_the_highest_number(self, series):
        found = series.newest()
        assert (found.path, found.step, found.passed_over) == (series.path(15), 15, ())

    def test_numbers_are_numbers(self, series):
        """Nine digits come after eight, whatever their order as text."""
        series.save(100_000_000, lambda path: write_checkpoint(path, 1))
        assert series.steps() == (5, 10, 15, 100_000_000)
        assert series.newest().step == 100_000_000

    @pytest.mark.parametrize("kind", DAMAGE)
    def test_a_damaged_one_is_passed_over_and_says_why(self, series, kind):
        damage, reason = DAMAGE[kind]
        damage(series.path(15))
        found = series.newest()
        assert found.step == 10
        [other] = found.passed_over
        assert other.path == series.path(15)
        assert "\n" not in other.reason
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(other.reason)

    def test_all_damaged_names_each(self, series):
        for step in series.steps():
            flip(series.path(step) / "state.json")
        with pytest.raises(CheckpointError, match=r"no whole checkpoint: .*15: .*10: .*5: "):
            series.newest()

    def test_none_at_all(self, tmp_path):
        assert CheckpointSeries(tmp_path / "nothing").newest() is None
        (tmp_path / "empty").mkdir()
        assert CheckpointSeries(tmp_path / "empty").newest() is None

    def test_what_is_not_ours_is_not_looked_at(self, series, tmp_path):
        (series.directory / "step-00000099").write_text("a file")
        (series.directory / "step-77").mkdir()
        (series.directory / "notes").mkdir()
        (series.directory / "step-00000098").symlink_to(series.path(5))
        assert series.steps() == (5, 10, 15)
        assert series.newest().step == 15
        assert series.clean() == ()
        assert (series.directory / "step-77").exists()

    def test_every_byte_is_read_and_progress_tells(self, series):
        calls = []
        series.newest(lambda done, total: calls.append((done, total)))
        assert calls[-1][0] == calls[-1][1] > 1000


class TestKeepLast:
    def save(self, series, *steps):
        for step in steps:
            series.save(step, lambda path, step=step: write_checkpoint(path, step))

    def test_the_oldest_go(self, tmp_path):
        series = CheckpointSeries(tmp_path, save_total_limit=2)
        self.save(series, 1, 2, 3, 4)
        assert series.steps() == (3, 4)
        assert {path.name for path in tmp_path.iterdir()} == {"step-00000003", "step-00000004"}

    def test_damaged_ones_do_not_count(self, tmp_path):
        series = CheckpointSeries(tmp_path, save_total_limit=2)
        self.save(series, 1, 2)
        (series.path(2) / "COMPLETE").unlink()
        self.save(series, 3)
        assert series.steps() == (1, 2, 3), "1 and 3 are the two whole ones"

    def test_nor_those_whose_bytes_have_changed(self, tmp_path):
        """Of the same sizes: only reading them tells, and that was done by newest()."""
        series = CheckpointSeries(tmp_path, save_total_limit=2)
        self.save(series, 1, 2)
        flip(series.path(2) / "model-00001-of-00001.safetensors")
        assert series.newest().step == 1
        self.save(series, 3)
        assert series.steps() == (1, 2, 3)
        self.save(series, 2)  # the training comes by again
        self.save(series, 4)
        assert series.steps() == (3, 4)

    def test_somebodys_own_files_are_not_removed(self, tmp_path):
        series = CheckpointSeries(tmp_path, save_total_limit=1)
        self.save(series, 1)
        (series.path(1) / "notes.txt").write_text("mine")
        self.save(series, 2, 3)
        assert series.steps() == (1, 3)
        assert (series.path(1) / "notes.txt").read_text() == "mine"

    def test_what_a_link_leads_to_is_not_replaced(self, series, tmp_path):
        write_checkpoint(tmp_path / "elsewhere", 1)
        series.path(20).symlink_to(tmp_path / "elsewhere")
        with pytest.raises(CheckpointError, match=r"cannot write: .*20: a link to .*elsewhere"):
            series.save(20, lambda path: write_checkpoint(path, 2))
        assert contents(tmp_path / "elsewhere") == TENSORS(1)

    def test_what_comes_later_stays(self, tmp_path):
        """A training that went back to step 1 must not lose what it may still need."""
        series = CheckpointSeries(tmp_path, save_total_limit=1)
        self.save(CheckpointSeries(tmp_path), 1, 2, 9)
        self.save(series, 2)
        assert series.steps() == (2, 9)

    def test_a_step_can_be_saved_again(self, series):
        series.save(10, lambda path: write_checkpoint(path, 77))
        assert contents(series.path(10)) == TENSORS(77)
        assert series.steps() == (5, 10, 15)

    def test_a_failed_save_changes_nothing(self, series):
        def fails(path):
            raise CheckpointError("disk full", where=path)

        before = {step: contents(series.path(step)) for step in series.steps()}
        with pytest.raises(CheckpointError, match="disk full"):
            series.save(20, fails)
        assert {step: contents(series.path(step)) for step in series.steps()} == before

    @pytest.mark.parametrize("keep", [0, -1])
    def test_at_least_one_is_kept(self, tmp_path, keep):
        with pytest.raises(ValueError, match="save_total_limit must be at least 1"):
            CheckpointSeries(tmp_path, keep)


class TestClean:
    def leftover(self, series, name, step=None):
        path = series.directory / name
        if step is None:
            path.mkdir()
            (path / "config.json").write_text("{")
        else:
            write_checkpoint(path, step)
        return path

    def test_removes_what_is_unfinished(self, series):
        names = [".step-00000020.partial-ab", ".step-00000005.old-x", ".step-00000001.pruned-y"]
        paths = [self.leftover(series, name) for name in names]
        assert set(series.clean()) == set(paths)
        assert sorted(path.name for path in series.directory.iterdir()) == [
            "step-00000005", "step-00000010", "step-00000015",
        ]  # fmt: skip

    def test_a_whole_one_gets_its_name(self, series):
        """Killed after the last byte and before the rename."""
        self.leftover(series, ".step-00000020.partial-ab", 20)
        series.clean()
        assert series.newest().step == 20
        assert contents(series.path(20)) == TENSORS(20)

    def test_the_new_one_wins_over_the_one_it_replaces(self, series):
        """Killed between the two renames of a replacement."""
        series.path(15).rename(series.directory / ".step-00000015.old-x")
        self.leftover(series, ".step-00000015.partial-ab", 99)
        series.clean()
        assert contents(series.path(15)) == TENSORS(99)
        assert len(list(series.directory.iterdir())) == 3

    def test_what_was_being_deleted_does_not_come_back(self, series):
        self.leftover(series, ".step-00000001.pruned-y", 1)
        series.clean()
        assert series.steps() == (5, 10, 15)


def test_arrays_are_read_as_they_were_written(series):
    got = contents(series.path(10))
    want = TENSORS(10)
    assert got == want
    assert any(name.startswith("exp_avg") for name in want)
    assert np.frombuffer(next(iter(want.values())), np.uint8).any()
