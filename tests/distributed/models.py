"""A whole language model of divided pieces; run in the workers. Graphs: training.py."""

from __future__ import annotations

from dataclasses import replace

import mindspore as ms
import numpy as np
from distributed.worker import Worker
from mindspore import Tensor, nn
from support.configs import model as small_model
from support.models import next_labels, positions

from mistral_ms.config import DROPLESS, ParallelConfig
from mistral_ms.layers import VocabParallelCrossEntropy, output_logits
from mistral_ms.models import CausalLM
from mistral_ms.parallel.collectives import Groups
from mistral_ms.parallel.layer_factory import ParallelLayerFactory
from mistral_ms.parallel.topology import GroupKind, Topology, weight_slice
from mistral_ms.weights import by_name, init_values, specs

CONFIG = small_model(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=12,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    qk_norm="head",
    moe={
        "sparse_layers": (1,),
        "moe_intermediate_size": 8,
        "n_shared_experts": 2,
        "shared_expert_gate": "sigmoid",
        "extra_feed_forward": "both",
    },
)
LAYOUTS = {
    2: {
        "ep2": ParallelConfig(dp=2, ep=2),
        "mp2": ParallelConfig(mp=2, group_wise_a2a=True),
    },
    4: {
        "mp2ep2-flat": ParallelConfig(dp=2, mp=2, ep=2),
        "mp2ep2-group_wise": ParallelConfig(dp=2, mp=2, ep=2, group_wise_a2a=True),
        "ep2of4": ParallelConfig(dp=4, ep=2),
    },
}
ROWS, WIDTH = 4, 6


SPECS = by_name(specs(CONFIG))


def weights() -> dict[str, np.ndarray]:
    return {name: init_values(replace(spec, std=0.3), 1) for name, spec in SPECS.items()}


def windows() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, labels and positions of the global batch, ragged."""
    ids = np.random.default_rng(2).integers(0, 32, (ROWS, WIDTH)).astype(np.int32)
    position_ids = positions([6, 4, 5, 6], WIDTH)
    return ids, next_labels(ids, position_ids), position_ids


class SumLoss(nn.Cell):
    """Summed negative log-likelihood of this rank's windows."""

    def __init__(self, model: CausalLM, nll: nn.Cell) -> None:
        super().__init__()
        self.model, self.nll = model, nll

    def construct(self, ids, labels, position_ids):
        hidden_TH, _ = self.model.hidden_states(ids, position_ids)
        logits = output_logits(hidden_TH, self.model.head_weight())
        return self.nll(logits, labels.reshape(-1))[0].sum()


def run_models(worker: Worker) -> None:
    for name, parallel in LAYOUTS[worker.world].items():
        topology = Topology.of(parallel, worker.world)
        groups = Groups(topology, worker.rank, "CPU")
        layer_factory = ParallelLayerFactory(CONFIG, DROPLESS, parallel, groups)
        model = CausalLM(CONFIG, positions=WIDTH, layer_factory=layer_factory)
        held = model.weights()
        for path, whole in weights().items():
            cut = weight_slice(SPECS[path], topology, worker.rank)
            held[path].set_data(Tensor(np.ascontiguousarray(whole[cut])))
        rows = ROWS // parallel.dp
        mine = slice(groups.coords.dp * rows, (groups.coords.dp + 1) * rows)
        given = [Tensor(array[mine]) for array in windows()]
        net = SumLoss(
            model, VocabParallelCrossEntropy(groups.of(GroupKind.TENSOR), CONFIG.vocab_size)
        )
        paths, parameters = list(held), list(held.values())
        loss, gradients = ms.value_and_grad(net, None, parameters)(*given)
        worker.keep(f"model/{name}/loss", loss)
        for path, gradient in zip(paths, gradients, strict=True):
            worker.keep(f"model/{name}/{path}", gradient)
