"""Tokenizers with the habits of Hugging Face."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from mindspore import Tensor

from mistral_ms.errors import TokenizerError
from mistral_ms.tokenizer import ChatFormat, Tokenizer, copy_files, find_tokenizer


class BatchEncoding(Mapping[str, Any]):
    """``input_ids`` and ``attention_mask`` of texts, as keys and as attributes, so that
    ``model(**tokenizer(text))`` works.

    Args:
        input_ids: lists, NumPy arrays or tensors.
        attention_mask: of the same kind: 1 for a token, 0 for padding.
    """

    def __init__(self, input_ids: Any, attention_mask: Any) -> None:
        self.input_ids, self.attention_mask = input_ids, attention_mask

    def __getitem__(self, key: str) -> Any:
        if key not in ("input_ids", "attention_mask"):
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(("input_ids", "attention_mask"))

    def __len__(self) -> int:
        return 2


class PreTrainedTokenizer:
    """A tokenizer of a checkpoint.

    One habit is not Hugging Face's: what is typed never becomes a control token. ``"</s>"`` in a
    text is four characters, unless ``special_tokens=True`` says that names mean tokens.

    Args:
        tokenizer: does the work.

    Attributes:
        padding_side: ``right`` or ``left``, where ``padding=True`` pads.
        pad_token_id: what it pads with: the first EOS, for these models have no token of their own.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.padding_side: Literal["left", "right"] = "right"
        self.pad_token_id = tokenizer.eos_ids[0] if tokenizer.eos_ids else 0

    @property
    def bos_token_id(self) -> int:
        """The token that begins a sequence."""
        return self.tokenizer.bos_id

    @property
    def eos_token_id(self) -> int:
        """The first of the tokens that end a text."""
        return self.tokenizer.eos_ids[0]

    @property
    def vocab_size(self) -> int:
        """How many ids there are."""
        return self.tokenizer.vocab_size

    def __len__(self) -> int:
        return self.vocab_size

    def __call__(
        self,
        text: str | Sequence[str],
        *,
        padding: bool = False,
        truncation: bool = False,
        max_length: int | None = None,
        return_tensors: Literal["np", "ms"] | None = None,
        add_special_tokens: bool = True,
        special_tokens: bool = False,
    ) -> BatchEncoding:
        """Encodes a text, or several.

        Args:
            text: one text or a list of them.
            padding: fill shorter rows up to the longest.
            truncation: cut off what is beyond ``max_length``.
            max_length: see there.
            return_tensors: ``np`` for NumPy arrays, ``ms`` for MindSpore tensors, both int32 and
                [B, S] with B = 1 for a single text; None for lists.
            add_special_tokens: BOS and EOS, as the tokenizer's own settings say.
            special_tokens: names of control tokens in the text mean the tokens.

        Raises:
            TokenizerError: a text that UTF-8 cannot carry, rows of several lengths that are to be
                one array, truncation without a length, or the other way round.
        """
        if truncation != (max_length is not None):
            raise TokenizerError(
                "truncation and max_length go together",
                where="truncation",
                value=f"{truncation}, max_length {max_length}",
                rule="a length alone would cut nothing off",
            )
        if not isinstance(padding, bool) or return_tensors not in (None, "np", "ms"):
            raise TokenizerError(
                "unknown choice",
                where="padding, return_tensors",
                value=f"{padding!r}, {return_tensors!r}",
                rule='padding is True (up to the longest) or False; return_tensors "np" or "ms"',
            )
        texts = [text] if isinstance(text, str) else list(text)
        if not all(isinstance(each, str) for each in texts):
            raise TokenizerError("no text", where="text", rule="a string, or a list of strings")
        rows = [self._ids(each, add_special_tokens, special_tokens)[:max_length] for each in texts]
        if not padding and return_tensors is None:
            mask = [[1] * len(row) for row in rows]
            single = isinstance(text, str)
            return BatchEncoding(rows[0] if single else rows, mask[0] if single else mask)
        width = max(map(len, rows), default=0)
        if not padding and any(len(row) != width for row in rows):
            raise TokenizerError(
                "rows of several lengths",
                where="return_tensors",
                value=f"{min(map(len, rows))} to {width} tokens",
                rule="rows of an array are equally long",
                todo="set padding=True",
            )
        ids = np.full((len(rows), width), self.pad_token_id, np.int32)
        present = np.zeros((len(rows), width), np.int32)
        for number, row in enumerate(rows):
            first = width - len(row) if self.padding_side == "left" else 0
            ids[number, first : first + len(row)] = row
            present[number, first : first + len(row)] = 1
        if return_tensors is None:
            return BatchEncoding(ids.tolist(), present.tolist())
        if return_tensors == "np":
            return BatchEncoding(ids, present)
        return BatchEncoding(Tensor(ids), Tensor(present))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of one text."""
        return self._ids(text, add_special_tokens, special_tokens=False)

    def decode(self, ids: Any, *, skip_special_tokens: bool = True) -> str:
        """The text of ids: a list, an array or a tensor of one row."""
        return self.tokenizer.decode(np.ravel(_array(ids)).tolist(), skip_special_tokens)

    def batch_decode(self, rows: Any, *, skip_special_tokens: bool = True) -> list[str]:
        """The text of each row."""
        return [self.decode(row, skip_special_tokens=skip_special_tokens) for row in _rows(rows)]

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        return_tensors: Literal["np", "ms"] | None = None,
    ) -> Any:
        """The ids after which the model is to write the assistant's next turn.

        Args:
            messages: each with ``role`` and ``content``.
            tools: JSON schemas of functions that the model may call.
            chat_template: a Jinja file instead of the tokenizer's own, or ``mistral``.
            return_tensors: as for a call; [1, S].

        Raises:
            TokenizerError: no chat format, or a conversation that it does not allow.
        """
        ids = ChatFormat(self.tokenizer, chat_template).encode_chat(messages, tools)
        if return_tensors is None:
            return ids
        array = np.asarray([ids], np.int32)
        return array if return_tensors == "np" else Tensor(array)

    def save_pretrained(self, directory: str | Path) -> tuple[str, ...]:
        """Copies the tokenizer's files into a directory, which is made if it is not there.

        Returns:
            The files.
        """
        Path(directory).mkdir(parents=True, exist_ok=True)
        return tuple(str(path) for path in copy_files(self.tokenizer, Path(directory)))

    def _ids(self, text: str, add_special_tokens: bool, special_tokens: bool) -> list[int]:
        inner = self.tokenizer
        bos = add_special_tokens and inner.adds_bos
        eos = [inner.eos_ids[0]] if add_special_tokens and inner.adds_eos else []
        if special_tokens:
            return [*([inner.bos_id] if bos else []), *inner.encode_special(text)[0], *eos]
        return [*inner.encode(text, bos=bos), *eos]


class AutoTokenizer:
    """Finds the tokenizer of a checkpoint."""

    @staticmethod
    def from_pretrained(path: str | Path) -> PreTrainedTokenizer:
        """The tokenizer of a checkpoint's directory, a tokenizer file, or a packaged one.

        Args:
            path: a path, or ``packaged-v1``, ``packaged-v3``, ...

        Raises:
            TokenizerError: no tokenizer there, or a damaged one.
        """
        return PreTrainedTokenizer(find_tokenizer(str(path)))


def _array(ids: Any) -> np.ndarray:
    return np.asarray(ids.asnumpy() if isinstance(ids, Tensor) else ids)


def _rows(rows: Any) -> Sequence[Any]:
    return list(rows.asnumpy()) if isinstance(rows, Tensor) else list(rows)
