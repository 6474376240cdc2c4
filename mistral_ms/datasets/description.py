"""``dataset.json``: what a dataset holds and how it came about; the last file to be written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from mistral_ms.config import DataConfig, ModelConfig
from mistral_ms.config.base import Frozen, validate
from mistral_ms.datasets.encoding import vocabulary_digest
from mistral_ms.errors import ConfigError, DataError
from mistral_ms.reading import INDEX_BYTES, is_dir, is_file, open_regular, read_json
from mistral_ms.tokenizer import Tokenizer

DESCRIPTION = "dataset.json"
FORMAT = 1
_CHUNK_BYTES = 8 << 20


class Counts(Frozen):
    """What was packed; see :class:`mistral_ms.datasets.packing.PackingCounts`.

    Attributes:
        skipped: bad documents by reason; they are in none of the other counts.
        largest_id: the largest token id; None in datasets of older releases.
    """

    documents: int
    tokens: int
    sequences: int
    predicted: int
    padded: int
    dropped: int
    silent_sequences: int
    skipped: dict[str, int]
    largest_id: int | None = None


class Vocabulary(Frozen):
    """The tokenizer that was used.

    Attributes:
        vocab_size: how many ids it has.
        sha256: of what each id stands for, see
            :func:`mistral_ms.datasets.encoding.vocabulary_digest`.
        source: the file it was read from.
    """

    vocab_size: int
    sha256: str
    source: str

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Vocabulary:
        """Describes a tokenizer."""
        source = next((str(path) for path in tokenizer.files.values()), "")
        return cls(
            vocab_size=tokenizer.vocab_size, sha256=vocabulary_digest(tokenizer), source=source
        )

    def __str__(self) -> str:
        return f"{self.vocab_size} ids, sha256 {self.sha256[:12]} ({self.source})"


class DataFile(Frozen):
    """One file of a dataset.

    Attributes:
        name: its name in the directory.
        size: its bytes.
        sha256: its digest.
        sequences: how many it holds; 0 for the index that MindRecord keeps beside each file, and
            for the counts of tokens.
    """

    name: str
    size: int
    sha256: str
    sequences: int


class DatasetInfo(Frozen):
    """The content of ``dataset.json``."""

    format: int = FORMAT
    config: DataConfig
    vocabulary: Vocabulary
    counts: Counts
    files: tuple[DataFile, ...]

    @property
    def digest(self) -> str:
        """SHA-256 of what the sequences hold: the same texts packed alike, wherever they lie."""
        # the index files beside the sequences are MindRecord's own and not always the same bytes
        # how the input was read shows in the sequences; digests of older datasets stay as they are
        config = self.config.model_dump(mode="json", exclude={"format", "chat_template"})
        content = [config, self.vocabulary.sha256]
        content += [file.sha256 for file in self.files if file.sequences]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_info(directory: Path) -> DatasetInfo:
    """Reads ``dataset.json`` and checks that every file is there with its size.

    Raises:
        DataError: no dataset there, an incomplete or damaged one, or one of another format.
    """
    path = Path(directory) / DESCRIPTION
    try:
        values = read_json(path, DataError, INDEX_BYTES)
    except DataError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise _damaged(path, error, f"must be a {DESCRIPTION}") from error
        raise DataError(
            "incomplete dataset" if is_dir(path.parent) else "no dataset",
            where=directory,
            rule=f"a finished one has a {DESCRIPTION}",
            todo="write it with the data command",
        ) from error
    if values.get("format") != FORMAT:
        found = repr(values.get("format"))
        raise _damaged(path, f"format {found}", f"this release reads format {FORMAT}")
    try:
        info = validate(DatasetInfo, values, DESCRIPTION)
    except ConfigError as error:
        raise _damaged(path, error, "must describe a dataset") from error
    for file in info.files:
        if Path(file.name).name != file.name:
            raise _damaged(path, repr(file.name), "files must lie in the dataset's own directory")
        _check_size(Path(directory) / file.name, file.size)
    names = {file.name for file in info.files}
    for file in info.files:
        if file.sequences and f"{file.name}.db" not in names:
            raise _damaged(path, f"no {file.name}.db", "MindRecord's index is listed, too")
    if sum(file.sequences for file in info.files) != info.counts.sequences:
        found = f"{info.counts.sequences} sequences"
        raise _damaged(path, found, "must be the sum over the files")
    return info


def verify(directory: Path, progress: Callable[[int, int], None] | None = None) -> DatasetInfo:
    """Reads every byte of a dataset and compares the digests.

    Args:
        directory: the dataset.
        progress: called with the bytes read so far and their total.

    Raises:
        DataError: see :func:`read_info`; or a file whose content is not what was written.
    """
    info = read_info(directory)
    total, done = sum(file.size for file in info.files), 0
    for file in info.files:
        path = Path(directory) / file.name
        found = file_digest(path)
        if found != file.sha256:
            rule = f"{DESCRIPTION} says {file.sha256[:12]}"
            raise _damaged(path, f"sha256 {found[:12]}", rule)
        done += file.size
        if progress is not None:
            progress(done, total)
    return info


def check_length(directory: Path, info: DatasetInfo, seq_length: int) -> None:
    """Checks that a dataset has sequences of a run's length.

    Raises:
        ConfigError: of another one.
    """
    if info.config.seq_length != seq_length:
        raise ConfigError(
            "sequences of another length",
            where="training.seq_length",
            value=seq_length,
            rule=f"the dataset {directory} has sequences of {info.config.seq_length} tokens",
            todo="pack it again, or train with its length",
        )


def check_fit(
    directory: Path, info: DatasetInfo, model: ModelConfig, tokenizer: Tokenizer | None = None
) -> None:
    """Checks that a model can be trained on a dataset.

    Args:
        directory: the dataset, for the message.
        info: its description.
        model: the model.
        tokenizer: the model's. Without one the sizes of the vocabularies must be equal; with one,
            the vocabularies must be, and the model may have rows to spare.

    Raises:
        DataError: sequences that are longer than the model allows, or another vocabulary.
    """
    length, longest = info.config.seq_length, model.longest_sequence
    if length > longest:
        raise DataError(
            "sequences too long for the model",
            where=directory,
            value=f"seq_length {length}",
            rule=f"the model's {model.length_rule}",
            todo=f"pack again with --seq-length {longest} or less",
        )
    theirs = None if tokenizer is None else Vocabulary.of(tokenizer)
    size = info.vocabulary.vocab_size
    largest = info.counts.largest_id
    # added tokens beyond the model's rows do no harm while they do not occur
    spare = tokenizer is not None and tokenizer.base_size <= model.vocab_size
    unused = spare and largest is not None and largest < model.vocab_size
    same_size = size == model.vocab_size if theirs is None else size <= model.vocab_size or unused
    if not same_size or (theirs is not None and theirs.sha256 != info.vocabulary.sha256):
        other = f"vocab_size {model.vocab_size}" if theirs is None or not same_size else theirs
        raise DataError(
            "tokenised with another vocabulary",
            where=directory,
            value=info.vocabulary,
            rule=f"the model has {other}",
            todo="pack again with the model's tokenizer",
        )


def file_digest(path: Path) -> str:
    """The SHA-256 of a file.

    Raises:
        DataError: it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with open_regular(path, DataError) as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
    except OSError as error:
        raise DataError("cannot read", where=path, value=error.strerror) from error
    return digest.hexdigest()


def _check_size(path: Path, size: int) -> None:
    if not is_file(path):
        raise _damaged(path, "missing", f"{DESCRIPTION} names it")
    if (found := path.stat().st_size) != size:
        raise _damaged(path, f"{found} bytes", f"{DESCRIPTION} says {size}")


def _damaged(path: Path, value: object, rule: str) -> DataError:
    todo = "copy the dataset again, or write it anew"
    return DataError("damaged dataset", where=path, value=value, rule=rule, todo=todo)
