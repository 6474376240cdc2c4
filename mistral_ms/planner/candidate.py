"""A layout of a training on a cluster, judged."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mistral_ms.config import RunConfig
from mistral_ms.parallel.memory import GIB
from mistral_ms.planner.load import Balance
from mistral_ms.planner.memory import CardMemory, Execution
from mistral_ms.planner.step import StepSeconds


@dataclass(frozen=True)
class Candidate:
    """A layout of a training on a cluster.

    Attributes:
        run: the training in this layout, as ``train`` takes it.
        memory: of the fullest card.
        fits: whether that is there, on the cards and in host memory.
        step: how long a step takes; None of a layout that does not fit.
        balance: of the experts.
        usable_gib: of a card, for a training.
        execution: who divides it.
    """

    run: RunConfig
    memory: CardMemory
    fits: bool
    step: StepSeconds | None
    balance: Balance
    usable_gib: float
    execution: Execution

    @property
    def tokens_per_s_per_card(self) -> float:
        """Throughput; 0 of a layout that does not fit."""
        if self.step is None:
            return 0.0
        training = self.run.training
        tokens = training.global_batch_size * training.seq_length
        return tokens / self.step.seconds / self.run.parallel.world

    @property
    def breakdown(self) -> dict[str, float]:
        """Seconds of a step by what they are spent on; none of a layout that does not fit."""
        return {} if self.step is None else self.step.breakdown

    def values(self) -> dict[str, Any]:
        """As JSON has it."""
        parallel, training = self.run.parallel, self.run.training
        return {
            "dp": parallel.dp,
            "mp": parallel.mp,
            "pp": parallel.pp,
            "ep": parallel.ep,
            "pp_interleave_num": parallel.pp_interleave_num,
            "execution": self.execution,
            "micro_batches": training.gradient_accumulation_steps,
            "offload": training.offload_optimizer,
            "recompute": parallel.recompute,
            "optimizer_parallel": parallel.optimizer_parallel,
            "all_to_all": parallel.all_to_all,
            "group_wise_a2a": parallel.group_wise_a2a,
            "dispatch": None if self.run.model.moe is None else self.run.routing.policy,
            "memory_gib": round(self.memory.gib, 2),
            "memory": {name: round(part / GIB, 3) for name, part in self.memory.parts.items()},
            "host_memory_gib": round(self.memory.host_optimizer / GIB, 2),
            "stage": self.memory.stage,
            "fits": self.fits,
            "tokens_per_s_per_card": round(self.tokens_per_s_per_card, 1),
            "step_seconds": None if self.step is None else round(self.step.seconds, 4),
            "dropped": round(self.balance.dropped, 4),
            "breakdown": {name: round(part, 4) for name, part in self.breakdown.items()},
        }
