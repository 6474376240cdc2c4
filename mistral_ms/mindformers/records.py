"""MindRecord files of a run, looked at before MindFormers' trainer begins.

MindFormers takes one file, or all of a directory, and finds out what they hold when the first batch
is read, behind a long traceback.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mistral_ms.errors import ConfigError, DataError
from mistral_ms.mindformers.run_file import get, is_divided

_NAME = re.compile(r"mindrecord\d*$")
"""How the names end that MindFormers takes for MindRecord files."""


def check_records(config: Mapping[str, Any]) -> None:
    """Checks the datasets that a run reads: files are there, with the columns that it names, and
    first rows of a length that the model takes. A row of S + 1 tokens has S to predict; a whole
    model takes shorter rows, too, a divided graph has one length.

    Args:
        config: of the run. Datasets of other loaders than ``MindDataset`` are MindFormers' own.

    Raises:
        ConfigError: no data, or no such file.
        DataError: no MindRecord file, or one with other columns or rows.
    """
    mode = config["run_mode"]
    read = {
        "train_dataset": mode in ("train", "finetune"),
        "eval_dataset": mode == "eval" or bool(config.get("do_eval")),
    }
    for section in (name for name, wanted in read.items() if wanted):
        if get(config, f"{section}.data_loader.type") == "MindDataset":
            columns = get(config, f"{section}.input_columns") or ["input_ids"]
            longest = get(config, "model.model_config.seq_length", 2048) + 1
            lengths = range(longest if is_divided(config) else 2, longest + 1)
            for file in _files(config, section):
                _check_file(file, columns, lengths)


def _files(config: Mapping[str, Any], section: str) -> list[Path]:
    """The files that MindFormers would read."""
    key = f"{section}.data_loader.dataset_dir"
    if not (given := get(config, key)):
        named = get(config, f"{section}.data_loader.dataset_files")
        if not named:
            flag = f"--{section.removesuffix('set')}"
            raise ConfigError("no data", where=key, todo=f"{flag} FILE, a MindRecord file")
        found = [Path(each) for each in ([named] if isinstance(named, str) else named)]
    elif Path(given).is_dir():
        found = sorted(each for each in Path(given).rglob("*") if _NAME.search(each.name))
        if not found:
            raise ConfigError(
                "no data", where=f"{key} {given}", rule="names of files end in mindrecord"
            )
    else:
        found = [Path(given)]
        if not _NAME.search(given):
            raise ConfigError(
                "unknown kind of file", where=f"{key} {given}", rule="its name ends in mindrecord"
            )
    for file in found:
        for each in (file, file.with_name(f"{file.name}.db")):
            if not each.is_file():
                raise ConfigError("no such file", where=f"{section}: {each}")
    return found


def _check_file(file: Path, columns: list[str], lengths: range) -> None:
    """Compares a file's columns, and its first row, with what is wanted."""
    from mindspore.mindrecord import FileReader

    try:
        reader = FileReader(str(file))
        held = reader.schema()
        row: dict[str, Any] = next(iter(reader.get_next()), {})
        reader.close()
    except Exception as error:  # whatever the back end raises
        raise DataError("not a MindRecord file", where=file, value=error) from error
    if missing := [name for name in columns if name not in held]:
        raise DataError(
            f"no column {missing[0]}",
            where=file,
            value=f"it has {', '.join(held)}",
            rule=f"input_columns are {', '.join(columns)}",
            todo="docs/mindformers.md says how such a file is made",
        )
    for name in columns if row else ():
        if (found := int(np.size(row[name]))) not in lengths:
            shortest, longest = lengths[0], lengths[-1]
            raise DataError(
                "rows of another length",
                where=f"{file}: {name}",
                value=f"{found} tokens",
                rule=f"seq_length + 1 is {longest}"
                + ("" if shortest == longest else f"; {shortest} to {longest} tokens"),
                todo="set model.model_config.seq_length, or write other rows",
            )
