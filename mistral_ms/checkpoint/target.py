"""Writing a checkpoint directory: all of it or nothing.

Everything goes to a temporary sibling first. Only when each file is on the disk (fsync) is the
directory renamed to its name; on any failure before that the sibling is removed and an existing
target has not been touched. After the rename the new checkpoint stands, whatever happens.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path
from types import TracebackType

from mistral_ms.checkpoint.file_set import FileSet, write_error
from mistral_ms.checkpoint.files import MANIFEST, unknown_entries
from mistral_ms.checkpoint.manifest import encode_manifest
from mistral_ms.errors import CheckpointError


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class TargetDirectory(FileSet):
    """A checkpoint directory in the making; a context manager.

    Leaving the context without an exception puts the directory in its place.

    Args:
        path: where the checkpoint shall be; missing parents are created.
        overwrite: replace an existing checkpoint directory (and nothing else).
        manifest: write ``COMPLETE`` as the last file.
        begun: a temporary sibling that others have begun to fill; None makes one.

    Raises:
        CheckpointError: the target exists and may not be replaced, or its place is not writable.
    """

    def __init__(
        self,
        path: Path,
        *,
        overwrite: bool = False,
        manifest: bool = False,
        begun: Path | None = None,
    ) -> None:
        super().__init__(Path(path), hashed=manifest)
        self._manifest, self._overwrite, self._begun = manifest, overwrite, begun
        check_target(self.path, overwrite)
        self._final = Path(os.path.realpath(self.path))  # a link stays, what it leads to changes
        self._made: list[Path] = []
        self._directory = None

    def __enter__(self) -> TargetDirectory:
        parent = self._final.parent
        if self._begun is not None:
            self._directory = self._begun
            return self
        try:
            for missing in [p for p in (parent, *parent.parents) if not p.exists()][::-1]:
                missing.mkdir()
                self._made.append(missing)
            name = tempfile.mkdtemp(prefix=f".{self._final.name}.partial-", dir=parent)
            self._directory = Path(name)
            mask = os.umask(0)
            os.umask(mask)
            self._directory.chmod(0o777 & ~mask)  # mkdtemp makes private ones
        except OSError as error:
            self._discard()
            raise write_error(parent, error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            self._discard()
            return
        try:
            if self._manifest:
                self.write(MANIFEST, encode_manifest(self.records))
            self._install()
        except OSError as failure:
            self._discard()
            raise write_error(self.path, failure) from failure
        except BaseException:
            self._discard()
            raise

    def _install(self) -> None:
        """Renames the directory into its place; an old one steps aside first and returns on error.

        Two renames leave a moment in which the target has no name. A crash exactly then loses
        nothing: the old one lies beside it as ``.NAME.old-*``, the new one as ``.NAME.partial-*``.

        Raises:
            OSError: nothing was changed.
            CheckpointError: see :func:`check_target`; or the message says what stands where.
        """
        _sync_directory(self.directory)
        check_target(self.path, self._overwrite)  # somebody may have put something there meanwhile
        aside = self._step_aside() if self._final.exists() else None
        try:
            self.directory.rename(self._final)
        except BaseException:
            if aside is not None:
                self._step_back(aside)
            raise
        self._directory = None
        try:
            _sync_directory(self._final.parent)
        except OSError as error:
            raise CheckpointError(
                "written, but perhaps not yet on the disk",
                where=self.path,
                value=error.strerror,
                rule="the new checkpoint is complete and in its place, but a crash of the machine "
                "might still lose its name",
                todo="check the disk",
            ) from error
        finally:
            if aside is not None:
                shutil.rmtree(aside, ignore_errors=True)

    def _step_aside(self) -> Path:
        """Renames the old target to a free name beside it; returns that."""
        prefix = f".{self._final.name}.old-"
        aside = Path(tempfile.mkdtemp(prefix=prefix, dir=self._final.parent))
        try:
            self._final.rename(aside)
        except BaseException:
            with contextlib.suppress(OSError):
                aside.rmdir()
            raise
        return aside

    def _step_back(self, aside: Path) -> None:
        """Gives the old target its name back."""
        try:
            aside.rename(self._final)
        except OSError as error:
            raise CheckpointError(
                "cannot write",
                where=self.path,
                value=error.strerror,
                rule=f"the old checkpoint is whole, but its name is now {aside}",
                todo="rename it back",
            ) from error

    def _discard(self) -> None:
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None
        for parent in reversed(self._made):
            with contextlib.suppress(OSError):
                parent.rmdir()


def check_target(path: Path, overwrite: bool) -> None:
    """Checks that a checkpoint may be written at ``path``.

    Raises:
        CheckpointError: something is there, and ``overwrite`` is off or it is not a directory
            that consists of a checkpoint's files alone.
    """
    if not os.path.lexists(path):
        return
    if not overwrite:
        raise CheckpointError(
            "target exists",
            where=path,
            rule="nothing is overwritten unasked",
            todo="pass --overwrite to replace it",
        )
    if not path.is_dir():
        raise CheckpointError(
            "target is not a directory",
            where=path,
            rule="only a checkpoint directory is ever replaced",
        )
    if unknown := unknown_entries(path):
        raise CheckpointError(
            "target is not a checkpoint",
            where=path,
            value=f"holds {', '.join(unknown[:5])}",
            rule="only a directory with nothing but a checkpoint's files is ever replaced",
            todo="move it away, or choose another place",
        )
