"""How long a training step takes on a cluster, and what it is spent on.

What a micro-batch needs on each stage is a sum over its layers; the pipeline is simulated; what
comes after it (reduction of gradients, update, weights put together) is added for the stage that
ends last.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mistral_ms.config import RunConfig
from mistral_ms.config.layout import Sizes
from mistral_ms.parallel.memory import FLOAT
from mistral_ms.parallel.pipeline import Stage
from mistral_ms.parallel.topology import GroupKind, shard_shape
from mistral_ms.planner.hardware import Hardware
from mistral_ms.planner.load import EVEN, Balance
from mistral_ms.planner.memory import Execution
from mistral_ms.planner.network import seconds, transfer_seconds
from mistral_ms.planner.program import OURS, Program, gathered
from mistral_ms.planner.simulation import Timeline, simulate
from mistral_ms.planner.spent import Part, Spent
from mistral_ms.planner.traffic import (
    Message,
    gradient_messages,
    layer_messages,
    stage_transfer,
    weight_messages,
)
from mistral_ms.planner.work import Pass, Work, accumulated_bytes, update_seconds
from mistral_ms.weights import ParamSpec


@dataclass(frozen=True)
class StageSeconds:
    """Seconds of a stage for one micro-batch, by what they are spent on.

    Attributes:
        number: of the stage.
        forward: of its forward pass.
        backward: of its gradient, what is computed again included.
        parts: of both together.
        layers: the reduction of gradients: seconds of each layer's, the last layer first.
        gather: seconds of putting weights together, once a step.
    """

    number: int
    forward: float
    backward: float
    parts: dict[str, float]
    layers: tuple[float, ...]
    gather: float

    @property
    def total(self) -> float:
        """Of a micro-batch."""
        return self.forward + self.backward

    @classmethod
    def of(cls, chunks: Sequence[StageSeconds]) -> StageSeconds:
        """A stage of several runs of layers, from those of each, in the order of the model."""
        first = chunks[0]
        if len(chunks) == 1:
            return first
        return cls(
            number=first.number,
            forward=sum(each.forward for each in chunks),
            backward=sum(each.backward for each in chunks),
            parts={name: sum(each.parts[name] for each in chunks) for name in first.parts},
            layers=tuple(layer for each in reversed(chunks) for layer in each.layers),
            gather=sum(each.gather for each in chunks),
        )


@dataclass(frozen=True)
class StepSeconds:
    """A training step.

    Attributes:
        seconds: of it.
        breakdown: seconds of the slowest stage by what they are spent on; they add up.
        slowest: the number of that stage.
        stages: all of them.
        timeline: of the pipeline; None where it was only estimated.
    """

    seconds: float
    breakdown: dict[str, float]
    slowest: int
    stages: tuple[StageSeconds, ...]
    timeline: Timeline | None = field(default=None, repr=False, compare=False)

    @property
    def bubble_fraction(self) -> float:
        """Share of the step in which the slowest stage waits for others."""
        return self.breakdown["bubble"] / self.seconds

    @property
    def critical(self) -> str:
        """What the step's length is made of, in words."""
        if self.timeline is None or len(self.stages) == 1:
            return "one stage, whose operations follow each other"
        runs: list[tuple[int, int]] = []  # stage, and how many of its passes follow each other
        for event in self.timeline.critical_path:
            if runs and runs[-1][0] == event.stage:
                runs[-1] = event.stage, runs[-1][1] + 1
            else:
                runs.append((event.stage, 1))
        longest = max(runs, key=lambda run: run[1])
        before = runs.index(longest)
        after = len(runs) - before - 1
        return (
            f"filling the pipeline (changes of stage: {before}), then {longest[1]} passes of stage "
            f"{longest[0]} without a pause, then emptying it (changes of stage: {after})"
        )


Elements = Mapping[int | str, tuple[int, int]]
"""Of each module of a model: elements of a card's part of its weights that data-parallel ranks have
alike, and elements of experts."""


def elements(weights: Iterable[ParamSpec], sizes: Sizes) -> Elements:
    """What a card holds of each module.

    Args:
        weights: of the whole model.
        sizes: of the layout.
    """
    found: dict[int | str, tuple[int, int]] = {}
    alike: dict[tuple[str, tuple[int, ...]], int] = {}
    for spec in weights:
        if spec.kind != "trained":
            continue
        key = spec.pattern, spec.shape
        if key not in alike:
            alike[key] = math.prod(shard_shape(spec, sizes))
        dense, experts = found.get(spec.module, (0, 0))
        if spec.stacked:
            experts += alike[key]
        else:
            dense += alike[key]
        found[spec.module] = dense, experts
    return found


class StepModel:
    """The time of a training's step, its stages divided once.

    Args:
        run: the training.
        hardware: the cluster.
        execution: who divides it.
        parts: runs of layers in the order of the model: of each stage one, or as many as
            ``pp_interleave_num`` says.
        held: what a card holds of each module, see :func:`elements`.
        balance: of the experts.
        program: whose sparse layers they are.
        slowdown: another one than the hardware's.
    """

    def __init__(
        self,
        run: RunConfig,
        hardware: Hardware,
        execution: Execution,
        parts: Sequence[Stage],
        held: Elements,
        balance: Balance = EVEN,
        program: Program = OURS,
        slowdown: float | None = None,
    ) -> None:
        self.run, self.hardware, self.execution = run, hardware, execution
        self.sizes = run.parallel.sizes
        self.work = Work(run, hardware, execution, balance, program)
        self.balance, self.program = balance, program
        self.slowdown = hardware.compute.slowdown if slowdown is None else slowdown
        self.held = held
        sparse = set(run.model.sparse_layers)
        self.sparse = [layer in sparse for layer in range(run.model.num_hidden_layers)]
        self.windows = [run.model.window_of(n) for n in range(run.model.num_hidden_layers)]
        self._parts: dict[tuple[bool, int | None], Part] = {}
        self._once: dict[tuple[int, int], tuple[float, float]] = {}
        self.parts = tuple(map(self._stage, parts))
        pp = run.parallel.pp
        self.stages = tuple(StageSeconds.of(self.parts[number::pp]) for number in range(pp))

    def step(
        self,
        owned: Sequence[int],
        *,
        simulated: bool = True,
    ) -> StepSeconds:
        """A step.

        Args:
            owned: elements whose optimizer state a card of each stage has.
            simulated: or else estimated, for a first choice among many: as if all stages had to
                wait for the slowest one.
        """
        parallel, stages = self.run.parallel, self.stages
        m, chunks = self.run.training.gradient_accumulation_steps, parallel.pp_interleave_num
        nbytes = stage_transfer(self.run, self.execution)
        hops = [
            transfer_seconds(nbytes, number, self.sizes, self.hardware)
            for number in range(len(stages) - 1)
        ]
        if chunks > 1:  # the last stage's chunk goes on at the first stage
            hops.append(max(hops))
        meetings = [m * each for each in self._meetings(hops)]
        timeline = None
        if simulated:
            timeline = simulate(
                parallel.pipeline_scheduler,
                m,
                [part.forward for part in self.parts],
                [part.backward for part in self.parts],
                hops,
                chunks,
                meetings=self.execution == "explicit",
                alone=self.hardware.compute.alone,
            )
            length, ends = timeline.length, [row[-1].end for row in timeline.rows]
        else:
            filling = sum(s.total for s in stages) - max(s.total for s in stages)
            busy = max(m * s.total + met for s, met in zip(stages, meetings, strict=True))
            length = (filling / chunks) + busy + 2 * sum(hops)
            ends = [length] * len(stages)
        after = [self._reduced(s, end) for s, end in zip(stages, ends, strict=True)]
        # clipping needs the norm of all gradients: no stage updates before the last one is done
        done = max(after)
        updates = [update_seconds(own, self.run, self.hardware) * self.slowdown for own in owned]
        norm = seconds(Message("AllReduce", GroupKind.WORLD, FLOAT), self.sizes, self.hardware)
        gather = max(s.gather for s in stages)
        total = gather + done + norm + max(updates)
        chosen = max(stages, key=lambda stage: m * stage.total + meetings[stage.number])
        busy, faster = m * chosen.total, 1.0
        if timeline is not None and self.hardware.compute.alone is not None:
            # while others wait a stage is faster than among all
            faster = timeline.busy(chosen.number) / busy
        parts = {name: value * m * faster for name, value in chosen.parts.items()}
        parts["transfers"] = meetings[chosen.number]
        parts["bubble"] = length - busy * faster - meetings[chosen.number]
        parts["gradient_reduction"] = done - length
        parts["weights_gather"] = gather
        parts["gradient_norm"] = norm
        parts["optimizer"] = max(updates)
        return StepSeconds(total, parts, chosen.number, stages, timeline)

    def _meetings(self, hops: Sequence[float]) -> list[float]:
        """Seconds of a micro-batch's messages in which each stage takes part and does nothing else:
        of the graph none. Each chunk's states and their gradient pass each of its boundaries.
        """
        pp, chunks = self.run.parallel.pp, self.run.parallel.pp_interleave_num
        found = [0.0] * pp
        if self.execution == "explicit":
            for number, hop in enumerate(hops):
                times = 2 * (chunks if number < pp - 1 else chunks - 1)
                for stage in (number, (number + 1) % pp):
                    found[stage] += times * hop
        return found

    def _stage(self, stage: Stage) -> StageSeconds:
        parallel = self.run.parallel
        explicit_pipeline = self.execution == "explicit" and parallel.pp > 1
        layers = [self._layer(layer) for layer in stage.layers]
        first = [self._end(self.work.embedding(), ("embedding", "tied"))] if stage.embedding else []
        last = [self._end(self.work.head(), ("head",))] if stage.head else []
        spent = Spent(self.slowdown)
        for part in (*first, *layers, *last):
            if explicit_pipeline:  # keeps the inputs of its stages alone and goes forward again
                again = not stage.head
            else:
                again = parallel.recompute == "full" and part.is_layer
            spent.add(
                part,
                again=again,
                selective=parallel.recompute == "selective"
                or (explicit_pipeline and parallel.recompute == "full"),
                overlapped=parallel.micro_batch_interleave_num > 1,
            )
        forward, backward = spent.forward, spent.backward
        if explicit_pipeline and stage.head:  # goes forward and backward at once
            forward, backward = 0.0, forward + backward
        once = [self._reduction_and_gather(part) for part in (*first, *layers, *last)]
        return StageSeconds(
            number=stage.number,
            forward=forward,
            backward=backward,
            parts=spent.parts,
            layers=tuple(reduction for reduction, _ in reversed(once)),
            gather=sum(gather for _, gather in once),
        )

    def _layer(self, layer: int) -> Part:
        key = self.sparse[layer], self.windows[layer]
        if key not in self._parts:
            sparse = self.sparse[layer]
            ahead = back = layer_messages(self.run, sparse=sparse, execution=self.execution)
            if sparse and self.program.gathers_for_each_matrix and self.sizes.mp > 1:
                ahead, back = (gathered(self.run, backward=b) for b in (False, True))
            dense, experts = self.held[layer]
            exchange = sum(map(self._seconds, (m for m in ahead if m.operator == "AlltoAll")))
            tensor, gradient = (
                sum(map(self._seconds, (m for m in messages if m.operator != "AlltoAll")))
                for messages in (ahead, back)
            )
            self._parts[key] = Part(
                self.work.layer(layer),
                all_to_all=exchange * self.balance.slowest,
                tensor=tensor,
                tensor_gradient=gradient,
                accumulate=self._accumulated(dense + experts),
                dense=dense,
                experts=experts,
                is_layer=True,
            )
        return self._parts[key]

    def _end(self, compute: Pass, modules: tuple[str, ...]) -> Part:
        dense = sum(self.held.get(module, (0, 0))[0] for module in modules)
        return Part(compute, accumulate=self._accumulated(dense), dense=dense)

    def _accumulated(self, elements: int) -> float:
        if self.run.training.gradient_accumulation_steps == 1:
            return 0.0
        return self.hardware.compute.passed(accumulated_bytes(elements))

    def _seconds(self, message: Message) -> float:
        hierarchical = self.run.parallel.all_to_all == "hierarchical"
        each = seconds(message, self.sizes, self.hardware, hierarchical=hierarchical)
        return each * message.count

    def _reduction_and_gather(self, part: Part) -> tuple[float, float]:
        """Seconds of what is done once a step with the weights of a part."""
        key = part.dense, part.experts
        if key not in self._once:
            self._once[key] = (
                sum(map(self._seconds, gradient_messages(self.run, *key))),
                sum(map(self._seconds, weight_messages(self.run, *key))),
            )
        return self._once[key]

    def _reduced(self, stage: StageSeconds, end: float) -> float:
        """When the gradients of a stage are reduced, whose last gradient ends at ``end``.

        In the graph each layer's are reduced while those of the layers before it are computed; on
        the explicit path all of them after the last one.
        """
        done = end
        if self.execution == "graph":
            start, count = end - stage.backward, len(stage.layers)
            done = start
            for number, each in enumerate(stage.layers, 1):
                ready = start + stage.backward * number / count
                done = max(done, ready) + each
            return max(done, end)
        return done + sum(stage.layers)
