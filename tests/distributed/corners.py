"""Batches that are nearly empty, or whose tokens all want the same experts; run in the workers."""

from __future__ import annotations

import numpy as np
from distributed.training import model, routing, training
from distributed.worker import Worker

from mistral_ms.config import IGNORE_INDEX, ParallelConfig
from mistral_ms.datasets.batches import Batch
from mistral_ms.models import CausalLM
from mistral_ms.parallel.apply import Division
from mistral_ms.training import StepResult, TrainStep

STEPS = 3
LAYOUT = ParallelConfig(dp=2, ep=2)
VARIANTS = ("plain", "dropless")


def batches() -> dict[str, Batch]:
    """Of 16 windows of 8 tokens; the second rank sees the last eight windows."""
    ids = np.random.default_rng(5).integers(3, 48, (16, 8)).astype(np.int32)
    only_first = np.zeros((16, 8), bool)
    only_first[:8] = True
    one_each = np.zeros((16, 8), bool)
    one_each[[0, 8], 0] = True
    every = np.ones((16, 8), bool)
    return {
        "one rank sees padding only": _batch(ids, only_first),
        "one token a rank": _batch(ids, one_each),
        # equal tokens that see equal tokens have equal states, so all choose the same experts
        "all tokens to the same experts": _batch(np.full_like(ids, 7), every),
    }


def _batch(ids_BS: np.ndarray, present_BS: np.ndarray) -> Batch:
    labels_BS = np.where(present_BS, np.roll(ids_BS, -1, 1), IGNORE_INDEX).astype(np.int32)
    positions_BS = np.where(present_BS, np.arange(8), -1).astype(np.int32)
    segments_BS = np.where(present_BS, 0, -1).astype(np.int32)
    return Batch(ids_BS, labels_BS, positions_BS, segments_BS, np.arange(16, dtype=np.int32))


def steps(variant: str, division: Division | None) -> tuple[dict[str, list[StepResult]], CausalLM]:
    """A few steps with each batch, one batch after the other, since compiling takes longer than all
    of them; in one process with two micro-batches.
    """
    config = training("plain", 1 if division else LAYOUT.dp)
    if division is None:
        part = CausalLM(model("corners"), routing(variant))
        part.initialize(0)
    else:
        part = division.build_model(model("corners"), routing(variant))
        division.initialize(part, 0)
    update = TrainStep(part, config, pooled_aux=False, division=division)
    return {name: [update(batch) for _ in range(STEPS)] for name, batch in batches().items()}, part


def run_corners(worker: Worker) -> None:
    worker.mode("graph")
    for variant in VARIANTS:
        corners, part = steps(variant, Division(LAYOUT, worker.rank, worker.world))
        for name, results in corners.items():
            for figure in ("loss", "aux_loss", "grad_norm", "routed_LE", "kept_LE"):
                values = np.array([getattr(r, figure) for r in results])
                worker.keep(f"corners/{name}/{variant}/{figure}", values)
        for path, weight in part.weights().items():
            worker.keep(f"corners/{variant}/weights/{path}", weight.asnumpy())
    worker.mode("pynative")
