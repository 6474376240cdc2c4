"""The checkpoints of one training: one directory a step, the newest whole one, the oldest go.

Every checkpoint is written under a temporary name beside its place and renamed when all of it is
on the disk. A writer that is killed leaves such a name behind, and nothing else:

* ``.step-N.partial-*``: a checkpoint in the making. With a ``COMPLETE`` in it, it only lacked its
  name; :meth:`CheckpointSeries.clean` gives it that.
* ``.step-N.old-*``: one that was being replaced; it gets its name back if that is free.
* ``.step-N.pruned-*``: one that was being deleted.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mistral_ms.checkpoint.files import MANIFEST, unknown_entries
from mistral_ms.checkpoint.manifest import read_manifest, verify_digests
from mistral_ms.checkpoint.source import open_checkpoint
from mistral_ms.errors import BusyError, CheckpointError
from mistral_ms.staging import Lock

_NAME = re.compile(r"step-(\d{8,})")
# in the order of preference for the free name of their step
_LEFTOVERS = (".partial-", ".old-", ".pruned-")


@dataclass(frozen=True)
class PassedOver:
    """A checkpoint that is not to be used.

    Attributes:
        path: its directory.
        reason: what is wrong with it, in one line.
    """

    path: Path
    reason: str


@dataclass(frozen=True)
class Found:
    """The checkpoint to go on with.

    Attributes:
        path: its directory.
        step: its number.
        passed_over: newer ones that are not whole, newest first.
    """

    path: Path
    step: int
    passed_over: tuple[PassedOver, ...]


class CheckpointSeries:
    """Numbered checkpoints in a directory that one process at a time writes to.

    Args:
        directory: made with the first checkpoint.
        save_total_limit: how many whole ones are kept; None keeps all.
    """

    def __init__(self, directory: Path, save_total_limit: int | None = None) -> None:
        if save_total_limit is not None and save_total_limit < 1:
            raise ValueError(f"save_total_limit must be at least 1, not {save_total_limit}")
        self.directory, self.save_total_limit = Path(directory), save_total_limit
        self._damaged: set[Path] = set()  # found out by newest()

    def path(self, step: int) -> Path:
        """Where the checkpoint of ``step`` is, or would be."""
        return self.directory / f"step-{step:08d}"

    def steps(self) -> tuple[int, ...]:
        """Steps of which there is a directory, whole or not, ascending."""
        if not self.directory.is_dir():
            return ()
        names = ((_NAME.fullmatch(path.name), path) for path in self.directory.iterdir())
        numbers = (int(match[1]) for match, path in names if match and _own_directory(path))
        return tuple(sorted(n for n in numbers if _own_directory(self.path(n))))

    def newest(self, progress: Callable[[int, int], None] | None = None) -> Found | None:
        """The newest checkpoint whose every byte is what was written.

        Args:
            progress: called with the bytes verified and their total, per checkpoint.

        Returns:
            It, and the newer ones that are damaged; None when there is none at all.

        Raises:
            CheckpointError: there are some, and none is whole.
        """
        passed_over: list[PassedOver] = []
        for step in reversed(self.steps()):
            path = self.path(step)
            if (reason := _defect(path, progress)) is None:
                return Found(path, step, tuple(passed_over))
            self._damaged.add(path)
            passed_over.append(PassedOver(path, reason))
        if passed_over:
            raise CheckpointError(
                "no whole checkpoint",
                where=self.directory,
                value="; ".join(f"{each.path.name}: {each.reason}" for each in passed_over),
                rule="a training goes on from a checkpoint that is complete and undamaged",
                todo="copy one from a backup, or start the training anew",
            )
        return None

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Writes the checkpoint of ``step``, then removes the oldest beyond ``save_total_limit``.

        Args:
            step: its number. One that is there is replaced: a training that had to go back to
                an older checkpoint comes by again.
            write: given the path; must write by
                :class:`~mistral_ms.checkpoint.target.TargetDirectory`, so all of it or nothing.

        Returns:
            The path.

        Raises:
            CheckpointError: it could not be written; the older ones are still there. Or it was,
                and an old one could not be removed.
        """
        path = self.path(step)
        if path.is_symlink():
            raise CheckpointError(
                "cannot write",
                where=path,
                value=f"a link to {path.resolve()}",
                rule="what a link leads to is not replaced",
                todo="remove the link",
            )
        write(path)
        self._damaged.discard(path)
        if self.save_total_limit is not None:
            older = [each for each in self.steps() if each < step and self._counts(each)]
            for each in older[: max(0, len(older) + 1 - self.save_total_limit)]:
                self._prune(self.path(each))
        return path

    def clean(self) -> tuple[Path, ...]:
        """Tidies up after a writer that was killed.

        A whole checkpoint that had no name yet, or no longer, gets its name; everything else that
        the writer left is removed. Nothing but such leftovers is touched.

        Returns:
            The paths that were there, in the order in which they were dealt with.
        """
        dealt_with = []
        for step, path in self._leftovers():
            place = self.path(step)
            pruned = ".pruned-" in path.name
            if not pruned and not place.exists() and _is_complete(path):
                path.rename(place)
            else:
                shutil.rmtree(path, ignore_errors=True)
            dealt_with.append(path)
        for lock in sorted(self.directory.glob(".step-*.lock")):
            with contextlib.suppress(BusyError), Lock(lock, self.directory):
                pass  # whoever had it is gone, and so is the file now
        return tuple(dealt_with)

    def _counts(self, step: int) -> bool:
        """Whether a checkpoint is among those of which some are kept and the rest removed.

        A damaged one must not push a good one out; and one that somebody put files of his own
        into is not ours to remove.
        """
        path = self.path(step)
        return path not in self._damaged and _is_complete(path) and not unknown_entries(path)

    def _leftovers(self) -> Iterator[tuple[int, Path]]:
        if not self.directory.is_dir():
            return
        entries = sorted(path for path in self.directory.iterdir() if _own_directory(path))
        for kind in _LEFTOVERS:
            for path in entries:
                name, separator, _ = path.name.removeprefix(".").partition(kind)
                match = _NAME.fullmatch(name)
                if path.name.startswith(".") and separator and match:
                    yield int(match[1]), path

    def _prune(self, path: Path) -> None:
        """Takes the name away first: what is half deleted must not look like a checkpoint."""
        try:
            aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.pruned-", dir=path.parent))
            path.rename(aside)
            shutil.rmtree(aside)
        except OSError as error:
            raise CheckpointError(
                "cannot remove an old checkpoint",
                where=path,
                value=error.strerror,
                rule="the new one was written",
                todo="check the directory's permissions",
            ) from error


def _own_directory(path: Path) -> bool:
    """Not a link: what it leads to is somebody else's."""
    return path.is_dir() and not path.is_symlink()


def _is_complete(path: Path) -> bool:
    if not (path / MANIFEST).exists():
        return False
    with contextlib.suppress(CheckpointError):
        read_manifest(path)
        return True
    return False


def _defect(path: Path, progress: Callable[[int, int], None] | None) -> str | None:
    """What is wrong with a checkpoint; None when nothing is."""
    try:
        different = verify_digests(path, read_manifest(path), progress)
        open_checkpoint(path, "mistral_ms", verify=False, adapters=True).close()
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {error.filename}: {error.strerror}"
    if different:
        return f"damaged: the bytes of {', '.join(different)} are not those that were written"
    return None
