"""From text files to a dataset: read, encode, pack, write, one document at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mistral_ms.config import DataConfig, read_end_tokens
from mistral_ms.config.token_counts import TOKEN_COUNTS, token_counts_text
from mistral_ms.datasets.description import (
    DESCRIPTION,
    Counts,
    DataFile,
    DatasetInfo,
    Vocabulary,
    file_digest,
)
from mistral_ms.datasets.directory import check_target, new_directory, seal
from mistral_ms.datasets.documents import (
    ChatDocument,
    Document,
    Rejects,
    check_inputs,
    read_documents,
)
from mistral_ms.datasets.encoding import DocumentEncoder, TokenRun
from mistral_ms.datasets.mindrecord import SequenceWriter
from mistral_ms.datasets.packing import Packer, PackingCounts
from mistral_ms.errors import DataError
from mistral_ms.tokenizer import Tokenizer, end_token_notes

Progress = Callable[[int, int], None]
_PROGRESS_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class BuildResult:
    """A dataset that was written.

    Attributes:
        info: its description.
        first_errors: the first error of each reason for which documents were skipped.
        notes: what contradicts itself in the files of tokenizer and model, in words.
    """

    info: DatasetInfo
    first_errors: Mapping[str, DataError]
    notes: tuple[str, ...]


def build_dataset(
    inputs: Sequence[Path],
    tokenizer: Tokenizer,
    config: DataConfig,
    output: Path,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> BuildResult:
    """Writes a dataset; the same inputs always give the same bytes.

    Args:
        inputs: txt and jsonl files, see :func:`~mistral_ms.datasets.documents.read_documents`.
        tokenizer: the model's.
        config: how documents become sequences.
        output: the directory; appears when it is whole.
        overwrite: replace a dataset that is there.
        progress: called with the bytes of the inputs that are done and their total.

    Raises:
        DataError: bad input, nothing to learn in it, or a target that cannot be written.
    """
    output = Path(output)
    total = check_inputs(inputs)
    check_target(output, overwrite)
    if config.add_bos is None:
        config = config.model_copy(update={"add_bos": tokenizer.adds_bos})
    reject, packer = Rejects(config.skip_bad), Packer(config)
    ends = _model_ends(tokenizer)
    encoder = DocumentEncoder(tokenizer, config, ends)
    advance = _meter(total, progress)
    with new_directory(output, overwrite) as directory:
        writer = SequenceWriter(directory, config.seq_length)
        largest, occurs = 0, np.zeros(tokenizer.vocab_size, np.int64)
        for path in inputs:
            for document in read_documents(path, config, reject, advance):
                for run in _runs(encoder, document, reject):
                    largest = max(largest, int(run.ids_T.max()))
                    occurs += np.bincount(run.ids_T, minlength=len(occurs))
                    for sequence in packer.add(run):
                        writer.write(sequence)
        for sequence in packer.finish():
            writer.write(sequence)
        _check_something(packer.counts, config, reject)
        skipped = dict(sorted(reject.counts.items()))
        counts = Counts(**asdict(packer.counts), skipped=skipped, largest_id=largest)
        info = DatasetInfo(
            config=config,
            vocabulary=Vocabulary.of(tokenizer),
            counts=counts,
            files=_sealed(directory, {**writer.close(), **_counted(directory, occurs)}),
        )
        path = directory / DESCRIPTION
        text = json.dumps(info.model_dump(), indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")
        seal(path)
    return BuildResult(info, reject.first, tokenizer.notes + end_token_notes(tokenizer, ends))


def _model_ends(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The end tokens of the model in whose directory the tokenizer lies, if it is one."""
    path = next(iter(tokenizer.files.values()), None)
    return () if path is None else read_end_tokens(path.parent)


def _runs(encoder: DocumentEncoder, document: Document, reject: Rejects) -> Iterator[TokenRun]:
    """A document's tokens; none of a conversation that the chat format does not take."""
    if not isinstance(document, ChatDocument):
        yield from encoder.runs(document)
        return
    try:
        runs = list(encoder.runs(document))
    except DataError as error:
        reject(error)
        return
    yield from runs


def _counted(directory: Path, occurs_V: np.ndarray) -> dict[str, int]:
    """Writes how often each id occurs; no sequences."""
    found = {int(token): int(occurs_V[token]) for token in np.flatnonzero(occurs_V)}
    text = token_counts_text(found, len(occurs_V))
    (directory / TOKEN_COUNTS).write_text(text, encoding="utf-8")
    return {TOKEN_COUNTS: 0}


def _sealed(directory: Path, files: Mapping[str, int]) -> tuple[DataFile, ...]:
    described = []
    for name, sequences in files.items():
        path = directory / name
        seal(path)
        size, digest = path.stat().st_size, file_digest(path)
        described.append(DataFile(name=name, size=size, sha256=digest, sequences=sequences))
    return tuple(described)


def _check_something(counts: PackingCounts, config: DataConfig, reject: Rejects) -> None:
    if counts.sequences:
        return
    found = f"{counts.documents} documents, {counts.tokens} tokens"
    if skipped := sum(reject.counts.values()):
        reasons = ", ".join(f"{reason} {n}" for reason, n in sorted(reject.counts.items()))
        found += f", {skipped} skipped ({reasons})"
    rule = "at least one token must be predicted"
    if counts.dropped:
        rule = f"a sequence that is not dropped takes {config.seq_length + 1} tokens"
    raise DataError("nothing to learn", value=found, rule=rule)


def _meter(total: int, progress: Progress | None) -> Callable[[int], None]:
    """Counts bytes, and speaks now and then: there may be millions of lines."""
    done = shown = 0

    def advance(nbytes: int) -> None:
        nonlocal done, shown
        done += nbytes
        if progress is not None and (done - shown >= _PROGRESS_BYTES or done == total):
            shown = done
            progress(done, total)

    return advance
