"""The training objective: next-token loss and the router's losses, each reported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import mindspore as ms
from mindspore import Tensor, nn, ops

from mistral_ms.config import IGNORE_INDEX
from mistral_ms.errors import ConfigError
from mistral_ms.layers import HeadLoss, TokenNLL, embedding_noise, output_logits
from mistral_ms.models.causal_lm import CausalLM
from mistral_ms.models.model_chunk import ModelChunk
from mistral_ms.moe import (
    LossTerm,
    RouterSums,
    gate_context,
    layer_of,
    router_loss_terms,
    widened,
)

_sum = ops.ReduceSum()
_concat = ops.Concat(0)

WHOLE_LOGITS_LIMIT = 1 << 26
"""Logits of up to so many elements (256 MiB of float32) are held whole."""


def tokens_at_a_time(vocab_size: int) -> int:
    """How many tokens' logits fit into :data:`WHOLE_LOGITS_LIMIT`, at least one."""
    return max(1, WHOLE_LOGITS_LIMIT // vocab_size)


class LossReport(NamedTuple):
    """What one forward pass is judged by; float32. :class:`Objective` returns it as a plain
    tuple in this order (GRAPH_MODE cannot build named ones): ``LossReport(*parts)``.

    A batch may be cut into dispatch groups (micro-batches, ranks). With the whole batch's counts
    as ``inv_counts`` each group reports its part, and the parts of all groups add up.

    Attributes:
        lm: mean negative log-likelihood over the counted tokens.
        aux: load-balancing loss, without its coefficient; of several groups the mean, weighted by
            their tokens.
        z: router z-loss, without its coefficient.
        routed_LE: choices per sparse layer and expert, before the capacity (a scalar 0 for a
            dense model).
        kept_LE: choices that got a slot (likewise).
        others: further router losses, without their coefficients, in the order of
            ``Objective.others``; each counted as ``aux`` is. Behind them ``Objective.measures``.
    """

    lm: Tensor
    aux: Tensor
    z: Tensor
    routed_LE: Tensor
    kept_LE: Tensor
    others: tuple[Tensor, ...] = ()

    @classmethod
    def unpack(cls, parts: Sequence[Any]) -> LossReport:
        """The parts that :class:`Objective` returns, the further losses one by one at the end."""
        lm, aux, z, routed_LE, kept_LE, *others = parts
        return cls(lm, aux, z, routed_LE, kept_LE, tuple(others))


class RouterLoss(nn.Cell):
    """One loss of a router's sums.

    Args:
        term: the loss.
        pooled: see :class:`Objective`.
        experts: of each layer of the sums, where they differ: then the loss is the mean of its
            values for each layer alone.
    """

    def __init__(self, term: LossTerm, pooled: bool, experts: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.term, self.pooled, self.experts = term, pooled, experts

    def construct(self, sums: RouterSums) -> Tensor:
        """A float32 scalar."""
        if len(self.experts) == 0:
            return self.term(sums, self.pooled)
        total = ops.zeros((), ms.float32)
        for number in range(len(self.experts)):
            total = total + self.term(layer_of(sums, number, self.experts[number]), False)
        return total / len(self.experts)


class Objective(nn.Cell):
    """lm + router_aux_loss_coef * aux + router_z_loss_coef * z, and further router losses by their
    coefficients.

    On a pipeline stage it is that stage's part: the router losses of its own layers, and lm where
    it predicts. The parts of all stages add up, as long as aux is not pooled.

    Args:
        model: the model to train, or a model chunk of it.
        router_aux_loss_coef: coefficient of the load-balancing loss.
        router_z_loss_coef: coefficient of the router z-loss.
        router_losses: coefficients of further router losses by their names.
        pooled_aux: whether aux pools all layers (Hugging Face) or averages per layer.
        loss_chunk: tokens whose logits are held at a time; None chooses: all where they fit in
            256 MiB, as many as fit otherwise.
        interleave_num: parts of the batch, equal in rows, that are dispatch groups of their own and
            go through the model side by side in one graph: nothing in one waits for the other, so
            that the communication of one may hide behind the computation of the other.
        token_nll: of logits [T, V] and labels [T], see :func:`mistral_ms.layers.token_nll`; for
            a model whose logits are divided, one that brings them together.
        neftune_noise_alpha: embedded tokens get uniform noise of at most this over the root of
            sequence length times hidden size, where ``random_B3`` is given; None: no noise.

    Attributes:
        others: names of the further router losses, in the order of ``LossReport.others``.
        measures: names of what is reported behind these and is no loss.

    Raises:
        ConfigError: pooled aux of a model chunk or of layers with different numbers of experts, a
            router loss that the model's gate does not have.
    """

    measures: tuple[str, ...] = ()

    def __init__(
        self,
        model: CausalLM,
        *,
        router_aux_loss_coef: float = 0.0,
        router_z_loss_coef: float = 0.0,
        router_losses: Mapping[str, float] | None = None,
        pooled_aux: bool = True,
        loss_chunk: int | None = None,
        interleave_num: int = 1,
        token_nll: nn.Cell | None = None,
        neftune_noise_alpha: float | None = None,
    ) -> None:
        super().__init__()
        if (
            pooled_aux
            and router_aux_loss_coef > 0
            and model.model_chunk != ModelChunk.whole(model.config)
        ):
            raise ConfigError(
                "impossible objective",
                where="routing.aux_loss",
                value="pooled, on one pipeline stage",
                rule="the pooled load-balancing loss couples all layers",
                todo="set routing.aux_loss=per_layer",
            )
        moe = model.config.moe
        differ = moe is not None and moe.layer_experts is not None
        if pooled_aux and router_aux_loss_coef > 0 and differ:
            raise ConfigError(
                "impossible objective",
                where="routing.aux_loss",
                value=f"pooled, with {list(model.config.expert_counts)} experts",
                rule="the pooled load-balancing loss takes means of each expert over all layers",
                todo="set routing.aux_loss=per_layer",
            )
        self.model, self.interleave_num = model, interleave_num
        self.embeds, self.predicts = model.model_chunk.embeds, model.model_chunk.predicts
        sparse = model.config.sparse_layers
        held = [layer for layer in sparse if layer in model.model_chunk.layers]
        self.fraction = len(held) / max(1, len(sparse))
        experts = 0 if model.config.moe is None else model.config.moe.num_local_experts
        before = len([layer for layer in sparse if layer < model.model_chunk.layers.start])
        self.rows_before = before, experts
        self.rows_after = len(sparse) - before - len(held), experts
        further = dict(router_losses or {})
        self.others = tuple(further)
        self.coefficients = router_aux_loss_coef, router_z_loss_coef, *further.values()
        self.router_losses = nn.CellList()
        counts = dict(zip(sparse, model.config.expert_counts, strict=True))
        own = tuple(counts[layer] for layer in held) if differ else ()
        for term in router_loss_terms(model.config, self.others):
            self.router_losses.append(RouterLoss(term, pooled_aux, own))
        self.chunk = loss_chunk or tokens_at_a_time(model.config.vocab_size)
        self.noise_alpha = neftune_noise_alpha
        self.token_nll = TokenNLL() if token_nll is None else token_nll
        self.head_loss = HeadLoss(self.chunk, self.token_nll)

    def construct(
        self,
        ids_BS: Tensor,
        labels_BS: Tensor,
        positions_BS: Tensor,
        segments_BS: Tensor | None = None,
        inv_counts: Tensor | None = None,
        random_B3: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The total loss, and its parts in the order of :class:`LossReport`.

        Args:
            ids_BS: int32 tokens.
            labels_BS: int32, the token after each one; IGNORE_INDEX where nothing is predicted.
            positions_BS: int32, -1 for padding.
            segments_BS: int32; documents that do not see each other. None: one.
            inv_counts: float32 [2]: one over the counted labels of the whole batch, one over its
                tokens that are not padding. None: this is the whole batch.
            random_B3: int32, for each row the seed, the step and the row's number in the global
                batch; None: gates route as outside of training.
        """
        if inv_counts is None:
            counted = _count(labels_BS != IGNORE_INDEX)
            present = _count(positions_BS >= 0)
            one = ops.ones((), ms.float32)
            inv_counts = 1.0 / ops.maximum(ops.stack((counted, present)), one)
        total, _, parts = self.forward_step(
            ids_BS, labels_BS, positions_BS, segments_BS, inv_counts, random_B3
        )
        return total, parts

    def forward_step(
        self,
        x: Tensor,
        labels_BS: Tensor,
        positions_BS: Tensor,
        segments_BS: Tensor | None,
        inv_counts: Tensor,
        random_B3: Tensor | None = None,
        ids_BS: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """This model chunk's part of the total loss, what it hands on, and its parts of the report.

        Args:
            x: int32 tokens [B, S] where the model chunk embeds, hidden states [B * S, H] otherwise.
            labels_BS: as above, and so are the others.
            positions_BS: int32.
            segments_BS: int32.
            inv_counts: float32 [2].
            random_B3: int32.
            ids_BS: int32, the tokens, for gates that take them; None where the model chunk embeds.
        """
        total, states, parts = self.interleaved_part(
            x, labels_BS, positions_BS, segments_BS, inv_counts, random_B3, 0, ids_BS
        )
        for number in range(1, self.interleave_num):
            other, more_states, others = self.interleaved_part(
                x, labels_BS, positions_BS, segments_BS, inv_counts, random_B3, number, ids_BS
            )
            total = total + other
            states = _concat((states, more_states))
            added: tuple[Tensor, ...] = ()
            for i in range(len(parts)):
                added = (*added, parts[i] + others[i])
            parts = added
        return total, states, parts

    def interleaved_part(
        self,
        x: Tensor,
        labels_BS: Tensor,
        positions_BS: Tensor,
        segments_BS: Tensor | None,
        inv_counts: Tensor,
        random_B3: Tensor | None,
        number: int,
        ids_BS: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """The same of one dispatch group, the rows of part ``number``."""
        x, labels_BS = self.rows(x, number), self.rows(labels_BS, number)
        positions_BS = self.rows(positions_BS, number)
        segments_BS = None if segments_BS is None else self.rows(segments_BS, number)
        random_B3 = None if random_B3 is None else self.rows(random_B3, number)
        ids_BS = None if ids_BS is None else self.rows(ids_BS, number)
        hidden_TH, sums = self.states(x, positions_BS, segments_BS, random_B3, ids_BS)
        lm = ops.zeros((), ms.float32)
        if self.predicts:
            lm = self.nll(hidden_TH, labels_BS.reshape(-1)) * inv_counts[0]
        total, parts = self.with_router_losses(lm, lm, sums, positions_BS, inv_counts)
        return total, hidden_TH, parts

    def states(
        self,
        x: Tensor,
        positions_BS: Tensor,
        segments_BS: Tensor | None,
        random_B3: Tensor | None,
        ids_BS: Tensor | None = None,
    ) -> tuple[Tensor, RouterSums | None]:
        """What the model chunk makes of its input, as :meth:`CausalLM.decode` gives it."""
        x_TH = self.model.embed(x) if self.embeds else x
        if self.embeds and self.noise_alpha is not None and random_B3 is not None:
            x_TH = self.noisy(x_TH, random_B3, positions_BS.shape[1])
        ids_BS = x if self.embeds else ids_BS
        return self.model.decode(x_TH, positions_BS, segments_BS, random_B3, ids_BS)

    def with_router_losses(
        self,
        total: Tensor,
        lm: Tensor,
        sums: RouterSums | None,
        positions_BS: Tensor,
        inv_counts: Tensor,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """A loss and the router's, each times its coefficient; and the parts of the report.

        Args:
            total: the loss.
            lm: reported as such.
            sums: of the router; None of a dense model.
            positions_BS: int32.
            inv_counts: float32 [2].
        """
        if sums is None:
            zero = ops.zeros((), ms.float32)
            none = zero if self.rows_before[1] == 0 else self.counts(None)
            absent = [zero for _ in self.coefficients[2:]]
            return total, (lm, zero, zero, none, none, *absent)
        weight = _count(positions_BS.reshape(-1) >= 0) * inv_counts[1] * self.fraction
        losses: tuple[Tensor, ...] = ()
        for i in range(len(self.coefficients)):
            loss = self.router_losses[i](sums) * weight
            total = total + self.coefficients[i] * loss
            losses = (*losses, loss)
        _, routed_LE, kept_LE, _, _, _, _ = sums
        counts = self.counts(routed_LE), self.counts(kept_LE)
        return total, (lm, *losses[:2], *counts, *losses[2:])

    def noisy(self, x_TH: Tensor, random_B3: Tensor, columns: int) -> Tensor:
        """Embedded tokens of rows of so many columns, with their noise."""
        seed, step, token_index_T = gate_context(random_B3, columns)
        H = x_TH.shape[-1]
        bound = self.noise_alpha / (columns * H) ** 0.5
        return x_TH + ops.cast(embedding_noise((seed, step), token_index_T, H, bound), x_TH.dtype)

    def rows(self, x: Tensor, number: int) -> Tensor:
        """The rows of one part."""
        if self.interleave_num == 1:
            return x
        size = x.shape[0] // self.interleave_num
        return x[number * size : (number + 1) * size]

    def counts(self, held_LE: Tensor | None) -> Tensor:
        """Counts of the layers that are held -> of all sparse layers, zero for the others."""
        if held_LE is None:
            rows, experts = self.rows_before[0] + self.rows_after[0], self.rows_before[1]
            return ops.zeros((rows, experts), ms.float32)
        held_LE = widened(held_LE, self.rows_before[1])
        if self.rows_before[0] > 0:
            held_LE = _concat((ops.zeros(self.rows_before, ms.float32), held_LE))
        if self.rows_after[0] > 0:
            held_LE = _concat((held_LE, ops.zeros(self.rows_after, ms.float32)))
        return held_LE

    def nll(self, hidden_TH: Tensor, labels_T: Tensor) -> Tensor:
        """Summed negative log-likelihood, in chunks where the logits would not fit."""
        weight_VH = self.model.head_weight()
        if labels_T.shape[0] <= self.chunk:
            nll_T, _ = self.token_nll(output_logits(hidden_TH, weight_VH), labels_T)
            return _sum(nll_T)
        return self.head_loss(hidden_TH, weight_VH, labels_T)


def _count(condition: Tensor) -> Tensor:
    return _sum(ops.cast(condition, ms.float32))
