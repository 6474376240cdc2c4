"""Pairs of answers to one prompt, of which the first is preferred.

Each line of a jsonl file is an object with ``prompt``, ``chosen`` and ``rejected``: three texts, or
three lists of messages (and perhaps ``tools``), as TRL has them. Lists without ``prompt``, or with
null, are whole conversations, and what both begin with is the prompt. Further keys are not looked
at. Everything is held in memory: 24 bytes for each of the S places of a pair.
"""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mistral_ms.config import IGNORE_INDEX, ModelConfig, PackingConfig, read_end_tokens
from mistral_ms.config.data import DataConfig
from mistral_ms.datasets.batches import Batch, SequenceOrder
from mistral_ms.datasets.documents import (
    ChatDocument,
    Rejects,
    bad_document,
    check_unicode,
    read_objects,
)
from mistral_ms.datasets.encoding import DocumentEncoder, TokenRun
from mistral_ms.datasets.shapes import ShapeError, conversation, kind
from mistral_ms.errors import DataError
from mistral_ms.reading import open_regular
from mistral_ms.tokenizer import Tokenizer

ANSWERS = ("chosen", "rejected")
_ARRAYS = ("ids", "labels", "positions", "reference")


class PreferenceSequences:
    """Pairs in memory, in the order of :class:`~mistral_ms.datasets.batches.SequenceOrder`.

    A batch of B pairs has 2 B rows: of each pair the chosen answer, then the rejected one, each
    after the prompt. Only tokens of answers are predicted.

    Args:
        ids_P2S: int32 tokens, padded on the right.
        labels_P2S: int32.
        positions_P2S: int32, -1 for padding.
        batch_size: B.
        seed: of the shuffling.

    Attributes:
        reference_P2: float32, log-probabilities of both answers under the model that the training
            is held to; None until they are known.
    """

    segmented = False

    def __init__(
        self,
        ids_P2S: np.ndarray,
        labels_P2S: np.ndarray,
        positions_P2S: np.ndarray,
        batch_size: int,
        seed: int,
    ) -> None:
        self._ids, self._labels, self._positions = ids_P2S, labels_P2S, positions_P2S
        self.reference_P2: np.ndarray | None = None
        self._order = SequenceOrder(len(ids_P2S), batch_size, seed)

    @property
    def sequences(self) -> int:
        """Pairs of one epoch."""
        return len(self._ids)

    @property
    def seq_length(self) -> int:
        """S."""
        return int(self._ids.shape[-1])

    @property
    def digest(self) -> str:
        """SHA-256 of what the pairs hold, and of their log-probabilities once they are known."""
        found = hashlib.sha256()
        reference = () if self.reference_P2 is None else (self.reference_P2,)
        for array in (self._ids, self._labels, self._positions, *reference):
            found.update(str(array.shape).encode() + array.tobytes())
        return found.hexdigest()

    def check_model(self, model: ModelConfig) -> None:
        """Checks that a model has a row for every id.

        Raises:
            DataError: it has not.
        """
        if (largest := int(self._ids.max())) >= model.vocab_size:
            raise DataError(
                "tokenised with another vocabulary",
                value=f"token {largest}",
                rule=f"the model has vocab_size {model.vocab_size}",
                todo="name the model's tokenizer",
            )

    def batch(self, step: int) -> Batch:
        """The pairs of update ``step``, the first being 0."""
        return self.read(self._order.samples(step))

    def read(self, samples_B: np.ndarray) -> Batch:
        """The pairs with these numbers; each number stands for two rows."""
        length, reference = self.seq_length, self.reference_P2
        positions = self._positions[samples_B].reshape(-1, length)
        return Batch(
            ids_BS=self._ids[samples_B].reshape(-1, length),
            labels_BS=self._labels[samples_B].reshape(-1, length),
            positions_BS=positions,
            segments_BS=np.minimum(positions, 0),
            samples_B=np.repeat(samples_B, 2),
            reference_B=None if reference is None else reference[samples_B].reshape(-1),
        )

    def save(self, path: Path) -> None:
        """Writes tokens and log-probabilities into one file.

        Raises:
            DataError: it cannot be written.
        """
        assert self.reference_P2 is not None
        values = self._ids, self._labels, self._positions, self.reference_P2
        fresh = path.with_name(f".{path.stem}.new.npz")
        try:
            np.savez(fresh, **dict(zip(_ARRAYS, values, strict=True)))
            fresh.replace(path)
        except OSError as error:
            raise DataError("cannot write", where=path, value=error.strerror) from error

    @classmethod
    def load(cls, path: Path, batch_size: int, seed: int) -> PreferenceSequences:
        """Reads what :meth:`save` wrote.

        Args:
            path: the file.
            batch_size: B.
            seed: of the shuffling.

        Raises:
            DataError: there is no such file, or it holds something else.
        """
        try:
            with (
                open_regular(path, DataError) as opened,
                np.load(opened, allow_pickle=False) as file,
            ):
                arrays = {name: file[name] for name in _ARRAYS}
        # NumPy has no error of its own: an empty file, a file of another kind, a broken zip
        except (
            OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, MemoryError,
            SyntaxError, NotImplementedError, RuntimeError, zipfile.BadZipFile, zlib.error,
        ) as error:  # fmt: skip
            raise _damaged(path, str(error)) from error
        _check_arrays(path, arrays)
        ids, labels, positions, reference = (arrays[name] for name in _ARRAYS)
        sequences = cls(ids, labels, positions, batch_size, seed)
        sequences.reference_P2 = reference
        return sequences


def read_preferences(
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    packing: PackingConfig,
    *,
    seq_length: int,
    batch_size: int,
    seed: int,
) -> tuple[PreferenceSequences, Mapping[str, DataError], int]:
    """The pairs of some jsonl files.

    Texts are encoded together with their prompt, which reaches to the first token that it does not
    have when it is encoded alone. Conversations are formatted as the model's are; of those only
    messages that follow the prompt are learnt.

    Args:
        paths: the files.
        tokenizer: the model's.
        packing: ``add_bos``, ``add_eos``, ``chat_template`` and ``skip_bad`` are looked at.
        seq_length: S; longer rows are refused.
        batch_size: pairs of a batch.
        seed: of the shuffling.

    Returns:
        The pairs, the first error of each kind that was skipped, and how many lines were.

    Raises:
        DataError: a line that is no pair, with its file, its number and the rule; no pair at all.
    """
    config = DataConfig(seq_length=seq_length, **packing.model_dump())
    file = next(iter(tokenizer.files.values()), None)
    ends = () if file is None else read_end_tokens(file.parent)
    encoder = _PairEncoder(tokenizer, config, ends)
    reject = Rejects(packing.skip_bad)
    rows: list[tuple[TokenRun, ...]] = []
    for path in paths:
        for where, record in read_objects(path, reject):
            try:
                rows.append(encoder.pair(record, where))
            except DataError as error:
                reject(error)
    skipped = sum(reject.counts.values())
    if not rows:
        raise DataError(
            "nothing to learn", where=", ".join(map(str, paths)), value=f"{skipped} lines skipped",
            rule="at least one pair of answers",
        )  # fmt: skip
    arrays = _filled(rows, seq_length)
    return PreferenceSequences(*arrays, batch_size, seed), reject.first, skipped


class _PairEncoder:
    """Encodes the two rows of a line.

    Args:
        tokenizer: the model's.
        config: see :func:`read_preferences`.
        ends: tokens that end an answer, beside the tokenizer's EOS.
    """

    def __init__(self, tokenizer: Tokenizer, config: DataConfig, ends: Sequence[int]) -> None:
        self._tokenizer, self._config = tokenizer, config
        self._bos = tokenizer.adds_bos if config.add_bos is None else config.add_bos
        self._chats = DocumentEncoder(tokenizer, config, ends)

    def pair(self, record: Mapping[str, Any], where: str) -> tuple[TokenRun, ...]:
        """The row of the chosen answer and that of the rejected one.

        Raises:
            DataError: a rule that the line breaks.
        """
        if record.get("prompt", ()) is None and all(
            isinstance(record.get(name), list) for name in ANSWERS
        ):
            record = {key: value for key, value in record.items() if key != "prompt"}
        missing = [name for name in ANSWERS if name not in record]
        if "prompt" not in record and any(isinstance(record.get(n), str) for n in ANSWERS):
            missing.append("prompt")
        texts = all(isinstance(record.get(name), str) for name in ("prompt", *ANSWERS))
        lists = all(isinstance(record.get(name, []), list) for name in ("prompt", *ANSWERS))
        if missing or not (texts or lists):
            found = ", ".join(
                f"{name} is {kind(record[name]) if name in record else 'missing'}"
                for name in ("prompt", *ANSWERS)
            )
            rule = "prompt, chosen and rejected are three texts, or three lists of messages"
            raise bad_document("missing field" if missing else "wrong type", where, found, rule)
        if record["chosen"] == record["rejected"]:
            raise bad_document(
                "no preference", where, "chosen equals rejected", "two answers must differ"
            )
        rows = self._texts(record, where) if texts else self._conversations(record, where)
        for name, row in zip(ANSWERS, rows, strict=True):
            inputs, longest = len(row.ids_T) - 1, self._config.seq_length
            if inputs > longest:
                rule = f"at most training.seq_length, {longest} tokens and the last one"
                raise bad_document("row too long", where, f"{name}: {len(row.ids_T)} tokens", rule)
            if not row.counted_T[1:].any():
                rule = "an answer must have a token that its prompt has not"
                raise bad_document("empty answer", where, name, rule)
        return rows

    def _texts(self, record: Mapping[str, Any], where: str) -> tuple[TokenRun, ...]:
        for name in ("prompt", *ANSWERS):
            check_unicode(record[name], where)
        prompt = self._tokenizer.encode(record["prompt"], bos=self._bos)
        rows = []
        for name in ANSWERS:
            if not record[name]:
                raise bad_document(
                    "empty answer", where, name, "an answer must have at least one character"
                )
            ids = self._tokenizer.encode(record["prompt"] + record[name], bos=self._bos)
            pairs = zip(prompt, ids, strict=False)
            same = next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(prompt), len(ids)))
            if self._config.add_eos:
                ids = [*ids, self._tokenizer.eos_ids[0]]
            counted = np.arange(len(ids)) >= same
            rows.append(TokenRun(np.array(ids, np.int32), counted, True))
        return tuple(rows)

    def _conversations(self, record: Mapping[str, Any], where: str) -> tuple[TokenRun, ...]:
        chosen, rejected = (record[name] for name in ANSWERS)
        prompt = record.get("prompt")
        if prompt is None:
            both = enumerate(zip(chosen, rejected, strict=False))
            shared = next((n for n, (a, b) in both if a != b), min(len(chosen), len(rejected)))
            prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        rows = []
        for name, answer in zip(ANSWERS, (chosen, rejected), strict=True):
            if not answer:
                raise bad_document(
                    "empty answer", where, name, "an answer must have at least one message"
                )
            whole = {"messages": [*prompt, *answer], "tools": record.get("tools")}
            try:
                chat = conversation(whole, "messages")
            except ShapeError as error:
                found = f"{name}, after the prompt: {error.value}"
                raise bad_document(error.what, where, found, error.rule) from error
            messages = [
                {**each, "weight": 0} if n < len(prompt) and each["role"] == "assistant" else each
                for n, each in enumerate(chat.messages)
            ]
            [row] = self._chats.runs(ChatDocument(messages, chat.tools, f"{where}, {name}"))
            rows.append(row)
        return tuple(rows)


def _filled(
    rows: Sequence[Sequence[TokenRun]], seq_length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, labels and positions, int32 [P, 2, S]."""
    shape = (len(rows), 2, seq_length)
    ids, labels = np.zeros(shape, np.int32), np.full(shape, IGNORE_INDEX, np.int32)
    positions = np.full(shape, -1, np.int32)
    for pair, both in enumerate(rows):
        for number, run in enumerate(both):
            inputs, following = run.ids_T[:-1], run.ids_T[1:]
            ids[pair, number, : len(inputs)] = inputs
            positions[pair, number, : len(inputs)] = np.arange(len(inputs))
            counted = np.where(run.counted_T[1:], following, IGNORE_INDEX)
            labels[pair, number, : len(inputs)] = counted
    return ids, labels, positions


def _check_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Checks that arrays are those that are written, one row of all for each pair.

    Raises:
        DataError: names the file, the array and the rule.
    """
    shape = arrays["ids"].shape
    if len(shape) != 3 or shape[1] != 2 or 0 in shape:
        raise _damaged(path, f"ids {list(shape)}", "ids are [pairs, 2, S]")
    for name, array in arrays.items():
        wanted, dtype = (shape[:2], "float32") if name == "reference" else (shape, "int32")
        if array.shape != wanted or array.dtype != dtype:
            found = f"{name} {array.dtype} {list(array.shape)}"
            raise _damaged(path, found, f"{name} must be {dtype} {list(wanted)}, as ids are")
    if not np.isfinite(arrays["reference"]).all():
        pair = int(np.flatnonzero(~np.isfinite(arrays["reference"]).all(1))[0])
        found = f"reference of pair {pair}: {arrays['reference'][pair].tolist()}"
        raise _damaged(path, found, "log-probabilities must be finite")
    if arrays["ids"].min() < 0:
        raise _damaged(path, f"token {arrays['ids'].min()}", "tokens must not be negative")


def _damaged(
    path: Path,
    found: str,
    rule: str = "a run keeps its pairs and their log-probabilities under the reference there",
) -> DataError:
    todo = "start the run anew, into another directory"
    return DataError("damaged pairs", where=path, value=found, rule=rule, todo=todo)
