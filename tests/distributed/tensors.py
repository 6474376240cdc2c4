"""Tensor-parallel layers, run in the workers. Graphs of them: training.py."""

from __future__ import annotations

import mindspore as ms
import numpy as np
from distributed.worker import Worker
from mindspore import Tensor, nn

from mistral_ms.config import DROPLESS, ModelConfig, ParallelConfig
from mistral_ms.layers import VocabParallelCrossEntropy, output_logits
from mistral_ms.models import LayerFactory
from mistral_ms.parallel.collectives import Groups
from mistral_ms.parallel.layer_factory import ParallelLayerFactory
from mistral_ms.parallel.topology import GroupKind, Topology, weight_slice
from mistral_ms.weights import specs

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
"""By their names in :class:`Block`."""


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
    """Rotary rows, who sees whom (causal)."""
    rng = np.random.default_rng(5)
    angles = rng.random((B, S, 1, 2)).astype(np.float32)
    visible = np.broadcast_to(np.tri(S, dtype=bool), (B, 1, S, S))
    return tuple(Tensor(a) for a in (np.cos(angles), np.sin(angles), visible))


class Block(nn.Cell):
    """Embedding, one dense block, norm, head and loss, of pieces of one device or of a rank."""

    def __init__(self, layer_factory: LayerFactory, nll: nn.Cell) -> None:
        super().__init__()
        self.embed_tokens = layer_factory.embedding()
        self.input_layernorm, self.post_attention_layernorm = (
            layer_factory.norm(),
            layer_factory.norm(),
        )
        self.attention, self.feed_forward = layer_factory.attention(0), layer_factory.feed_forward()
        self.norm, self.lm_head, self.nll = layer_factory.norm(), layer_factory.head(), nll

    def construct(self, ids_T, labels_T, cos, sin, visible):
        context = cos, sin, visible, None, None
        embedded = self.embed_tokens(ids_T)
        x_TH = embedded + self.attention(self.input_layernorm(embedded), context)
        x_TH = x_TH + self.feed_forward(self.post_attention_layernorm(x_TH))
        logits = output_logits(self.norm(x_TH), self.lm_head.weight)
        nll_T, mask_T = self.nll(logits, labels_T)
        return nll_T.sum() / mask_T.sum(), nll_T, mask_T, embedded, logits


def run_tensor(worker: Worker) -> None:
    parallel = ParallelConfig(mp=worker.world)
    topology = Topology.of(parallel)
    groups = Groups(topology, worker.rank, "CPU")
    nll = VocabParallelCrossEntropy(groups.of(GroupKind.TENSOR), CONFIG.vocab_size)
    net = Block(ParallelLayerFactory(CONFIG, DROPLESS, parallel, groups), nll)
    whole = whole_weights()
    for name, parameter in net.parameters_and_names():
        cut = weight_slice(WEIGHTS[name], topology, worker.rank)
        parameter.set_data(Tensor(np.ascontiguousarray(whole[name][cut])))
    given = (*(Tensor(a) for a in inputs()), *context())
    names = [n for n, _ in net.parameters_and_names()]
    gradient = ms.value_and_grad(net, None, net.trainable_params(), has_aux=True)
    values, gradients = gradient(*given)
    found = dict(zip(("loss", "nll", "mask", "embedded"), values[:4], strict=True))
    for name, value in {**found, **dict(zip(names, gradients, strict=True))}.items():
        worker.keep(f"tensor/{name}", value)
