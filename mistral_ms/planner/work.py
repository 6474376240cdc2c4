"""What a card computes of a layer, and how long that takes: a roofline for each operator.

Products of matrices take the longer of their operations and their bytes; attention is bound by
operations, everything else by bytes. The gradient of a product has two products of the same size;
that of what is bound by bytes moves twice as many.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mistral_ms.config import RunConfig
from mistral_ms.parallel.memory import FLOAT, ITEMSIZE
from mistral_ms.parallel.pipeline.costs import shared_logits
from mistral_ms.planner.hardware import GIGA, Hardware
from mistral_ms.planner.load import Balance
from mistral_ms.planner.memory import Execution
from mistral_ms.planner.program import MASKS_BACKWARD, MASKS_FORWARD, OURS, Program
from mistral_ms.planner.traffic import exchanged_rows, tokens_of

ATTENTION_GRADIENT = 2.5
"""Operations of the gradient of fused attention, in multiples of its forward pass: five products
against two, one of them a computation of the scores again (arXiv:2205.14135)."""


@dataclass(frozen=True, slots=True)
class Seconds:
    """A forward pass and its gradient, by what takes the time.

    Attributes:
        matmul: products of matrices.
        attention: the fused operator.
        memory_bound: norms, rotations, activations, permutations, loss.
    """

    matmul: float = 0.0
    attention: float = 0.0
    memory_bound: float = 0.0

    @property
    def total(self) -> float:
        """All of it."""
        return self.matmul + self.attention + self.memory_bound

    def __add__(self, other: Seconds) -> Seconds:
        return Seconds(
            self.matmul + other.matmul,
            self.attention + other.attention,
            self.memory_bound + other.memory_bound,
        )


@dataclass(frozen=True, slots=True)
class Pass:
    """A forward pass, its gradient, and what selective recompute does once more."""

    forward: Seconds
    backward: Seconds
    selective: Seconds = Seconds()

    def __add__(self, other: Pass) -> Pass:
        return Pass(
            self.forward + other.forward,
            self.backward + other.backward,
            self.selective + other.selective,
        )


@dataclass(frozen=True, slots=True)
class Product:
    """``count`` products [m, k] x [k, n] of one dtype."""

    m: float
    k: float
    n: float
    count: float = 1.0
    dtype: str | None = None

    @property
    def flops(self) -> float:
        """Two for each multiplication and addition."""
        return 2.0 * self.m * self.k * self.n * self.count


class Work:
    """The layers of a training as one card computes them.

    Args:
        run: the training.
        hardware: the cluster.
        execution: in the graph tensor-parallel ranks hold a part of the rows between the matrices.
        balance: of the experts.
        program: whose sparse layers they are.
    """

    def __init__(
        self,
        run: RunConfig,
        hardware: Hardware,
        execution: Execution,
        balance: Balance,
        program: Program = OURS,
    ) -> None:
        self.run, self.model, self.rates = run, run.model, hardware.compute
        self.balance, self.program = balance, program
        self.item, self.T = ITEMSIZE[run.training.dtype], float(tokens_of(run))
        self.mp = run.parallel.mp
        self.rows = self.T / (self.mp if execution == "graph" else 1)
        self.columns = 1 if execution == "graph" else self.mp  # parts of the vocabulary

    def layer(self, layer: int) -> Pass:
        """One decoder block."""
        if not self.model.is_sparse(layer):
            return self._attention(layer) + self._dense()
        found = self._attention(layer) + self._sparse()
        for _ in self.model.extra_feed_forwards:
            found += self._dense()
        return found

    def embedding(self) -> Pass:
        """The lookup."""
        return self._of([], self.rows * self.model.hidden_size * self.item * 2)

    def head(self) -> Pass:
        """Final norm, output head and loss."""
        V = self.model.vocab_size / self.columns
        # in float32: logits, their exponentials, and the sums over them
        moved = 2 * self.rows * self.model.hidden_size * self.item + 3 * self.rows * V * FLOAT
        return self._of([Product(self.rows, self.model.hidden_size, V)], moved)

    def _window(self, layer: int) -> int:
        return self.model.window_of(layer) or self.run.training.seq_length

    def _attention(self, layer: int) -> Pass:
        model, T, mp = self.model, self.T, self.mp
        H, D, S = model.hidden_size, model.head_size, self.run.training.seq_length
        N, G = model.num_attention_heads / mp, model.num_key_value_heads / mp
        products = [Product(T, H, (N + 2 * G) * D), Product(T, N * D, H)]
        window = min(S, self._window(layer))
        seen = window - window * window / (2 * S)  # keys of a query on average
        operations = 4 * T * seen * N * D
        peak = self.rates.peak(self.run.training.dtype)
        rotated = 2 * T * (N + G) * D * self.item
        if model.qk_norm != "none":
            rotated *= 2  # read and written once more
        # the norm reads and writes, the residual reads two and writes one
        moved = 5 * self.rows * H * self.item + rotated
        core = operations / (peak * self.rates.attention_forward)
        gradient = operations * ATTENTION_GRADIENT / (peak * self.rates.attention_backward)
        norm = self.rates.streamed(2 * self.rows * H * self.item)
        found = self._of(products, moved)
        return Pass(
            found.forward + Seconds(attention=core),
            found.backward + Seconds(attention=gradient),
            Seconds(attention=core, memory_bound=norm),
        )

    def _dense(self) -> Pass:
        H, I = self.model.hidden_size, self.model.intermediate_size / self.mp  # noqa: E741
        products = [Product(self.T, H, I, 2), Product(self.T, I, H)]
        norm = 2 * self.rows * H * self.item
        found = self._of(
            products, norm + 3 * self.rows * H * self.item + 3 * self.T * I * self.item
        )
        return Pass(found.forward, found.backward, Seconds(memory_bound=self.rates.streamed(norm)))

    def _sparse(self) -> Pass:
        model, parallel, T = self.model, self.run.parallel, self.T
        assert model.moe is not None
        H, I, E = model.hidden_size, model.expert_size / self.mp, model.moe.num_local_experts  # noqa: E741
        R = exchanged_rows(self.run)
        local = E / parallel.ep
        computed = R * self.balance.slowest
        each = computed / local
        products = [
            Product(T, H, E, dtype=self.run.routing.router_dtype),
            Product(each, H, I, 2 * local),
            Product(each, I, H, local),
        ]
        norm = 2 * self.rows * H * self.item
        moved = norm + 3 * self.rows * H * self.item
        moved += T * H * FLOAT  # the router's states
        if not self.program.one_hot_dispatch:
            moved += (T * H + R * H) * self.item  # dispatch reads tokens and writes rows
            moved += (R * H + T * H) * self.item  # combine
        moved += 3 * computed * I * self.item  # SwiGLU
        if shared := model.shared_expert_size / self.mp:
            products += [Product(T, H, shared, 2), Product(T, shared, H)]
            # SwiGLU; what joins both results reads them and writes their sum
            moved += 3 * T * shared * self.item + 3 * self.rows * H * self.item
            if logits := shared_logits(model):
                products.append(Product(self.rows, H, logits))
        if parallel.ep > 1 and local > 1:
            moved += 4 * computed * H * self.item  # from ranks' order to experts', and back
        found = self._of(products, moved)
        if self.program.one_hot_dispatch:
            found += self._one_hot(R / self.mp)
        return Pass(found.forward, found.backward, Seconds(memory_bound=self.rates.streamed(norm)))

    def _one_hot(self, slots: float) -> Pass:
        """Products of [T, E * C] with tokens, and of its weighted form with rows; the first has no
        gradient of the mask.
        """
        H, T = self.model.hidden_size, self.rows
        dispatch, combine = Product(slots, T, H), Product(T, slots, H)
        forward = self._product(dispatch) + self._product(combine)
        backward = self._product(Product(T, slots, H))
        backward += sum(map(self._product, _gradients([combine])))
        mask = T * slots * FLOAT
        return Pass(
            Seconds(matmul=forward, memory_bound=self.rates.streamed(MASKS_FORWARD * mask)),
            Seconds(matmul=backward, memory_bound=self.rates.streamed(MASKS_BACKWARD * mask)),
        )

    def _of(self, products: list[Product], moved: float) -> Pass:
        forward = sum(self._product(each) for each in products)
        backward = sum(map(self._product, _gradients(products)))
        streamed = self.rates.streamed(moved)
        return Pass(
            Seconds(matmul=forward, memory_bound=streamed),
            Seconds(matmul=backward, memory_bound=2 * streamed),
        )

    def _product(self, product: Product) -> float:
        m, k, n = product.m, product.k, product.n
        moved = (m * k + k * n + m * n) * product.count * self.item
        dtype = product.dtype or self.run.training.dtype
        return self.rates.product(product.flops, moved, min(m, k, n), dtype)


def _gradients(products: list[Product]) -> Iterator[Product]:
    """Of each product those of its input and of its weight."""
    for each in products:
        yield Product(each.m, each.n, each.k, each.count, each.dtype)
        yield Product(each.k, each.m, each.n, each.count, each.dtype)


def accumulated_bytes(elements: float) -> float:
    """What adding gradients to their sums reads and writes, in float32."""
    return 3 * FLOAT * elements


def update_bytes(elements: float, device: str, micro_batches: int) -> float:
    """What AdamW reads and writes, in float32: gradient, two means, weight, the last three twice.
    The operators of a CPU also read each gradient for the norm; and they set the sums of several
    micro-batches to zero, from a tensor of zeros.

    Args:
        elements: that are updated.
        device: of the hardware.
        micro_batches: of an update.
    """
    times = 7
    if device == "CPU":
        times += 1 if micro_batches == 1 else 3
    return times * FLOAT * elements


def update_seconds(elements: float, run: RunConfig, hardware: Hardware) -> float:
    """How long AdamW takes for a card's shard of the weights.

    In host memory it goes at the memory's bandwidth, which all cards of the node share, after the
    gradients came and before the weights go.

    Args:
        elements: whose optimizer state the card has.
        run: says where that lies.
        hardware: the cluster.
    """
    training = run.training
    moved = update_bytes(elements, hardware.device, training.gradient_accumulation_steps)
    if training.offload_optimizer == "none":
        return hardware.compute.passed(moved)
    host, cards = hardware.host, min(hardware.devices_per_node, run.parallel.world)
    travelling = 2 * FLOAT * elements / (host.gb_per_s * GIGA)
    return travelling + moved * cards / (host.memory_gb_per_s * GIGA)
