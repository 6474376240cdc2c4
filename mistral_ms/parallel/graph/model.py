"""From tokens to the loss of one micro-batch, as one net whose cells lie on pipeline stages."""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Parameter, Tensor, lazy_inline, nn, ops

from mistral_ms.layers import TokenNLL, is_buffer, output_logits
from mistral_ms.models import DecoderBlock, ModelChunk, check_weights, insert_adapters
from mistral_ms.parallel.graph.layer_factory import GraphLayerFactory
from mistral_ms.parallel.graph.metrics import OutputRegion, RecordMetrics, metrics_buffer
from mistral_ms.parallel.graph.pooled import PooledLoss
from mistral_ms.parallel.graph.region import Region, Shape
from mistral_ms.parallel.sharding import Sharding
from mistral_ms.weights import by_name, specs

_cast = ops.Cast()
_sum = ops.ReduceSum()


class Loss(Region):
    """Logits and losses of this rank's rows, brought together from all ranks of the last stage.

    Rows are divided among all ranks of the stage, so each forms the whole vocabulary's logits of
    its own ones: no reduction over a divided vocabulary, and no logits that are held twice.

    Args:
        dtype: what the logits are computed in.
        token_nll: see :class:`~mistral_ms.models.Objective`.
        sharding: the table; None on one device.
    """

    def __init__(self, dtype: str, token_nll: nn.Cell, sharding: Sharding | None) -> None:
        ranks = 1 if sharding is None else sharding.ranks

        def shapes(*given: Shape) -> Any:
            return [ranks]

        inputs = "rows", "matrix", "tokens", "samples", "matrix"
        super().__init__(sharding, inputs, ("tokens",), shapes, (ms.float32,))
        self.token_nll, self.record = token_nll, RecordMetrics()
        self.metrics_buffer, self.dtype = metrics_buffer(1), getattr(ms, dtype)
        self.sum = ops.ReduceSum()
        if sharding is not None:
            self.sum.shard(((sharding.ranks,),))

    def compute(
        self,
        x_TH: Tensor,
        weight_VH: Tensor,
        labels_T: Tensor,
        scales_B3: Tensor,
        metrics_buffer: Tensor,
    ) -> Tensor:
        """This rank's part of the scaled loss, float32 [1]; records it without the scale."""
        logits_TV = output_logits(x_TH, weight_VH)
        nll_T, _ = self.token_nll(logits_TV, labels_T)
        loss = (_sum(nll_T) * scales_B3[0, 0]).reshape(1)
        return self.record(loss * scales_B3[0, 2], metrics_buffer, loss)

    def construct(
        self, x_TH: Tensor, weight_VH: Tensor, labels_BS: Tensor, scales_B3: Tensor
    ) -> Tensor:
        """A float32 scalar, scaled."""
        labels_T, weight_VH = labels_BS.reshape(-1), _cast(weight_VH, self.dtype)
        return self.sum(self.divided(x_TH, weight_VH, labels_T, scales_B3, self.metrics_buffer))


class GraphBlock(DecoderBlock):
    """The ordinary block without its sums, where there are none: the None that would stand for
    them becomes a call of Python in the compiled graph where blocks are computed again.

    Attributes:
        pooled: whether it gives sums, for the pooled load-balancing loss.
        records_output: whether ``output_buffer`` keeps what
            :class:`~mistral_ms.parallel.graph.metrics.OutputRegion` records.
    """

    def __init__(self, layer_factory: GraphLayerFactory, layer: int) -> None:
        super().__init__(layer_factory, layer)
        self.takes_more = False  # the region has positions, and where the gate takes them the ids
        self.pooled = (
            self.sparse and layer_factory.losses is not None and layer_factory.losses.pooled
        )
        self.records_output = layer_factory.records_outputs
        if self.records_output:
            self.output, self.output_buffer = (
                OutputRegion(layer_factory.sharding),
                metrics_buffer(2),
            )

    # named arguments: of any number of them MindSpore forgets which cell it compiles, and so that
    # it is computed again
    def construct(  # type: ignore[override]
        self, x_TH: Tensor, context: Any, valid_T: Any, gate_context: Any = None
    ) -> Any:
        """[T, H] -> [T, H], and sums; contexts and mask are what the pieces of
        :class:`GraphLayerFactory` take.
        """
        x_TH, sums = super().construct(x_TH, context, valid_T, gate_context)
        if self.records_output:
            x_TH = self.output(x_TH, self.output_buffer)
        return (x_TH, sums) if self.pooled else x_TH


class GraphDecoder(nn.Cell):
    """Embedding, decoder blocks, last norm and head; the blocks are the ordinary ones.

    Not a :class:`~mistral_ms.models.CausalLM`: what all its layers share (rotations, visibility)
    and what it collects from them would travel from stage to stage, as would every operator that
    stands between cells. Here each cell makes what it needs of the batch, which all stages have.

    Args:
        layer_factory: makes the pieces.

    Attributes:
        specs: what is true of each of its parameters, by name.

    Raises:
        WeightError: its pieces have other parameters than the specifications describe.
    """

    def __init__(self, layer_factory: GraphLayerFactory) -> None:
        super().__init__()
        config = layer_factory.config
        self.takes_ids = config.moe is not None and config.moe.gate.takes_ids
        self.embed_tokens = layer_factory.embedding()
        self.layers = nn.CellList(
            [GraphBlock(layer_factory, layer) for layer in range(config.num_hidden_layers)]
        )
        self.norm = layer_factory.norm()
        self.tied = config.tie_word_embeddings
        if not self.tied:
            self.lm_head = layer_factory.head()
        self.specs = by_name(specs(config))
        insert_adapters(self.layers, ModelChunk.whole(config), self.specs, config, layer_factory)
        check_weights(self.weights(), self.specs, layer_factory)

    def head_weight(self) -> Parameter:
        """The output head [V, H]; the embedding's own weight when tied."""
        return self.embed_tokens.weight if self.tied else self.lm_head.weight

    def weights(self) -> dict[str, Parameter]:
        """All weights by the names of our checkpoints."""
        return {n: p for n, p in self.parameters_and_names() if not is_buffer(p)}


class GraphModel(GraphDecoder):
    """From tokens to the loss of a micro-batch.

    The router losses of each layer are attached to its states.

    Args:
        layer_factory: makes the pieces.
        stages: the stage of each layer.
        token_nll: the loss of tokens, see :class:`~mistral_ms.models.Objective`; None: the usual
            one. It is given whole rows of logits, whatever the layout.

    Raises:
        WeightError: see the base.
    """

    def __init__(
        self,
        layer_factory: GraphLayerFactory,
        stages: tuple[int, ...],
        token_nll: nn.Cell | None = None,
    ) -> None:
        super().__init__(layer_factory)
        pooled = [number for number, layer in enumerate(self.layers) if layer.pooled]
        self.pooled = bool(pooled)
        if self.pooled:
            assert layer_factory.losses is not None
            self.pooled_loss = PooledLoss(layer_factory, layer_factory.losses)
            self.last_pooled = max(pooled)
        token_nll = TokenNLL() if token_nll is None else token_nll
        self.loss = Loss(layer_factory.dtype, token_nll, layer_factory.sharding)
        if max(stages) > 0:  # then nothing is pooled
            # a tied embedding is updated there: MindSpore sends it to the last stage in each step,
            # and its gradient back
            self.embed_tokens.pipeline_stage = 0
            for block, stage in zip(self.layers, stages, strict=True):
                block.pipeline_stage = stage
            for cell in (self.norm, self.loss, *([] if self.tied else [self.lm_head])):
                cell.pipeline_stage = max(stages)

    def construct(
        self,
        ids_BS: Tensor,
        labels_BS: Tensor,
        positions_BS: Tensor,
        segments_BS: Tensor,
        scales_B3: Tensor,
        random_B3: Tensor,
    ) -> Tensor:
        """The scaled language-model loss of a micro-batch; those of all micro-batches add up.

        The gradient is that of all losses: those of the routers are attached to the states.

        Args:
            ids_BS: int32.
            labels_BS: int32, IGNORE_INDEX where nothing is predicted.
            positions_BS: int32, -1 for padding.
            segments_BS: int32.
            scales_B3: float32, equal rows: one over the counted labels of the whole batch, one
                over its tokens that are not padding, the loss scale.
            random_B3: int32: for each row seed, step and the row's number in the global batch, what
                gates draw from; of a gate that routes by domains each row's, in a fourth column.
        """
        x_TH = self.embed_tokens(ids_BS)
        sums: tuple[Tensor, ...] = ()
        of_batch = (positions_BS, scales_B3, ids_BS)[: 3 if self.takes_ids else 2]
        for layer in self.layers:
            x_TH = layer(x_TH, (positions_BS, segments_BS), of_batch, random_B3)
            if layer.pooled:
                x_TH, summed = x_TH
                sums = (*sums, summed)
        if self.pooled:
            buffer = self.layers[self.last_pooled].moe.metrics_buffer
            x_TH = self.pooled_loss(x_TH, sums, scales_B3, buffer)
        return self.loss(self.norm(x_TH), self.head_weight(), labels_BS, scales_B3)

    def metrics_buffers(self) -> dict[int | None, Parameter]:
        """Where metrics are recorded: of each sparse layer its losses (aux, z and further ones, in
        the share of the batch in their means) and the choices of each expert, before and after the
        capacity, [1, losses + 2 E]; of None the language-model loss, [1, 1].
        """
        found: dict[int | None, Parameter] = {
            i: layer.moe.metrics_buffer for i, layer in enumerate(self.layers) if layer.sparse
        }
        return {**found, None: self.loss.metrics_buffer}

    def output_buffers(self) -> list[Parameter]:
        """Where each block records how large its output is, [1, 2]; none where they do not."""
        return [layer.output_buffer for layer in self.layers if layer.records_output]


class LazyGraphModel(GraphModel):
    """The same, compiled once for all micro-batches: a pipeline with regions needs it on Ascend,
    and the CPU backend cannot do it.
    """

    @lazy_inline
    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
