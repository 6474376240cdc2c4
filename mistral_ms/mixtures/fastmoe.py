"""FastMoE's own gates: naive, and SWIPE, which balances workers (arXiv:2103.13262; fastmoe 1.1).

FastMoE's other gates are settings of registered ones, see ``docs/moe_cells.md``.
"""

from __future__ import annotations

from collections.abc import Callable

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore.ops import constexpr

from mistral_ms.errors import ConfigError
from mistral_ms.layers.parameter import weight
from mistral_ms.mixtures.experts import normal

_cast = ops.Cast()
_top_k = ops.TopK(sorted=True)
_softmax = ops.Softmax(-1)
_cumsum = ops.CumSum()
_sum = ops.ReduceSum()
_gather = ops.GatherD()


class NaiveGate(nn.Cell):
    """A linear map with a bias, the K largest logits, and the softmax of those.

    Args:
        hidden_size: H.
        num_experts: E.
        top_k: K.
        seed: of the matrix; the bias is zero.
    """

    def __init__(self, hidden_size: int, num_experts: int, top_k: int, seed: int = 0) -> None:
        super().__init__()
        if not 1 <= top_k <= num_experts:
            raise ConfigError(
                "impossible gate", where="top_k", value=top_k, rule=f"1 to {num_experts} experts"
            )
        self.top_k = top_k
        self.weight: Parameter = normal(
            np.random.default_rng(seed), (hidden_size, num_experts), hidden_size**-0.5
        )
        self.bias = weight(num_experts)
        self.product = ops.MatMul()

    def construct(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [T, K] and experts [T, K]."""
        logits_TK, experts_TK = _top_k(self.logits(x_TH), self.top_k)
        return _softmax(logits_TK), experts_TK

    def logits(self, x_TH: Tensor) -> Tensor:
        """[T, E]."""
        return self.product(x_TH, self.weight) + self.bias


class SwipeGate(NaiveGate):
    """The naive gate; in training choices are moved until no worker has more than its share.

    Args:
        hidden_size: H.
        num_experts: E, of all workers.
        top_k: K.
        workers: W: worker w holds experts w E/W to (w + 1) E/W - 1, and tokens w T/W on.
        seed: of the matrix.

    Raises:
        ConfigError: W does not divide E.
    """

    def __init__(
        self, hidden_size: int, num_experts: int, top_k: int, workers: int = 1, seed: int = 0
    ) -> None:
        super().__init__(hidden_size, num_experts, top_k, seed)
        if workers < 1 or num_experts % workers:
            raise ConfigError(
                "impossible workers",
                where="workers",
                value=workers,
                rule=f"must divide the {num_experts} experts",
            )
        self.workers = workers

    def construct(self, x_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [T, K], the softmax of the final experts' logits; and experts [T, K], which may
        be the same one twice.
        """
        logits_TE = self.logits(x_TH)
        logits_TK, experts_TK = _top_k(logits_TE, self.top_k)
        if self.training:
            experts_TK = swipe(ops.stop_gradient(experts_TK), logits_TE.shape[1], self.workers)
            logits_TK = _gather(logits_TE, 1, experts_TK)
        return _softmax(logits_TK), experts_TK


def swipe_gate(workers: int) -> Callable[[int, int, int], SwipeGate]:
    """For ``moeify(gate=swipe_gate(4))``."""
    return lambda H, E, K: SwipeGate(H, E, K, workers)


def swipe(experts_TK: Tensor, num_experts: int, workers: int) -> Tensor:
    """Moves choices so that each worker receives at most T/W * K of them (FastMoE's SWIPE gate).

    All first choices are settled, then all second ones. Of each choice a worker admits senders in
    the order of their ranks, and of one sender the earlier tokens, as long as it has room; its room
    is T/W * K over all choices together. What is turned away goes, in the same order, to workers
    in the order of their ranks that still have room: there to expert number k mod E/W of the
    worker. Nothing is dropped. With one worker nothing moves.

    Args:
        experts_TK: int32, tokens of worker 0 first, then those of worker 1, ...
        num_experts: E.
        workers: W, which divides T and E.

    Returns:
        int32 [T, K].

    Raises:
        ConfigError: W does not divide T.
    """
    T, K = experts_TK.shape
    _check_tokens(T, workers)
    local = num_experts // workers
    on, off = Tensor(1.0, ms.float32), Tensor(0.0, ms.float32)
    room_1W = ops.fill(ms.float32, (1, workers), float(T // workers * K))
    found: tuple[Tensor, ...] = ()
    for k in range(K):
        experts_T = experts_TK[:, k]
        # senders in the order of ranks, their tokens in order: the order of all tokens
        wanted_TW = ops.one_hot(experts_T // local, workers, on, off)
        admitted_TW = wanted_TW * _cast(_cumsum(wanted_TW, 0) <= room_1W, ms.float32)
        room_1W = room_1W - _sum(admitted_TW, 0).reshape(1, workers)
        surplus_T1 = 1.0 - _sum(admitted_TW, 1).reshape(T, 1)
        # the n-th that was turned away goes where the rooms, laid end to end, reach beyond n
        number_T1 = _cumsum(surplus_T1, 0)
        filled_1W = _cumsum(room_1W, 1)
        worker_T = _cast(_sum(_cast(number_T1 > filled_1W, ms.float32), 1), ms.int32)
        moved_TW = ops.one_hot(worker_T, workers, on, off) * surplus_T1
        room_1W = room_1W - _sum(moved_TW, 0).reshape(1, workers)
        instead_T = worker_T * local + k % local
        stays_T = surplus_T1.reshape(T) == 0.0
        found = (*found, ops.select(stays_T, experts_T, instead_T).reshape(T, 1))
    return ops.concat(found, 1)


@constexpr
def _check_tokens(tokens: int, workers: int) -> None:
    """Compiled code may not raise errors of ours; what is computed while compiling may."""
    if tokens % workers:
        raise ConfigError(
            "unequal workers",
            where="tokens",
            value=tokens,
            rule=f"each of the {workers} workers has as many tokens",
        )
