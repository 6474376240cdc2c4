"""Why the auto-parallel graph does not say the same as the explicit path: every reason, with the
arithmetic of what each side says instead.

Not a test. Nothing here looks at what was counted: layouts and sizes alone decide.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

from dryrun.rehearsal import Said
from dryrun.small_runs import FLOAT, HALF, KEYS, QUERIES, WIDE, C, E, H, S, V, layers_of, small_run

from mistral_ms.config import ModelConfig, ParallelConfig
from mistral_ms.parallel.topology import GroupKind, Topology, owners
from mistral_ms.weights import specs

FORWARD, BACKWARD, RECOMPUTE, UPDATE = "forward", "backward", "recompute", "optimizer"
STATES = S * H * HALF  # of a rank's micro-batch: one window


@dataclass(frozen=True)
class Difference:
    """One reason.

    Attributes:
        reason: a sentence.
        graph: what the graph says instead.
        explicit: what the explicit path says instead.
    """

    reason: str
    graph: Counter[Said] = field(default_factory=Counter)
    explicit: Counter[Said] = field(default_factory=Counter)


@dataclass(frozen=True)
class Weight:
    """A rank's part of a weight, as the explicit path holds it, and what the graph does instead.

    Attributes:
        shape: of the part.
        whole_in_graph: the shape that the graph holds, where that is another one.
        kind: of the group that adds its gradient up.
        copied_in_graph: whether the graph has it whole on tensor-parallel ranks.
        rounded: whether the graph rounds it to half first of all, so that half of it is gathered.
    """

    shape: tuple[int, ...]
    kind: GroupKind = GroupKind.DATA
    whole_in_graph: tuple[int, ...] | None = None
    copied_in_graph: bool = False
    rounded: bool = True


class Expected:
    """The differences of one rank of one small run.

    Args:
        parallel: its layout.
        rank: which.
        micro: micro-batches.
        tied: whether the embedding is the head, too.
    """

    def __init__(
        self, parallel: dict[str, object], rank: int, micro: int, tied: bool = False
    ) -> None:
        self.config = ParallelConfig(**parallel)
        self.topology = Topology.of(self.config)
        self.rank, self.micro = rank, micro
        self.stage = self.topology.coords(rank).pp
        self.last = self.stage == self.config.pp - 1
        self.model, self.tied = ModelConfig(**small_run(parallel, tied=tied)["model"]), tied
        layers = layers_of(parallel)
        self.layers = layers // self.config.pp  # of the stage
        # total, lm, aux, z; choices and kept choices of all layers
        self.report = (4 + 2 * layers * E) * FLOAT

    def ranks(self, kind: GroupKind) -> tuple[int, ...]:
        """The rank's group of a kind."""
        return self.topology.group(kind, self.rank).ranks

    def said(self, operator: str, phase: str, kind: GroupKind, size: int) -> Said:
        """One operator in the rank's group of a kind."""
        return Said(operator, phase, self.ranks(kind), size)

    @cached_property
    def weights(self) -> dict[str, Weight]:
        """Of the rank's stage, by the names of checkpoints."""
        mp, ep = self.config.mp, self.config.ep
        here = self.layers
        found = {}
        norm = Weight((H,), copied_in_graph=True)
        if self.stage == 0:
            found["embed_tokens.weight"] = self._vocabulary(rounded=False)
        for layer in range(self.stage * here, (self.stage + 1) * here):
            at = f"layers.{layer}."
            found[f"{at}input_layernorm.weight"] = norm
            found[f"{at}attention.q_proj.weight"] = Weight((QUERIES // mp, H))
            found[f"{at}attention.k_proj.weight"] = Weight((KEYS // mp, H))
            found[f"{at}attention.v_proj.weight"] = Weight((KEYS // mp, H))
            found[f"{at}attention.o_proj.weight"] = Weight((H, QUERIES // mp))
            found[f"{at}post_attention_layernorm.weight"] = norm
            found[f"{at}moe.router.weight"] = Weight((E, H), copied_in_graph=True, rounded=False)
            for matrix in ("w1", "w3", "w2"):
                shape = (E // ep, H, WIDE // mp)
                found[f"{at}moe.experts.{matrix}"] = Weight(shape, GroupKind.EXPERT_DATA)
        if self.last:
            found["norm.weight"] = norm
        if self.last and not self.tied:
            found["lm_head.weight"] = self._vocabulary(rounded=True)
        return found

    @property
    def has_copy(self) -> bool:
        """Whether this stage holds a tied embedding on the explicit path alone."""
        return self.tied and self.stage > 0 and self.last

    def _vocabulary(self, rounded: bool) -> Weight:
        rows = V // self.config.mp
        return Weight((rows, H), GroupKind.DATA, (V, H), True, rounded)

    def all(self) -> list[Difference]:
        """Every reason that this layout has."""
        found = [self.norm(), self.losses()]
        found.append(self.shares() if self.config.optimizer_parallel else self.gradients())
        if self.config.pp > 1 and self.last and self.config.recompute == "full":
            found.append(self.last_stage())
        if self.has_copy or (self.tied and self.stage == 0 and not self.last):
            found.append(self.tied_ends())
        if self.config.mp > 1:
            found += [self.sequence(), self.vocabulary()]
            if self.config.pp > 1:
                found.append(self.messages())
            if self.config.group_wise_a2a:
                found.append(self.sharded_rows())
        return found

    def norm(self) -> Difference:
        """Of the gradients."""
        rows = (len(self.weights) + self.has_copy + 1) * FLOAT
        explicit = Counter({self.said("AllReduce", UPDATE, GroupKind.STAGE, rows): 1})
        if self.config.pp > 1:
            explicit[self.said("AllReduce", UPDATE, GroupKind.PIPELINE, 2 * FLOAT)] += 1
        return Difference(
            "The graph adds up one number over all ranks; the explicit path each weight's, which "
            "it reports, and the loss, which decides whether to update.",
            Counter({self.said("AllReduce", UPDATE, GroupKind.WORLD, FLOAT): 1}),
            explicit,
        )

    def losses(self) -> Difference:
        """What a step reports."""
        layers, metrics = self.layers, (2 + 2 * E) * FLOAT
        graph = Counter({self.said("AllReduce", BACKWARD, GroupKind.STAGE, metrics): layers})
        graph[self.said("AllReduce", BACKWARD, GroupKind.STAGE, 2 * FLOAT)] += layers
        if self.last:
            graph[self.said("AllReduce", BACKWARD, GroupKind.STAGE, FLOAT)] += 1
            graph[self.said("AllReduce", FORWARD, GroupKind.STAGE, FLOAT)] += self.micro
            if self.micro > 1:  # of a single one the compiler knows the sum beforehand
                graph[self.said("AllReduce", BACKWARD, GroupKind.STAGE, FLOAT)] += self.micro
        explicit = Counter({self.said("AllReduce", UPDATE, GroupKind.DATA, self.report): 1})
        if self.config.pp > 1:
            explicit[self.said("AllReduce", UPDATE, GroupKind.PIPELINE, self.report)] += 1
        return Difference(
            "The graph adds its loss up on the last stage, for each micro-batch, and the start of "
            "its gradient, and once a step the metrics of each layer and the loss again, as "
            "gradients of the buffers in which they are recorded; the explicit path all losses and "
            "expert loads together, once a step.",
            graph,
            explicit,
        )

    def gradients(self) -> Difference:
        """Added up."""
        graph, sums = Counter(), Counter()
        for weight in self.weights.values():
            sums[weight.kind] += math.prod(weight.shape) * FLOAT
            kind = weight.kind
            if weight.copied_in_graph and self.config.mp > 1:
                kind = GroupKind.STAGE
            size = math.prod(weight.whole_in_graph or weight.shape) * FLOAT
            if len(self.ranks(kind)) > 1:
                graph[self.said("AllReduce", BACKWARD, kind, size)] += 1
        if self.has_copy:
            sums[GroupKind.DATA] += V * H * FLOAT
        explicit = Counter({
            self.said("AllReduce", BACKWARD, kind, size): 1
            for kind, size in sums.items()
            if len(self.ranks(kind)) > 1
        })  # fmt: skip
        return Difference(
            "The graph adds up each weight's gradient by itself, the explicit path all together in "
            "buffers of 64 MiB; where mp > 1 tensor-parallel ranks see different rows in the "
            "graph, so norms, router, and the undivided embedding and head add up over them too.",
            graph,
            explicit,
        )

    def shares(self) -> Difference:
        """Of the optimizer's state."""
        graph = Counter()
        for weight in self.weights.values():
            numbers, many = math.prod(weight.shape), len(self.ranks(weight.kind))
            item = HALF if weight.rounded else FLOAT
            graph[self.said("AllGather", FORWARD, weight.kind, numbers // many * item)] += 1
            graph[self.said("ReduceScatter", BACKWARD, weight.kind, numbers * FLOAT)] += 1
        here = [spec for spec in specs(self.model) if spec.name in self.weights]
        owner = owners(here, self.config.sizes)
        explicit = Counter()
        for kind in (GroupKind.DATA, GroupKind.EXPERT_DATA):
            many = len(self.ranks(kind))
            metrics_buffers = [
                sum(
                    math.prod(weight.shape)
                    for name, weight in self.weights.items()
                    if weight.kind is kind and owner[name] == member
                )
                for member in range(many)
            ]
            buffer = max(metrics_buffers)
            explicit[self.said("ReduceScatter", BACKWARD, kind, many * buffer * FLOAT)] += 1
            explicit[self.said("AllGather", UPDATE, kind, buffer * HALF)] += 1
        return Difference(
            "In the graph every rank keeps a shard of each weight and gathers the weights before "
            "it uses them (embedding and router in float32, which only use rounds); the explicit "
            "path gives whole weights to owners, in buffers as long as the fullest owner's, and "
            "spreads the updated ones, in the dtype of the model.",
            graph,
            explicit,
        )

    def last_stage(self) -> Difference:
        """Of a pipeline."""
        whole, mp = self._exchanged(), self.config.mp
        times = 2 * self.micro * self.layers
        shared = self.config.group_wise_a2a
        travels = whole // mp if shared else whole
        graph = Counter({self.said("AlltoAll", RECOMPUTE, GroupKind.EXPERT, travels): times})
        tensor = GroupKind.TENSOR
        if mp > 1 and shared:
            graph[self.said("AllGather", RECOMPUTE, tensor, travels)] += times
            graph[self.said("ReduceScatter", RECOMPUTE, tensor, whole)] += times // 2
        elif mp > 1:
            graph[self.said("AllReduce", RECOMPUTE, tensor, whole)] += times // 2
        return Difference(
            "With full recompute the graph computes every stage's blocks again; on the explicit "
            "path the last stage goes forward and backward at once and needs not.",
            graph,
        )

    def tied_ends(self) -> Difference:
        """Of a pipeline whose embedding is the head, too."""
        size, kind = V * H * FLOAT, GroupKind.EMBEDDING
        there, back = ("Send", "Receive") if self.stage == 0 else ("Receive", "Send")
        return Difference(
            "In the graph the first stage alone has a tied embedding: it sends the last stage the "
            "weight once a step and gets its gradient; on the explicit path both have it and add "
            "their gradients up.",
            Counter(
                {self.said(there, FORWARD, kind, size): 1, self.said(back, BACKWARD, kind, size): 1}
            ),
            Counter({self.said("AllReduce", BACKWARD, kind, size): 1}),
        )

    def _exchanged(self) -> int:
        return E * C * H * HALF

    def sequence(self) -> Difference:
        """Parallelism of rows between the matrices."""
        kind, mp = GroupKind.TENSOR, self.config.mp
        times = self.layers * self.micro
        graph = Counter({
            self.said("AllGather", BACKWARD, kind, STATES // mp): times,
            self.said("ReduceScatter", BACKWARD, kind, STATES): 2 * times,
        })  # fmt: skip
        explicit = Counter({self.said("AllReduce", BACKWARD, kind, STATES): times})
        for phase in self._forward:
            graph[self.said("AllGather", phase, kind, STATES // mp)] += 2 * times
            graph[self.said("ReduceScatter", phase, kind, STATES)] += times
            if phase == FORWARD or not self.last:
                explicit[self.said("AllReduce", phase, kind, STATES)] += times
        return Difference(
            "In the graph tensor-parallel ranks hold a share of the rows between the matrices: it "
            "gathers before attention and scatters after it, which sends what the explicit path's "
            "AllReduce sends, and gathers once more before the sparse layer.",
            graph,
            explicit,
        )

    @property
    def _forward(self) -> tuple[str, ...]:
        """How often the blocks go forward: once more where they are recomputed."""
        return (FORWARD, RECOMPUTE) if self.config.recompute == "full" else (FORWARD,)

    def vocabulary(self) -> Difference:
        """Divided, or not."""
        kind, column = GroupKind.TENSOR, S * FLOAT
        explicit = Counter()
        if self.stage == 0:
            for phase in self._forward:
                explicit[self.said("AllReduce", phase, kind, STATES)] += self.micro
        if self.last:
            explicit[self.said("AllReduce", BACKWARD, kind, STATES)] += self.micro
            explicit[self.said("AllGather", FORWARD, kind, column)] += self.micro
            explicit[self.said("AllReduce", FORWARD, kind, column)] += 2 * self.micro
        return Difference(
            "The explicit path divides embedding and head by the vocabulary and brings looked-up "
            "rows, the loss's three sums and the gradient before the head together; the graph "
            "divides their rows, and nobody needs the others'.",
            Counter(),
            explicit,
        )

    def messages(self) -> Difference:
        """Between stages."""
        found = []
        for size in (STATES // self.config.mp, STATES):
            counts = Counter()
            for pair in (self.stage - 1, self.stage):
                if 0 <= pair < self.config.pp - 1:
                    ranks = self.topology.neighbours(pair, self.rank).ranks
                    there, back = ("Send", "Receive") if pair == self.stage else ("Receive", "Send")
                    counts[Said(there, FORWARD, ranks, size)] += self.micro
                    counts[Said(back, BACKWARD, ranks, size)] += self.micro
            found.append(counts)
        return Difference(
            "Tensor-parallel ranks hand a share of the rows each to the next stage in the graph, "
            "and all of them on the explicit path.",
            *found,
        )

    def sharded_rows(self) -> Difference:
        """Of the group-wise exchange, on the way back."""
        kind, times = GroupKind.TENSOR, self.layers * self.micro
        return Difference(
            "Gradients of copies are parts in the graph: where the explicit path takes its share "
            "of the gradient of rows that came home, the graph adds the parts up, and where the "
            "explicit path gathers the tokens' gradient, the graph leaves the parts.",
            Counter({self.said("ReduceScatter", BACKWARD, kind, self._exchanged()): times}),
            Counter({self.said("AllGather", BACKWARD, kind, STATES // self.config.mp): times}),
        )
