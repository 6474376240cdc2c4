"""Losses that keep the router balanced and its logits small; and the sums they are made of.

Every sparse layer returns sums, not means: sums add up over layers, micro-batches and processes,
so that each loss can be formed exactly wherever all its parts have come together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias, TypeVar

import mindspore as ms
from mindspore import Tensor, ops

from mistral_ms.config import DROPLESS, RoutingConfig, local_groups
from mistral_ms.config.names import perhaps
from mistral_ms.errors import ConfigError
from mistral_ms.moe.routing import Routing
from mistral_ms.ops import reference

_sum = ops.ReduceSum()
_max = ops.ReduceMax()
_concat = ops.Concat(-1)
_top_k = ops.TopK(sorted=True)


RouterSums: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, tuple[Tensor, ...], Tensor]
"""Sums over the tokens of a sparse layer that are not padding, all float32, in this order:

* scores_E: the router's scores (carries the gradient);
* routed_E: choices per expert, before the capacity (no gradient); where experts choose, the tokens
  that each takes, and of the tokens that nobody takes those whose first choice it is: so what is
  not kept is a token without an expert;
* kept_E: choices per expert that got a slot (no gradient); of rerouted tokens those that each
  expert takes in the end;
* z: squares of logsumexp(logits), a scalar (carries the gradient);
* tokens: how many tokens, a scalar;
* terms: [E] each, what the gate gives beside (``Gate.statistics`` names them);
* counted_E: what the load-balancing loss counts of the choices before the capacity (no gradient),
  see ``routing.aux_choices`` and ``routing.aux_normalize``; routed_E where they say nothing else.
  Where ``routing.aux_scope`` names local groups, a scalar in its place: the load-balancing loss of
  each of them times its tokens, added up (carries the gradient).

Stacked over the sparse layers of a model they are [layers, E] and [layers]; a layer with fewer
experts than others has zeros behind its own.
"""

LossTerm = Callable[[RouterSums, bool], Tensor]
"""A loss: of stacked sums, and of whether the load-balancing loss pools all layers -> a float32
scalar. Of several dispatch groups the mean counts, weighted by their tokens. Except the pooled
load-balancing loss, a loss of several layers must equal the mean of its values for each layer
alone, because pipeline stages and the auto-parallel graph compute it layer by layer."""

Term = TypeVar("Term", bound=LossTerm)

_LOSSES: dict[str, LossTerm] = {}


def register_loss(name: str) -> Callable[[Term], Term]:
    """Makes a loss of every gate known; decorates its function.

    Args:
        name: its name in ``training.router_losses`` and in the metrics.

    Raises:
        ConfigError: another loss has that name.
    """

    def register(term: Term) -> Term:
        if name in _LOSSES:
            raise ConfigError("loss given twice", where=name, rule="a name has one meaning")
        _LOSSES[name] = term
        return term

    return register


def check_own_names(where: str, own: Mapping[str, LossTerm]) -> None:
    """Raises where a gate's loss would hide one that every gate has.

    Args:
        where: the gate's table, for the message.
        own: its losses.

    Raises:
        ConfigError: names it.
    """
    for name in own:
        if name in _LOSSES:
            raise ConfigError(
                "loss given twice",
                where=where,
                value=name,
                rule=f"every gate has the losses {', '.join(sorted(_LOSSES))}",
            )


def loss_terms(names: Sequence[str], own: Mapping[str, LossTerm]) -> tuple[LossTerm, ...]:
    """The losses of these names.

    Args:
        names: as in ``training.router_losses``.
        own: losses that the model's gate brings.

    Raises:
        ConfigError: an unknown loss, or one of another gate.
    """
    known = {**_LOSSES, **own}
    for name in names:
        if name not in known:
            raise ConfigError(
                "unknown router loss",
                where="training.router_losses",
                value=name,
                rule=f"with this model's gate there are: {', '.join(sorted(known))}",
                todo=perhaps(name, known),
            )
    return tuple(known[name] for name in names)


def router_sums(
    chosen: Routing,
    kept_TK: Tensor,
    valid_T: Tensor,
    routing: RoutingConfig = DROPLESS,
    columns: int = 1,
) -> RouterSums:
    """The sums of one layer's pass.

    Args:
        chosen: of every token.
        kept_TK: float32, 1 where a choice was computed; where experts choose, or tokens are
            rerouted, [T, E], the tokens that each takes.
        valid_T: float32, 0 for padding.
        routing: the policy, and what the load-balancing loss counts.
        columns: tokens of each sequence, where the loss is of each.
    """
    _, experts_TK, scores_TE, logits_TE, terms = chosen
    T, E = scores_TE.shape
    if routing.policy == "experts_choose":
        left_T = valid_T * (1.0 - _max(kept_TK, -1))
        left_E, _ = reference.count_choices(experts_TK[:, :1], left_T, left_T, E)
        kept_E = ops.stop_gradient(_sum(kept_TK, 0))
        routed_E = kept_E + left_E
    elif routing.reroute_rounds:
        routed_E, _ = reference.count_choices(experts_TK, valid_T, valid_T, E)
        kept_E = ops.stop_gradient(_sum(kept_TK, 0))
    else:
        routed_E, kept_E = reference.count_choices(experts_TK, valid_T, kept_TK, E)
    groups = local_groups(T, columns, routing.aux_scope)
    if routing.aux_scope != "batch":
        counted_TE = _counted(chosen, valid_T, routing)
        counted = _loss_of_groups(scores_TE, counted_TE, valid_T, groups)
    elif routing.aux_choices == "all":
        counted = routed_E / experts_TK.shape[-1] if routing.aux_normalize else routed_E
    else:
        counted = _sum(_counted(chosen, valid_T, routing), 0)
    log_z_T = ops.logsumexp(logits_TE, -1)
    summed: tuple[Tensor, ...] = ()
    for term_TE in terms:
        summed = (*summed, _sum(term_TE * valid_T.reshape(-1, 1), 0))
    return (
        _sum(scores_TE * valid_T.reshape(-1, 1), 0),
        routed_E,
        kept_E,
        _sum(log_z_T * log_z_T * valid_T),
        _sum(valid_T),
        summed,
        counted,
    )


def _counted(chosen: Routing, valid_T: Tensor, routing: RoutingConfig) -> Tensor:
    """[T, E]: what the load-balancing loss counts of each token; no gradient."""
    _, experts_TK, scores_TE, _, _ = chosen
    E, K = scores_TE.shape[-1], experts_TK.shape[-1]
    if routing.aux_choices == "first":
        experts_TK, K = experts_TK[:, :1], 1
    elif routing.aux_choices == "top_scores":
        _, experts_TK = _top_k(ops.stop_gradient(scores_TE), K)
    counted_TE = _sum(reference.expert_one_hot(experts_TK, valid_T, E), 1)
    return ops.stop_gradient(counted_TE / K if routing.aux_normalize else counted_TE)


def _loss_of_groups(scores_TE: Tensor, counted_TE: Tensor, valid_T: Tensor, groups: int) -> Tensor:
    """The load-balancing loss of each local group times its tokens, added up: a scalar."""
    T, E = scores_TE.shape
    scores_GE = _sum((scores_TE * valid_T.reshape(T, 1)).reshape(groups, T // groups, E), 1)
    counted_GE = _sum(counted_TE.reshape(groups, T // groups, E), 1)
    tokens_G = _sum(valid_T.reshape(groups, T // groups), 1)
    tokens_G1 = ops.maximum(tokens_G, ops.ones_like(tokens_G)).reshape(groups, 1)
    return E * _sum(scores_GE * counted_GE / tokens_G1)


def stack_sums(layers: tuple[RouterSums, ...]) -> RouterSums:
    """The sums of several layers, stacked in their order."""
    scores, routed, kept, z, tokens, counted = [], [], [], [], [], []
    most = 0
    for sums in layers:
        if sums[1].shape[0] > most:
            most = sums[1].shape[0]
    # no comprehensions: compiled, those over tuples may compute something else
    for sums in layers:
        scores.append(widened(sums[0], most))
        routed.append(widened(sums[1], most))
        kept.append(widened(sums[2], most))
        z.append(sums[3])
        tokens.append(sums[4])
        counted.append(widened(sums[6], most))
    terms: tuple[Tensor, ...] = ()
    for number in range(len(layers[0][5])):
        each = []
        for sums in layers:
            each.append(widened(sums[5][number], most))
        terms = (*terms, ops.stack(each))
    return (
        ops.stack(scores),
        ops.stack(routed),
        ops.stack(kept),
        ops.stack(z),
        ops.stack(tokens),
        terms,
        ops.stack(counted),
    )


def widened(values: Tensor, experts: int) -> Tensor:
    """Numbers of a layer's experts, [..., E] -> [..., experts], with zeros behind; a scalar, and
    where there are as many, as they are.
    """
    if len(values.shape) == 0 or values.shape[-1] == experts:
        return values
    missing = ops.zeros((*values.shape[:-1], experts - values.shape[-1]), ms.float32)
    return _concat((values, missing))


def layer_of(stacked: RouterSums, number: int, experts: int) -> RouterSums:
    """The sums of one of several layers, as stacked over that layer alone.

    Args:
        stacked: of several layers.
        number: which.
        experts: how many it has.
    """
    scores_LE, routed_LE, kept_LE, z_L, tokens_L, terms, counted = stacked
    after = number + 1
    own: tuple[Tensor, ...] = ()
    for term_LE in terms:
        own = (*own, term_LE[number:after, :experts])
    of_groups = len(counted.shape) == 1
    return (
        scores_LE[number:after, :experts],
        routed_LE[number:after, :experts],
        kept_LE[number:after, :experts],
        z_L[number:after],
        tokens_L[number:after],
        own,
        counted[number:after] if of_groups else counted[number:after, :experts],
    )


@register_loss("aux")
def load_balancing_loss(sums: RouterSums, pooled: bool) -> Tensor:
    """E * sum_e f_e * P_e, as Hugging Face's Mixtral defines it.

    f_e is the mean number of choices of expert e per token, P_e its mean score (Switch
    Transformer, arXiv:2101.03961, equations 4 to 6, extended to K choices). A balanced router
    scores K (2.0 for Top-2), not 1.0. With ``routing.aux_choices: first`` f_e counts first choices
    (GShard, arXiv:2006.16668, algorithm 1, times E^2), with ``routing.aux_normalize`` it is
    divided by K: then it scores 1. With ``routing.aux_scope`` the products are those of local
    groups: of sequences, with the top scores counted, DeepSeek-V3's (arXiv:2412.19437, equations
    17 to 20).

    Args:
        sums: stacked over layers.
        pooled: means over the tokens of all layers (Hugging Face), or one product per layer and
            the mean of the products.

    Returns:
        A float32 scalar.
    """
    scores_LE, _, _, _, tokens_L, _, counted_LE = sums
    layers, num_experts = scores_LE.shape
    if len(counted_LE.shape) == 1:  # the losses of local groups
        return _sum(counted_LE / ops.maximum(tokens_L, ops.ones_like(tokens_L))) / layers
    if pooled:
        tokens = ops.maximum(_sum(tokens_L), ops.ones((), ms.float32))
        return num_experts * _sum((_sum(scores_LE, 0) / tokens) * (_sum(counted_LE, 0) / tokens))
    tokens_L1 = ops.maximum(tokens_L, ops.ones_like(tokens_L)).reshape(-1, 1)
    return num_experts * _sum((scores_LE / tokens_L1) * (counted_LE / tokens_L1)) / layers


@register_loss("z")
def router_z_loss(sums: RouterSums, pooled: bool = False) -> Tensor:
    """Mean of logsumexp(logits)^2 over tokens and layers (ST-MoE, arXiv:2202.08906, eq. 5);
    ``pooled`` changes nothing.
    """
    _, _, _, z_L, tokens_L, _, _ = sums
    return _sum(z_L) / ops.maximum(_sum(tokens_L), ops.ones((), ms.float32))
