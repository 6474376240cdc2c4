"""The graphs of generation: prompts in pieces of a fixed width, then a token per sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops
from mindspore.nn.utils import no_init_parameters

from mistral_ms.config import DROPLESS, PredictConfig
from mistral_ms.layers import CacheSpec, output_logits
from mistral_ms.parallel.graph.checks import check_prediction
from mistral_ms.parallel.graph.layer_factory import GraphLayerFactory
from mistral_ms.parallel.graph.model import GraphDecoder
from mistral_ms.parallel.graph.region import Region, Shape
from mistral_ms.parallel.sharding import Sharding
from mistral_ms.parallel.storage import GraphStorage
from mistral_ms.weights import HEAD


class LastLogits(Region):
    """Logits of one token of each sample. Tensor-parallel ranks divide the vocabulary, unless the
    head is the embedding, which is whole: then each forms all of them.

    Args:
        dtype: what they are computed in.
        tied: whether the head is the embedding.
        sharding: the table; None on one device.
    """

    def __init__(self, dtype: str, tied: bool, sharding: Sharding | None) -> None:
        def shapes(x: Shape, weight: Shape, last: Shape) -> Any:
            return [last[0], weight[0]]

        head, logits = ("matrix", "samples") if tied else ("output_divided", "columns")
        super().__init__(sharding, ("whole_rows", head, "table"), (logits,), shapes, (ms.float32,))
        self.gather, self.range, self.cast = ops.Gather(), ops.Range(), ops.Cast()
        self.dtype = getattr(ms, dtype)

    def compute(self, x_TH: Tensor, weight_VH: Tensor, last_B: Tensor) -> Tensor:
        """[B * S, H], this rank's [V, H], int32 [B] -> float32 [B, V]."""
        B = last_B.shape[0]
        rows_B = last_B + self.range(0, B, 1) * (x_TH.shape[0] // B)
        return output_logits(self.gather(x_TH, rows_B, 0), self.cast(weight_VH, self.dtype))


class GraphNextToken(GraphDecoder):
    """The contract of :class:`~mistral_ms.models.NextTokenLogits` as a graph that MindSpore
    divides; :class:`~mistral_ms.inference.Engine` takes it for the model, too. Every rank is given
    all rows, and all logits.

    Args:
        layer_factory: makes the pieces, with a cache.

    Raises:
        WeightError: its pieces have other parameters than the specifications describe.

    Attributes:
        config: the architecture.
        key_positions: see :class:`~mistral_ms.layers.KeyPositions`.
        batch: rows that it takes, those of all ranks.
        packs: whether it takes packed batches.
    """

    packs = False

    def __init__(self, layer_factory: GraphLayerFactory) -> None:
        super().__init__(layer_factory)
        assert layer_factory.cache is not None
        self.config, self.batch = layer_factory.config, layer_factory.cache.batch
        self.key_positions = layer_factory.key_positions(layer_factory.cache)
        self.last_logits = LastLogits(layer_factory.dtype, self.tied, layer_factory.sharding)

    def construct(self, ids_BS: Tensor, positions_BS: Tensor, last_B: Tensor) -> Tensor:
        """Float32 [B, V]: logits after column ``last_B`` (int32) of each row; enters the tokens
        into the cache.

        Args:
            ids_BS: int32.
            positions_BS: int32, -1 for padding.
            last_B: int32.
        """
        rows_T, held_BM = self.key_positions(positions_BS)
        context = positions_BS, rows_T, held_BM
        x_TH = self.embed_tokens(ids_BS)
        of_batch = (positions_BS, ids_BS) if self.takes_ids else (positions_BS,)
        for layer in self.layers:
            x_TH = layer(x_TH, context, of_batch)
        return self.last_logits(self.norm(x_TH), self.head_weight(), last_B)

    def reset_cache(self) -> None:
        """Forgets all cached positions; the next call starts new sequences."""
        self.key_positions.reset()

    def clear_cache(self) -> None:
        """Resets and zeroes the cache; needed after logits that were not finite."""
        self.reset_cache()
        for layer in self.layers:
            layer.attention.cache.clear()


@dataclass(frozen=True)
class GenerationGraph:
    """A graph of generation that is ready to be compiled.

    Attributes:
        cell: the model with its cache. The graphs of both widths are of one cell.
        inputs: tensors of the shapes and dtypes that this graph takes, all zero.
    """

    cell: GraphNextToken
    inputs: tuple[Tensor, ...]


def build_generation(run: PredictConfig, layers: int | None = None) -> GraphNextToken:
    """The model of a prediction; its weights are not initialised.

    With one process it is an ordinary cell for any device. With more,
    :func:`~mistral_ms.parallel.graph.set_context` must have been called.

    Args:
        run: model, layout, and sizes of the cache.
        layers: builds only so many decoder blocks.

    Raises:
        ConfigError: the graph cannot be divided like that, see
            :func:`~mistral_ms.parallel.graph.checks.check_prediction`.
        TopologyError: there are more or fewer processes than the layout has.
    """
    config, parallel, sizes = run.model, run.parallel, run.prediction
    if layers is not None:
        config = config.model_copy(update={"num_hidden_layers": layers})
    check_prediction(run)
    cache = CacheSpec.for_model(config, sizes.batch, sizes.max_length, sizes.chunk)
    with no_init_parameters():
        layer_factory = GraphLayerFactory(
            config, DROPLESS, parallel, sizes.dtype, cache, sequence=sizes.max_length
        )
        model = GraphNextToken(layer_factory)
    for name, weight in model.weights().items():
        if model.specs[name].kind != "buffer":  # nothing is trained: no float32 is needed
            weight.set_dtype(getattr(ms, sizes.dtype))
    model.set_train(False)
    return model


def generation_storage(run: PredictConfig, rank: int = 0) -> GraphStorage:
    """How a rank's parts of the weights lie in a checkpoint.

    Args:
        run: as for :func:`build_generation`.
        rank: the process.
    """
    divided_head = {} if run.model.tie_word_embeddings else {HEAD: "output_divided"}
    return GraphStorage(run.model, run.parallel, rank, divided_head)


def prefill(run: PredictConfig, layers: int | None = None) -> GenerationGraph:
    """The graph of a piece of every prompt; arguments and errors as of :func:`build_generation`."""
    return _of_width(build_generation(run, layers), run.prediction.chunk)


def decode(run: PredictConfig, layers: int | None = None) -> GenerationGraph:
    """The graph of one token of every sample; arguments and errors as of
    :func:`build_generation`.
    """
    return _of_width(build_generation(run, layers), 1)


def _of_width(model: GraphNextToken, width: int) -> GenerationGraph:
    ids = Tensor(np.zeros((model.batch, width), np.int32))
    return GenerationGraph(model, (ids, ids, Tensor(np.zeros(model.batch, np.int32))))
