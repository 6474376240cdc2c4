"""How documents become sequences of a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from mistral_ms.config.base import Frozen

LONGEST_SEQ_LENGTH = 1 << 23  # four int32 a token must fit a MindRecord page, at most 256 MiB


class PackingConfig(Frozen):
    """How documents are tokenised and joined.

    Attributes:
        boundaries: what a sequence that holds several documents does where one ends. ``loss``:
            nobody is asked to predict the first token of the next document; attention reaches
            back across. ``attention``: neither; each document has positions from 0 on and a
            segment number of its own. ``ignore``: nothing, the documents are one stream.
        add_bos: a text begins with BOS; None does what the tokenizer's own settings say. Of
            conversations their format decides.
        add_eos: a text ends with EOS. Conversations end as their format says.
        split_lines: each line of a txt file is a document, not the file.
        skip_bad: documents that cannot be read are counted, not an error.
        drop_last: the last sequence is dropped when it is not full, not padded.
        format: the shape that every line of a jsonl file must have; None recognises each by its
            keys, see :mod:`mistral_ms.datasets.shapes`.
        chat_template: of conversations: a Jinja file, or ``mistral`` for mistral-common's formats,
            instead of what the tokenizer says.
    """

    boundaries: Literal["loss", "attention", "ignore"] = "loss"
    add_bos: bool | None = None
    add_eos: bool = True
    split_lines: bool = False
    skip_bad: bool = False
    drop_last: bool = False
    format: Literal["text", "messages", "sharegpt", "alpaca"] | None = None
    chat_template: str | None = None


class DataConfig(PackingConfig):
    """How documents become sequences.

    Attributes:
        seq_length: S, tokens that the model sees at a time.
    """

    seq_length: int = Field(ge=1, le=LONGEST_SEQ_LENGTH)


class DataSourceConfig(Frozen):
    """What a run is trained on: a dataset, or texts that are packed when the run starts.

    Attributes:
        dataset: directory written by the ``data`` command.
        inputs: txt and jsonl files; packed into the run's own directory.
        tokenizer: of the inputs: a tokenizer file, the directory of a model, or one of the real
            ones that are installed with mistral_ms: ``packaged-v1`` (32000 ids), ``packaged-v2``,
            ``packaged-v3``, ``packaged-v7``.
        packing: how the inputs are packed.
        domains: of the inputs: the number of each one's domain, from 0 on, for a gate that routes
            by domains (``random_routed``). No sequence has texts of two.
    """

    dataset: Path | None = None
    inputs: tuple[Path, ...] = ()
    domains: tuple[int, ...] = ()
    tokenizer: str | None = None
    packing: PackingConfig = PackingConfig()

    @model_validator(mode="after")
    def _one_source(self) -> DataSourceConfig:
        if (self.dataset is None) == (not self.inputs):
            raise ValueError("give either data.dataset or data.inputs")
        if self.dataset is not None and self.packing != PackingConfig():
            raise ValueError("data.packing is of data.inputs; a dataset is packed already")
        if self.inputs and self.tokenizer is None:
            raise ValueError("data.inputs need data.tokenizer")
        if self.domains and len(self.domains) != len(self.inputs):
            raise ValueError(
                f"data.domains has {len(self.domains)} numbers: one for each of data.inputs "
                f"({len(self.inputs)})"
            )
        return self
