"""The manifest ``COMPLETE``: the last file of our checkpoints, with size and digest of the rest.

A checkpoint without it was not finished; nothing is ever loaded or resumed from that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from mistral_ms.checkpoint.files import MANIFEST, inside, read_json
from mistral_ms.errors import CheckpointError

FORMAT = 1
_CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 of one file."""

    size: int
    sha256: str


def encode_manifest(files: Mapping[str, FileRecord]) -> bytes:
    """The content of the manifest for ``files`` (name -> record)."""
    records = {name: asdict(record) for name, record in sorted(files.items())}
    return (json.dumps({"format": FORMAT, "files": records}, indent=2) + "\n").encode()


def read_manifest(directory: Path, follow_links: bool = False) -> dict[str, FileRecord]:
    """Reads the manifest and checks that every file is there with its size.

    Args:
        directory: the checkpoint.
        follow_links: see :func:`~mistral_ms.checkpoint.files.inside`.

    Raises:
        CheckpointError: no manifest (the checkpoint is incomplete), a damaged one, or a file that
            is missing or of another size.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise CheckpointError(
            "incomplete checkpoint",
            where=directory,
            rule=f"a finished one has a {MANIFEST} manifest",
            todo="write or copy it again",
        )
    data = read_json(path)
    try:
        version = data["format"]
        records = {
            str(name): FileRecord(int(record["size"]), str(record["sha256"]))
            for name, record in data["files"].items()
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            "damaged manifest", where=path, value=repr(error), rule="must list sizes and digests"
        ) from error
    if version != FORMAT:
        raise CheckpointError(
            "unknown format version",
            where=path,
            value=version,
            rule=f"this release reads format {FORMAT}",
        )
    for name, record in records.items():
        size = inside(directory, name, path, follow_links).stat().st_size
        if size != record.size:
            raise CheckpointError(
                "wrong size" if size > record.size else "truncated file",
                where=directory / name,
                value=f"{size} bytes",
                rule=f"{MANIFEST} says {record.size}",
                todo="copy the checkpoint again",
            )
    return records


def verify_digests(
    directory: Path,
    records: Mapping[str, FileRecord],
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Reads every file of a checkpoint and compares its digest with the manifest's.

    Args:
        directory: the checkpoint.
        records: its manifest.
        progress: called with the bytes read so far and their total.

    Returns:
        The names of the files that differ; empty when all is well.
    """
    total, done = sum(record.size for record in records.values()), 0
    different = []
    for name, record in records.items():
        digest = hashlib.sha256()
        with (directory / name).open("rb") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                done += len(chunk)
                if progress is not None:
                    progress(done, total)
        if digest.hexdigest() != record.sha256:
            different.append(name)
    return different
