"""What a gate is told and what it says, as plain tuples: GRAPH_MODE cannot build named ones."""

from __future__ import annotations

from typing import TypeAlias

import mindspore as ms
from mindspore import Tensor, ops
from mindspore.ops import constexpr

from mistral_ms.errors import ConfigError

_cast = ops.Cast()
_range = ops.Range()

Routing: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, tuple[Tensor, ...]]
"""Where every token of a dispatch group goes, in this order:

* weights_TK: float32, weight of each chosen expert;
* experts_TK: int32, the chosen experts, all different for a token, the gate's first choice first;
  E where a gate leaves a choice out by itself, as a random second expert that is not drawn: then
  its weight is 0, nothing is dispatched, and it is neither routed nor dropped;
* scores_TE: float32, affinities to all experts that add up to 1 for each token: what the
  load-balancing loss takes for the router's probabilities;
* logits_TE: float32, what the router z-loss keeps small;
* terms: float32 [T, E] each, what the gate's own losses are made of, see
  :class:`~mistral_ms.moe.gates.Gate`.
"""

GateContext: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""What a gate may know in training beside the tokens, in this order; nothing in it depends on the
layout:

* seed: int32 scalar, of the run;
* step: int32 scalar, the first being 0;
* token_index_T: int32, each token's index in the global batch: its row times the length of rows,
  plus its column.
"""


def gate_context(random_B3: Tensor, columns: int) -> GateContext:
    """The context of the tokens of some rows.

    Args:
        random_B3: int32, for each row the seed, the step and the row's number in the global batch.
        columns: S, tokens of a row.
    """
    rows_B1 = random_B3[:, 2].reshape(-1, 1)
    token_index_BS = rows_B1 * columns + _cast(_range(0, columns, 1), ms.int32)
    return random_B3[0, 0], random_B3[0, 1], token_index_BS.reshape(-1)


def gate_ids(ids_BS: Tensor, random_B3: Tensor | None, domains: int, vocab_size: int) -> Tensor:
    """What gates that take ids get, int32 [T]: the ids; where rows are of domains, the domain times
    V plus the id.

    Args:
        ids_BS: int32, the tokens.
        random_B3: int32; its fourth column has the domains of the rows.
        domains: how many the gate knows.
        vocab_size: V.

    Raises:
        ConfigError: there are several domains, and nobody says which a row is of.
    """
    if domains == 1:
        return ids_BS.reshape(-1)
    if random_B3 is None or random_B3.shape[1] < 4:
        return _refuse_unknown_domains(domains)
    return (random_B3[:, 3:4] * vocab_size + ids_BS).reshape(-1)


def check_domains_known(domains: int) -> None:
    """For whoever cannot say which domain a row is of: before anything is compiled.

    Args:
        domains: how many the gate knows.

    Raises:
        ConfigError: several.
    """
    if domains > 1:
        raise ConfigError(
            "unknown domains",
            where="model.moe.gate",
            value=f"{domains} domains",
            rule="routes by the domain of each row, which the train command and a program "
            "(mistral_ms.mixtures.domains.DomainLM) tell it, and no other command",
            todo="extract one domain",
        )


@constexpr
def _refuse_unknown_domains(domains: int) -> Tensor:
    """Compiled code may not raise errors of ours; what is computed while compiling may."""
    check_domains_known(domains)
    raise AssertionError(domains)
