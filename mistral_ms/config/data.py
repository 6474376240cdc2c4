"""How documents become windows of a dataset."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from mistral_ms.config.base import Frozen

LONGEST_WINDOW = 1 << 23  # four int32 a token must fit a MindRecord page, at most 256 MiB


class DataConfig(Frozen):
    """How documents are tokenised and packed.

    Attributes:
        seq_length: S, tokens that the model sees at a time.
        boundaries: what a window that holds several documents does where one ends. ``loss``:
            nobody is asked to predict the first token of the next document; attention reaches
            back across. ``attention``: neither; each document has positions from 0 on and a
            segment number of its own. ``ignore``: nothing, the documents are one stream.
        add_bos: a text begins with BOS. Conversations always do: their format says so.
        add_eos: a text ends with EOS. Conversations end with the assistant's, always.
        split_lines: each line of a txt file is a document, not the file.
        skip_bad: documents that cannot be read are counted, not an error.
        drop_last: the last window is dropped when it is not full, not padded.
    """

    seq_length: int = Field(ge=1, le=LONGEST_WINDOW)
    boundaries: Literal["loss", "attention", "ignore"] = "loss"
    add_bos: bool = True
    add_eos: bool = True
    split_lines: bool = False
    skip_bad: bool = False
    drop_last: bool = False
