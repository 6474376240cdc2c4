"""A model divided into stages, whose memory and time are asked for again and again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

from mistral_ms.config import RunConfig
from mistral_ms.parallel.memory import LayerMemory, fused_operators
from mistral_ms.parallel.pipeline import Stage, stages_of
from mistral_ms.planner.hardware import Hardware
from mistral_ms.planner.load import Balance
from mistral_ms.planner.memory import (
    CardMemory,
    Execution,
    Parameters,
    card_memory,
    layer_memories,
    parameters,
)
from mistral_ms.planner.program import OURS, Program
from mistral_ms.planner.step import Elements, StepModel, elements
from mistral_ms.weights import ParamSpec


class Division:
    """One division of the model: its stages and weights, counted once.

    Args:
        run: the training in this division.
        hardware: the cluster.
        execution: who divides it.
        weights: of the whole model.
        balance: of the experts, in a layout.
    """

    def __init__(
        self,
        run: RunConfig,
        hardware: Hardware,
        execution: Execution,
        weights: Sequence[ParamSpec],
        balance: Callable[[RunConfig], Balance],
    ) -> None:
        self.run, self.hardware, self.execution = run, hardware, execution
        self.weights, self.balance = weights, balance
        self.fused = fused_operators(hardware.device, run.training.dtype)
        pp = run.parallel.pp
        self.parts: tuple[Stage, ...] = stages_of(run.model, pp * run.parallel.pp_interleave_num)
        self.stages = tuple(self.parts[number::pp] for number in range(pp))
        self.counted: tuple[Parameters, ...] = tuple(
            parameters(run.model, run.parallel, held, weights, execution) for held in self.stages
        )

    @cached_property
    def held(self) -> Elements:
        """What a card holds of each module."""
        return elements(self.weights, self.run.parallel.sizes)

    @cached_property
    def owned(self) -> tuple[int, ...]:
        """Elements whose optimizer state a card of each stage has."""
        return tuple(each.owned for each in self.counted)

    def layers(self, run: RunConfig) -> tuple[LayerMemory, ...]:
        """What each layer keeps of a micro-batch."""
        return layer_memories(run, fused=self.fused)

    def memory(self, run: RunConfig, layers: tuple[LayerMemory, ...]) -> CardMemory:
        """Of the fullest card: on the first stage, the last, or one with the most weights."""
        most = max(range(len(self.stages)), key=lambda n: self.counted[n].held)
        buffers = int(self.hardware.communicator_mib * (1 << 20))
        found = [
            card_memory(
                run,
                self.stages[number],
                self.counted[number],
                layers,
                execution=self.execution,
                fused=self.fused,
                communicator_bytes=buffers,
            )
            for number in sorted({0, most, len(self.stages) - 1})
        ]
        return max(found, key=lambda memory: memory.total)

    def step_model(
        self, run: RunConfig, program: Program = OURS, slowdown: float | None = None
    ) -> StepModel:
        """The time of its step."""
        return StepModel(
            run,
            self.hardware,
            self.execution,
            self.parts,
            self.held,
            self.balance(run),
            program,
            slowdown,
        )
