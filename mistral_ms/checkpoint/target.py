"""Writing a checkpoint directory: all of it or nothing.

Everything goes to a temporary sibling first (:mod:`mistral_ms.staging`). Only when each file is on
the disk (fsync) is the directory renamed to its name; on any failure before that the sibling is
removed and an existing target has not been touched. After the rename the new checkpoint stands,
whatever happens.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

from mistral_ms import staging
from mistral_ms.checkpoint.file_set import FileSet, write_error
from mistral_ms.checkpoint.files import MANIFEST, unknown_entries
from mistral_ms.checkpoint.manifest import encode_manifest
from mistral_ms.errors import CheckpointError
from mistral_ms.staging import StagedDirectory


class TargetDirectory(FileSet):
    """A checkpoint directory in the making; a context manager.

    Leaving the context without an exception puts the directory in its place.

    Args:
        path: where the checkpoint shall be; missing parents are created.
        overwrite: replace an existing checkpoint directory (and nothing else).
        manifest: write ``COMPLETE`` as the last file.

    Raises:
        CheckpointError: the target exists and may not be replaced, or its place is not writable.
        BusyError: another process is writing to the same target.
    """

    def __init__(self, path: Path, *, overwrite: bool = False, manifest: bool = False) -> None:
        super().__init__(Path(path), hashed=manifest)
        self._manifest, self._overwrite = manifest, overwrite
        check_target(self.path, overwrite)
        self._staged = StagedDirectory(self.path)  # a link stays, what it leads to changes
        self._directory = None

    def open(self) -> TargetDirectory:
        """Makes the directory in the making, if it is not there yet.

        Raises:
            CheckpointError: its place is not writable.
            BusyError: see the class.
        """
        if self._directory is None:
            try:
                self._directory = self._staged.open()
                check_target(self.path, self._overwrite)  # what a killed writer left may be back
            except OSError as error:
                raise write_error(self._staged.final.parent, error) from error
            except BaseException:
                self.discard()
                raise
        return self

    @property
    def token(self) -> int:
        """The number by which others find the directory in the making (``staged_path``)."""
        return self._staged.token

    def discard(self) -> None:
        """Removes everything that was written; what is in its place stays."""
        self._directory = None
        self._staged.close()

    def __enter__(self) -> TargetDirectory:
        return self.open()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                if self._manifest:
                    self.write(MANIFEST, encode_manifest(self.records))
                self._install()
        finally:
            self.discard()

    def _install(self) -> None:
        """Puts the directory in its place.

        Raises:
            CheckpointError: see :func:`check_target`; or the message says what stands where.
        """
        staged = self._staged
        check_target(self.path, self._overwrite)  # somebody may have put something there meanwhile
        try:
            staged.install()
        except OSError as error:
            staged.close()
            if (aside := staged.stranded) is None:
                raise write_error(self.path, error) from error
            raise CheckpointError(
                "cannot write",
                where=self.path,
                value=error.strerror,
                rule=f"the old checkpoint is whole, but its name is now {aside}",
                todo="rename it back",
            ) from error
        try:
            staging.sync_directory(staged.final.parent)
        except OSError as error:
            raise CheckpointError(
                "written, but perhaps not yet on the disk",
                where=self.path,
                value=error.strerror,
                rule="the new checkpoint is complete and in its place, but a crash of the machine "
                "might still lose its name",
                todo="check the disk",
            ) from error


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
