"""An engine for a checkpoint, in the way of running that a layout names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mindspore as ms

from mistral_ms.checkpoint import open_checkpoint
from mistral_ms.config import PredictConfig
from mistral_ms.config.base import validate
from mistral_ms.config.model import DType
from mistral_ms.errors import ConfigError
from mistral_ms.inference.engine import Engine
from mistral_ms.inference.graph_engine import load_graph_engine
from mistral_ms.parallel.apply import Division


def load_engine(
    path: Path,
    *,
    division: Division,
    batch: int = 1,
    max_length: int | None = None,
    chunk: int = 256,
    kind: str | None = None,
    compiled: bool = True,
    with_tokenizer: bool = True,
    verify: bool = True,
    follow_links: bool = False,
    dtype: DType = "float32",
    eos_ids: Sequence[int] | None = None,
) -> Engine:
    """Opens a checkpoint and loads it for generation, as ``parallel.execution`` of the layout says;
    ``auto`` is explicit with pipeline stages and operator by operator, which the graph cannot do.

    The auto-parallel graph pads the batch to a multiple of the data-parallel ranks. A process that
    has loaded one stays in graph mode.

    Args:
        path: its directory, of any known format.
        division: this process's part of several; all must do the same with their engines.
        batch: sequences computed side by side.
        max_length: positions of a sequence; the model's longest sequence by default.
        chunk: prompt tokens that are computed at a time.
        kind: which format to take when the directory holds several.
        compiled: False runs the explicit way operator by operator.
        with_tokenizer: load the directory's tokenizer; without it completions have no text.
        verify: compare a checkpoint of ours with its digests while it is read.
        follow_links: links may lead out of the directory.
        dtype: dtype of weights, cache and activations.
        eos_ids: tokens that end a text; what the checkpoint's files say when None.

    Raises:
        ConfigError: the auto-parallel graph cannot do it, see
            :func:`~mistral_ms.parallel.graph.build_generation`.
        CheckpointError: see :meth:`Engine.load`, as for the others.
        TokenizerError: no tokenizer, or one that does not fit the model.
        GenerationError: ``max_length`` or ``dtype`` cannot be had.
    """
    parallel = division.parallel
    way = parallel.execution_on(ms.get_context("device_target"))
    if parallel.execution == "auto" and (parallel.pp > 1 or not compiled):
        way = "explicit"
    if way == "explicit":
        return Engine.load(
            path,
            batch=batch,
            max_length=max_length,
            chunk=chunk,
            kind=kind,
            graph=compiled,
            with_tokenizer=with_tokenizer,
            verify=verify,
            follow_links=follow_links,
            dtype=dtype,
            division=division,
            eos_ids=eos_ids,
        )
    if not compiled:
        raise ConfigError(
            "impossible execution",
            where="execution",
            value="graph",
            rule="it is always compiled",
            todo="run operator by operator with execution explicit",
        )
    with open_checkpoint(
        Path(path),
        kind,
        verify=False,  # the weights are read below
        follow_links=follow_links,
        rank=division.rank,
        world=division.world,
    ) as source:
        config = source.config
    length = config.longest_sequence if max_length is None else max_length
    rows = -(-batch // parallel.dp) * parallel.dp
    sizes = {"batch": rows, "max_length": length, "chunk": min(chunk, length), "dtype": dtype}
    run = validate(
        PredictConfig, {"model": config, "prediction": sizes, "parallel": parallel}, "generation"
    )
    return load_graph_engine(
        path,
        run,
        rank=division.rank,
        kind=kind,
        with_tokenizer=with_tokenizer,
        verify=verify,
        follow_links=follow_links,
        eos_ids=eos_ids,
    )
