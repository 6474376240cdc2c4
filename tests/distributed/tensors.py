"""Tensor-parallel layers and the bare collectives, run in the workers."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from distributed.worker import Worker
from mindspore import Tensor, nn

from mistral_ms.config import ModelConfig, ParallelConfig
from mistral_ms.layers import Attention, FeedForward, output_logits
from mistral_ms.layers.linear import Linear
from mistral_ms.parallel.collectives import Collectives, Groups
from mistral_ms.parallel.tensor import (
    ColumnLinear,
    NormForShares,
    RowLinear,
    VocabularyEmbedding,
    VocabularyNLL,
    share_of_model,
)
from mistral_ms.parallel.topology import GroupKind, Topology, weight_slice
from mistral_ms.weights import specs

MODES = {2: ("pynative", "graph"), 4: ("pynative",)}
"""By number of processes: one compilation shows that the layers compile."""
B, S, EPS = 2, 5, 1e-5
CONFIG = ModelConfig(
    vocab_size=24,
    hidden_size=16,
    intermediate_size=12,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=4,
)
WEIGHTS = {spec.name.removeprefix("layers.0."): spec for spec in specs(CONFIG)}
"""By their names in :class:`Divided`."""


def whole_weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    shapes = {name: spec.shape for name, spec in WEIGHTS.items()}
    drawn = {n: rng.normal(size=s) / np.sqrt(s[-1]) for n, s in shapes.items()}
    return {n: (w + (w.ndim == 1)).astype(np.float32) for n, w in drawn.items()}


def inputs() -> tuple[np.ndarray, np.ndarray]:
    """Ids and labels [B * S], some of them ignored; the first and last token of the vocabulary."""
    rng = np.random.default_rng(4)
    ids, labels = rng.integers(0, 24, (2, B * S)).astype(np.int32)
    ids[:2], labels[:2], labels[3] = (0, 23), (0, 23), -100
    return ids, labels


def context() -> tuple[Tensor, ...]:
    """Rotary rows, who sees whom (causal), no cache."""
    rng = np.random.default_rng(5)
    angles = rng.random((B, S, 1, 2)).astype(np.float32)
    visible = np.broadcast_to(np.tri(S, dtype=bool), (B, 1, S, S))
    rows = np.zeros(1, np.int32)
    return tuple(Tensor(a) for a in (np.cos(angles), np.sin(angles), visible, rows))


class Divided(nn.Cell):
    """Embedding, one dense block, norm, head and loss of one tensor-parallel rank."""

    def __init__(self, tensor: Collectives, parallel: ParallelConfig) -> None:
        super().__init__()
        share, H = share_of_model(CONFIG, parallel), CONFIG.hidden_size
        self.embed_tokens = VocabularyEmbedding(CONFIG.vocab_size, H, tensor)
        self.input_layernorm = NormForShares(H, EPS, tensor)
        self.attention = Attention(share)
        self.attention.o_proj = RowLinear(H, H, tensor)
        self.post_attention_layernorm = NormForShares(H, EPS, tensor)
        self.feed_forward = FeedForward(share)
        self.feed_forward.w2 = RowLinear(CONFIG.intermediate_size, H, tensor)
        self.norm = NormForShares(H, EPS, tensor)
        self.lm_head = Linear(H, CONFIG.vocab_size // tensor.size)
        self.nll = VocabularyNLL(tensor, CONFIG.vocab_size)

    def construct(self, ids_T, labels_T, cos, sin, visible, rows):
        embedded = self.embed_tokens(ids_T)
        x_TH = embedded + self.attention(self.input_layernorm(embedded), (cos, sin, visible, rows))
        x_TH = x_TH + self.feed_forward(self.post_attention_layernorm(x_TH))
        logits = output_logits(self.norm(x_TH), self.lm_head.weight)
        nll_T, mask_T = self.nll(logits, labels_T)
        return nll_T.sum() / mask_T.sum(), nll_T, mask_T, embedded


class Pair(nn.Cell):
    """A column-parallel map and a row-parallel one after it."""

    def __init__(self, tensor: Collectives) -> None:
        super().__init__()
        self.first, self.second = ColumnLinear(16, 12, tensor), RowLinear(12, 8, tensor)

    def construct(self, x_TI, dout_TO):
        y_TO = self.second(self.first(x_TI))
        return (y_TO * dout_TO).sum(), y_TO


def run_tensor(worker: Worker) -> None:
    parallel = ParallelConfig(mp=worker.world)
    topology = Topology.of(parallel)
    tensor = Groups(topology, worker.rank, "CPU").of(GroupKind.TENSOR)
    net = Divided(tensor, parallel)
    whole = whole_weights()
    for name, parameter in net.parameters_and_names():
        cut = weight_slice(WEIGHTS[name], topology, worker.rank)
        parameter.set_data(Tensor(np.ascontiguousarray(whole[name][cut])))
    given = (*(Tensor(a) for a in inputs()), *context())
    for mode in MODES[worker.world]:
        worker.mode(mode)
        names = [n for n, _ in net.parameters_and_names()]
        gradient = ms.value_and_grad(net, None, net.trainable_params(), has_aux=True)
        values, gradients = gradient(*given)
        found = dict(zip(("loss", "nll", "mask", "embedded"), values, strict=True))
        for name, value in {**found, **dict(zip(names, gradients, strict=True))}.items():
            worker.keep(f"tensor/{mode}/{name}", value)
    worker.mode("pynative")
    run_pair(worker, tensor, topology)


def pair_data() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(8)
    shapes = {"x": (5, 16), "first": (12, 16), "second": (8, 12), "dout": (5, 8)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def run_pair(worker: Worker, tensor: Collectives, topology: Topology) -> None:
    data, pair, part = pair_data(), Pair(tensor), 12 // worker.world
    held = slice(worker.rank * part, (worker.rank + 1) * part)
    pair.first.weight.set_data(Tensor(data["first"][held]))
    pair.second.weight.set_data(Tensor(np.ascontiguousarray(data["second"][:, held])))
    gradient = ms.value_and_grad(pair, 0, pair.trainable_params(), has_aux=True)
    values, (dx, by_weight) = gradient(Tensor(data["x"]), Tensor(data["dout"]))
    for name, value in zip(
        ("y", "dx", "first", "second"), (values[1], dx, *by_weight), strict=True
    ):
        worker.keep(f"pair/{name}", value)
