"""From tokens to the loss of one micro-batch, as one net whose cells lie on pipeline stages."""

from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Tensor, lazy_inline, nn, ops

from mistral_ms.layers import output_logits, token_nll
from mistral_ms.models import DecoderBlock
from mistral_ms.parallel.graph.parts import GraphParts
from mistral_ms.parallel.graph.region import Region, Shape
from mistral_ms.parallel.sharding import Sharding


class LossRegion(Region):
    """Logits and losses of this rank's rows.

    Rows are divided among all ranks of the stage, so each forms the whole vocabulary's logits of
    its own ones: no reduction over a divided vocabulary, and no logits that are held twice.

    Args:
        sharding: the table; None on one device.
        dtype: what the logits are computed in.
        aux_coef: coefficient of the load-balancing loss, over the number of sparse layers.
        z_coef: coefficient of the router z-loss, likewise.
    """

    def __init__(
        self, sharding: Sharding | None, dtype: str, aux_coef: float, z_coef: float
    ) -> None:
        self.ranks = 1 if sharding is None else sharding.ranks
        ranks = self.ranks

        def shapes(*given: Shape) -> Any:
            return [ranks]

        super().__init__(
            sharding,
            ("rows", "matrix", "tokens", "samples", "samples"),
            ("tokens",),
            shapes,
            (ms.float32,),
        )
        self.dtype, self.cast, self.sum = getattr(ms, dtype), ops.Cast(), ops.ReduceSum()
        self.aux_coef, self.z_coef = aux_coef, z_coef
        self.tensor_ranks = 1 if sharding is None else sharding.parallel.mp

    def compute(
        self,
        x_TH: Tensor,
        weight_VH: Tensor,
        labels_T: Tensor,
        losses_B2: Tensor,
        shares_B3: Tensor,
    ) -> Tensor:
        """This rank's part of the total loss, float32 [1]."""
        logits_TV = output_logits(x_TH, self.cast(weight_VH, self.dtype))
        nll_T, _ = token_nll(logits_TV, labels_T)
        share = shares_B3[0]
        losses = self.sum(losses_B2, 0)
        # the tensor-parallel ranks hold the same losses: each adds its share
        router = (self.aux_coef * losses[0] + self.z_coef * losses[1]) / self.tensor_ranks
        total = self.sum(nll_T) * share[0] + router * share[1]
        return (total * share[2]).reshape(1)


class Loss(nn.Cell):
    """The total loss of normalised states, brought together from all ranks of the last stage.

    Args:
        parts: dtype, sizes and layouts.
        aux_coef: coefficient of the load-balancing loss (mean over layers).
        z_coef: coefficient of the router z-loss.
    """

    def __init__(self, parts: GraphParts, aux_coef: float, z_coef: float) -> None:
        super().__init__()
        sharding = parts.sharding
        layers = max(1, len(parts.config.sparse_layers))
        self.region = LossRegion(sharding, parts.dtype, aux_coef / layers, z_coef / layers)
        self.sum = ops.ReduceSum()
        if sharding is not None:
            self.sum.shard(((sharding.ranks,),))

    def construct(
        self,
        x_TH: Tensor,
        weight_VH: Tensor,
        labels_BS: Tensor,
        losses_B2: Tensor,
        shares_B3: Tensor,
    ) -> Tensor:
        """A float32 scalar, scaled."""
        labels_T = labels_BS.reshape(-1)
        return self.sum(self.region(x_TH, weight_VH, labels_T, losses_B2, shares_B3))


class GraphModel(nn.Cell):
    """Embedding, decoder blocks, head and loss; the blocks are the ordinary ones.

    Not a :class:`~mistral_ms.models.CausalLM`: what all its layers share (rotations, visibility)
    and what it collects from them would travel from stage to stage, as would every operator that
    stands between cells. Here each cell makes what it needs of the positions, which all stages
    have, and the router's losses go along as two numbers per sample.

    Args:
        parts: makes the pieces.
        stages: the stage of each layer.
        aux_coef: coefficient of the load-balancing loss (mean over layers).
        z_coef: coefficient of the router z-loss.
    """

    def __init__(
        self, parts: GraphParts, stages: tuple[int, ...], aux_coef: float, z_coef: float
    ) -> None:
        super().__init__()
        self.embed_tokens = parts.embedding()
        blocks = [DecoderBlock(parts, layer) for layer in range(parts.config.num_hidden_layers)]
        self.layers = nn.CellList(blocks)
        self.norm = parts.norm()
        self.lm_head = parts.head()
        sparse = bool(parts.config.sparse_layers)
        self.loss = Loss(parts, aux_coef if sparse else 0.0, z_coef if sparse else 0.0)
        self.add = ops.Add()
        if parts.sharding is not None:
            samples = parts.sharding("samples")
            self.add.shard(in_strategy=(samples, samples))
        if max(stages) > 0:
            self.embed_tokens.pipeline_stage = 0
            for block, stage in zip(blocks, stages, strict=True):
                block.pipeline_stage = stage
            for cell in (self.norm, self.lm_head, self.loss):
                cell.pipeline_stage = max(stages)

    def construct(
        self,
        ids_BS: Tensor,
        labels_BS: Tensor,
        positions_BS: Tensor,
        segments_BS: Tensor,
        shares_B3: Tensor,
    ) -> Tensor:
        """The scaled total loss of a micro-batch; shares of all micro-batches add up.

        Args:
            ids_BS: int32.
            labels_BS: int32, IGNORE_INDEX where nothing is predicted.
            positions_BS: int32, -1 for padding.
            segments_BS: int32.
            shares_B3: float32, equal rows: one over the counted labels of the whole batch, one
                over its tokens that are not padding, the loss scale.
        """
        x_TH = self.embed_tokens(ids_BS)
        losses_B2 = None
        for layer in self.layers:
            x_TH, losses = layer(x_TH, (positions_BS, segments_BS), positions_BS)
            if losses is not None:
                losses_B2 = losses
        if losses_B2 is None:
            losses_B2 = shares_B3  # a dense model: both coefficients are zero
        return self.loss(self.norm(x_TH), self.lm_head.weight, labels_BS, losses_B2, shares_B3)


class LazyGraphModel(GraphModel):
    """The same, compiled once for all micro-batches: a pipeline with regions needs it on Ascend,
    and the CPU backend cannot do it.
    """

    @lazy_inline
    def __init__(
        self, parts: GraphParts, stages: tuple[int, ...], aux_coef: float, z_coef: float
    ) -> None:
        super().__init__(parts, stages, aux_coef, z_coef)
