"""An engine whose two steps are graphs that MindSpore divides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mindspore as ms

from mistral_ms.checkpoint import open_merged
from mistral_ms.checkpoint.load import load_weights
from mistral_ms.config import DROPLESS, PredictConfig
from mistral_ms.config.computation import check_same_model
from mistral_ms.inference.engine import Engine
from mistral_ms.inference.settings import read_checkpoint_settings
from mistral_ms.parallel import graph
from mistral_ms.parallel.graph.checks import check_gate
from mistral_ms.tokenizer import check_vocabulary, load_tokenizer


def load_graph_engine(
    path: Path,
    run: PredictConfig,
    *,
    rank: int = 0,
    kind: str | None = None,
    with_tokenizer: bool = True,
    verify: bool = True,
    follow_links: bool = False,
    eos_ids: Sequence[int] | None = None,
    adapter: Path | None = None,
) -> Engine:
    """Opens a checkpoint and loads it into auto-parallel graphs. The process stays in graph mode.

    Args:
        path: its directory, of any known format.
        run: layout and sizes; its model must be the checkpoint's.
        rank: of this process; with several, all on Ascend, ``mindspore.communication.init()`` must
            have been called, and all must do the same with their engines.
        kind: which format to take when the directory holds several.
        with_tokenizer: load the directory's tokenizer; without it completions have no text.
        verify: compare a checkpoint of ours with its digests while it is read.
        follow_links: links may lead out of the directory; see :func:`open_merged`.
        eos_ids: tokens that end a text; what the checkpoint's files say when None.
        adapter: directory of an adapter, which is added to the weights.

    Raises:
        ConfigError: the checkpoint is of another model, or see
            :func:`~mistral_ms.parallel.graph.build_generation`; its gate breaks its contract.
        CheckpointError: see :func:`open_merged` and :func:`load_weights`.
        TokenizerError: no tokenizer, or one that does not fit the model.
    """
    world = run.parallel.world
    divided = world > 1
    with open_merged(
        Path(path),
        kind,
        adapter=adapter,
        verify=verify,
        follow_links=follow_links,
        rank=rank,
        world=world,
    ) as source:
        check_same_model(run.model, source.config, str(path), "name that model in the run file")
        ms.set_context(mode=ms.GRAPH_MODE)
        tokenizer = None
        if with_tokenizer:
            tokenizer = load_tokenizer(source.path)
            check_vocabulary(tokenizer, run.model)
        check_gate(run.model, DROPLESS, training=False)
        if divided:
            graph.set_context(run)
        built = graph.decode(run)
        if divided:
            built.cell.compile(*built.inputs)  # leaves this rank's parts of the parameters
        else:
            for parameter in built.cell.get_parameters():
                parameter.init_data()
        if eos_ids is None:
            eos_ids = read_checkpoint_settings(source.path, source.config, tokenizer).eos_ids
        storage = graph.generation_storage(run, rank)
        load_weights(source, built.cell.weights(), storage=storage)
    return Engine(
        built.cell,
        step=built.cell,
        max_length=run.prediction.max_length,
        chunk=run.prediction.chunk,
        tokenizer=tokenizer,
        graph=False,
        eos_ids=eos_ids,
    )
