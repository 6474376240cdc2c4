"""An engine for a checkpoint, in the way of running that a layout names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import mindspore as ms

from mistral_ms.checkpoint import Source, open_checkpoint
from mistral_ms.checkpoint.load import kept_quantization
from mistral_ms.config import PredictConfig
from mistral_ms.config.base import validate
from mistral_ms.config.model import DType
from mistral_ms.errors import ConfigError
from mistral_ms.inference.dtypes import check_dtype
from mistral_ms.inference.engine import Engine
from mistral_ms.inference.graph_engine import load_graph_engine
from mistral_ms.inference.lengths import check_length
from mistral_ms.parallel.context import ParallelContext

if TYPE_CHECKING:
    from typing_extensions import Unpack  # of Python 3.11


class Opening(TypedDict, total=False):
    """How a checkpoint is opened, and what of it is taken; see :meth:`Engine.load`."""

    kind: str | None
    verify: bool
    follow_links: bool
    with_tokenizer: bool
    eos_ids: Sequence[int] | None
    adapter: Path | None


def stays_quantized(
    source: Source, *, parallel_context: ParallelContext, dtype: DType, adapter: Path | None
) -> bool:
    """Whether :func:`load_engine` keeps the quantised experts of a checkpoint as they are.

    Args:
        source: the checkpoint.
        parallel_context: see there, as for the others.
        dtype: of the other weights.
        adapter: an adapter of the checkpoint.
    """
    explicit = parallel_context.parallel.execution_on(ms.get_context("device_target")) == "explicit"
    kept = kept_quantization(source, dtype, parallel_context.world)
    return explicit and adapter is None and kept is not None


def load_engine(
    path: Path,
    *,
    parallel_context: ParallelContext,
    batch: int = 1,
    max_length: int | None = None,
    chunk: int = 256,
    dtype: DType = "float32",
    compiled: bool = True,
    **opening: Unpack[Opening],
) -> Engine:
    """Opens a checkpoint and loads it for generation, as ``parallel.execution`` of the layout says;
    ``auto`` is explicit with pipeline stages and operator by operator, which the graph cannot do.

    The auto-parallel graph pads the batch to a multiple of the data-parallel ranks. A process that
    has loaded one stays in graph mode.

    Args:
        path: its directory, of any known format.
        parallel_context: this process's part of several; all must do the same with their engines.
        batch: sequences computed side by side.
        max_length: positions of a sequence; the model's longest sequence by default.
        chunk: prompt tokens that are computed at a time.
        dtype: dtype of weights, cache and activations, see :meth:`Engine.load`.
        compiled: False runs the explicit way operator by operator.
        opening: see :meth:`Engine.load`.

    Raises:
        ConfigError: the auto-parallel graph cannot do it, see
            :func:`~mistral_ms.parallel.graph.build_generation`.
        CheckpointError: see :meth:`Engine.load`, as for the others.
        TokenizerError: no tokenizer, or one that does not fit the model.
        GenerationError: ``max_length`` or ``dtype`` cannot be had.
    """
    parallel = parallel_context.parallel
    way = parallel.execution_on(ms.get_context("device_target"))
    if parallel.execution == "auto" and (parallel.pp > 1 or not compiled):
        way = "explicit"
    if way == "explicit":
        return Engine.load(
            path,
            batch=batch,
            max_length=max_length,
            chunk=chunk,
            graph=compiled,
            dtype=dtype,
            parallel_context=parallel_context,
            **opening,
        )
    if not compiled:
        raise ConfigError(
            "impossible execution",
            where="execution",
            value="graph",
            rule="it is always compiled",
            todo="run operator by operator with execution explicit",
        )
    check_dtype(dtype)
    with open_checkpoint(
        Path(path),
        opening.get("kind"),
        verify=False,  # the weights are read below
        follow_links=opening.get("follow_links", False),
        rank=parallel_context.rank,
        world=parallel_context.world,
    ) as source:
        config = source.config
    length = config.longest_sequence if max_length is None else max_length
    check_length(config, length, "max_length")
    rows = -(-batch // parallel.dp) * parallel.dp
    sizes = {"batch": rows, "max_length": length, "chunk": min(chunk, length), "dtype": dtype}
    run = validate(
        PredictConfig, {"model": config, "prediction": sizes, "parallel": parallel}, "generation"
    )
    return load_graph_engine(path, run, rank=parallel_context.rank, **opening)
