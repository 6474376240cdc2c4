"""Which layout a cluster should have: every legal one, judged by memory and by time.

For each division (dp, mp, pp, ep) the best of its other settings is found: virtual stages,
micro-batches, what is computed again, where the optimizer's state lies, the all-to-all, and on
request the dispatch policy. All are estimated first; the best are simulated.

MindSpore's graph has no interleaved stages. Where ``parallel.execution`` is left open, layouts with
them are planned for the explicit path, and their runs say so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Literal

from mistral_ms.config import ModelConfig, Recompute, RunConfig
from mistral_ms.config.layout import Sizes, divisors, factorisations
from mistral_ms.errors import ConfigError
from mistral_ms.parallel.memory import GIB, LayerMemory, rows_of
from mistral_ms.parallel.pipeline import held_specs, stages_of
from mistral_ms.planner.candidate import Candidate
from mistral_ms.planner.changed import changed_run, check_planned, with_policy
from mistral_ms.planner.division import Division
from mistral_ms.planner.hardware import Cluster
from mistral_ms.planner.load import Balance, Loads, balance
from mistral_ms.planner.memory import CardMemory
from mistral_ms.planner.program import OURS, Program
from mistral_ms.planner.step import StepModel, StepSeconds
from mistral_ms.planner.traffic import tokens_of
from mistral_ms.planner.ways import POLICIES, Policy, Way, of_policies, ways
from mistral_ms.weights import ParamSpec, specs

SIMULATED = 24
"""Layouts whose pipelines are simulated, of those that are estimated to be the fastest."""
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")
Offload = Literal["none", "host"]
OFFLOAD: tuple[Offload, ...] = ("none", "host")
CHUNKS = 2, 4, 8
"""Runs of layers on a stage that are tried, beside as many as it can have."""
CLOSE = 1.05
"""Of one division also what is estimated to take so much longer is simulated."""


def plan(
    run: RunConfig,
    cluster: Cluster,
    *,
    loads: Sequence[Loads] = (),
    offload: Sequence[Offload] = OFFLOAD,
    policies: Sequence[Policy] = (),
) -> tuple[Candidate, ...]:
    """The layouts of a training on a cluster, each with its best settings.

    Model, routing, batch, sequence and optimizer stay as they are; ``parallel.max_device_memory``
    limits what a card may hold. The rest of ``parallel`` and the number of micro-batches are
    chosen.

    Of ``parallel.execution`` auto, where that is the graph, interleaved pipelines are planned for
    the explicit path, and their run says ``execution: explicit``.

    Args:
        run: the training.
        cluster: where it shall run.
        loads: of the experts of each sparse layer; none: even.
        offload: where the optimizer's state may lie, what is slower last.
        policies: of the dispatch, which may take the place of the training's own; none: that stays.
            Another one trains something else: a capacity drops choices.

    Returns:
        What fits, the fastest first, then what does not, the smallest first.

    Raises:
        ConfigError: no layout divides the model and the batch among the cards.
    """
    if run.evaluation is not None and cluster.cards > 1:
        raise ConfigError(
            "impossible evaluation",
            where="evaluation",
            value=f"{cluster.cards} cards",
            rule="a training is judged while it goes on in one process alone",
            todo="set evaluation=null, and run the evaluate command on its checkpoints",
        )
    found = [
        option
        for each in of_policies(run, policies)
        for way in ways(each, cluster.hardware.device)
        for option in _Search(each, cluster, loads, offload, way).options()
    ]
    if not found:
        raise ConfigError(
            "no layout",
            where=f"{cluster.cards} cards",
            value=f"training.global_batch_size {run.training.global_batch_size}",
            rule="dp divides it, mp the heads, ep the experts, pp is at most the layers, and a "
            "pipeline has at least as many micro-batches as stages",
            todo="use fewer cards or a larger batch",
        )
    fitting = sorted((each for each in found if each.candidate.fits), key=_seconds)
    quickest: dict[Sizes, float] = {}
    for each in fitting:
        quickest.setdefault(each.candidate.run.parallel.sizes, _seconds(each))
    fitting = [
        each
        for each in fitting
        if _seconds(each) <= CLOSE * quickest[each.candidate.run.parallel.sizes]
    ]
    best = [each.simulated() for each in fitting[:SIMULATED]]
    best.sort(key=lambda candidate: -candidate.tokens_per_s_per_card)
    others = [each.candidate for each in found if not each.candidate.fits]
    others.sort(key=lambda candidate: candidate.memory.total)
    later = (each.candidate for each in fitting[SIMULATED:])
    return tuple(_first_of_each_division((*best, *later, *others)))


def _first_of_each_division(candidates: Iterable[Candidate]) -> Iterator[Candidate]:
    seen: set[Sizes] = set()
    for each in candidates:
        if (sizes := each.run.parallel.sizes) not in seen:
            seen.add(sizes)
            yield each


def judge(
    run: RunConfig,
    cluster: Cluster,
    *,
    loads: Sequence[Loads] = (),
    program: Program = OURS,
    slowdown: float | None = None,
) -> Candidate:
    """A training in the layout that it has.

    Args:
        run: the training.
        cluster: where it runs; as many cards as its layout has.
        loads: see :func:`plan`.
        program: whose sparse layers they are, for comparison with others. Memory is that of ours.
        slowdown: another one than the hardware's.
    """
    way = Way(run.parallel.execution_on(cluster.hardware.device))
    search = _Search(run, cluster, loads, OFFLOAD, way)
    division = search.division(run)
    memory = division.memory(run, division.layers(run))
    model = division.step_model(run, program, slowdown)
    step = model.step(division.owned)
    fits = search.fits(memory, run.parallel.world)
    return search.candidate(run, memory, fits, step, model.balance)


def other_dispatch(
    best: Candidate, cluster: Cluster, *, loads: Sequence[Loads] = ()
) -> Candidate | None:
    """The same layout under the other dispatch policy; None where there is none.

    Args:
        best: the layout.
        cluster: where it runs.
        loads: see :func:`plan`.
    """
    run = best.run
    if run.model.moe is None or run.routing.policy not in POLICIES:
        return None
    other = POLICIES[1 - POLICIES.index(run.routing.policy)]
    changed = with_policy(run, other)
    return None if changed is None else judge(changed, cluster, loads=loads)


@dataclass(frozen=True)
class _Option:
    """A candidate, and what its pipeline can be simulated by."""

    candidate: Candidate
    model: StepModel | None = field(default=None, repr=False)
    owned: tuple[int, ...] = ()

    def simulated(self) -> Candidate:
        assert self.model is not None
        return replace(self.candidate, step=self.model.step(self.owned))


class _Search:
    """What all layouts of a training share."""

    def __init__(
        self,
        run: RunConfig,
        cluster: Cluster,
        loads: Sequence[Loads],
        offload: Sequence[Offload],
        way: Way,
    ) -> None:
        check_planned(run)
        self.run, self.cluster, self.loads, self.offload = run, cluster, loads, offload
        self.hardware = cluster.hardware
        self.execution, self.interleaved = way.execution, way.interleaved
        moe = run.model.moe
        self.takes_ids = moe is not None and moe.gate.takes_ids
        self.explicit_only = run.training.neftune_noise_alpha is not None or (
            moe is not None
            and (
                moe.gate.explicit_only
                or moe.shared_expert_gate == "cmr"
                or moe.layer_experts is not None
            )
        )
        self.weights = _weights(run.model)
        limit = run.parallel.max_device_memory
        self.usable_gib = min(self.hardware.usable_gib, math.inf if limit is None else limit)

    def options(self) -> Iterator[_Option]:
        for sizes in factorisations(self.cluster.cards):
            if self._is_possible(sizes):
                found = [
                    each for chunks in self._chunks(sizes) for each in self._best(sizes, chunks)
                ]
                if found:
                    yield min(found, key=lambda each: (_seconds(each), each.candidate.memory.total))

    def fits(self, memory: CardMemory, world: int) -> bool:
        """On the card, and all cards of a node in host memory."""
        cards = min(world, self.hardware.devices_per_node)
        host = memory.host_optimizer * cards / GIB
        return memory.gib <= self.usable_gib and host <= self.hardware.host.memory_gib

    def _is_possible(self, sizes: Sizes) -> bool:
        run, devices = self.run, self.hardware.devices_per_node
        if sizes.mp > devices or run.training.global_batch_size % sizes.dp:
            return False
        coupled = run.routing.aux_loss == "pooled" and run.training.router_aux_loss_coef > 0
        if sizes.pp > 1 and coupled and run.model.sparse_layers:
            return False
        if self.takes_ids and sizes.pp > 1 and self.execution == "graph":
            return False
        if self.explicit_only and (self.execution == "graph" or self.interleaved):
            return False
        plain = run.parallel.model_copy(update={"devices_per_node": devices, **_PLAIN})
        return plain.rules(self.cluster.cards, run.model).broken_by(sizes) is None

    def _chunks(self, sizes: Sizes) -> list[int]:
        """Runs of layers on each stage: several on the explicit path alone."""
        most = self.run.model.num_hidden_layers // sizes.pp
        found = [] if self.interleaved else [1]
        if self.execution == "explicit" and sizes.pp > 1:
            found += sorted({each for each in (*CHUNKS, most) if 1 < each <= most})
        return found

    def _best(self, sizes: Sizes, chunks: int) -> Iterator[_Option]:
        """The fastest settings of a division; if nothing fits, those that need least memory."""
        division = self.division(self._divided(sizes, chunks))
        best: _Option | None = None
        smallest: Candidate | None = None
        for micro_batches in self._micro_batches(sizes):
            if chunks > 1 and micro_batches % sizes.pp:
                continue
            with_batches = changed_run(division.run, gradient_accumulation_steps=micro_batches)
            if self.execution == "graph" and tokens_of(with_batches) % sizes.mp:
                continue
            rows = rows_of(with_batches.training, with_batches.parallel)
            if self.run.routing.broken_groups(rows, with_batches.training.seq_length):
                continue
            layers = division.layers(with_batches)
            for run, memory, fits in self._settings(division, with_batches, layers):
                if not fits:
                    if smallest is None or memory.total < smallest.memory.total:
                        smallest = self.candidate(run, memory, fits=False)
                    continue
                for routed in self._routes(run):
                    model = division.step_model(routed)
                    step = model.step(division.owned, simulated=False)
                    if best is None or step.seconds < _seconds(best):
                        candidate = self.candidate(routed, memory, True, step, model.balance)
                        best = _Option(candidate, model, division.owned)
        if best is not None:
            yield best
        elif smallest is not None:
            yield _Option(smallest)

    def _settings(
        self, division: Division, run: RunConfig, layers: tuple[LayerMemory, ...]
    ) -> Iterator[tuple[RunConfig, CardMemory, bool]]:
        """What fits with the least work: of each place of the optimizer the first recompute."""
        for offload in self.offload:
            for recompute in RECOMPUTE:
                changed = changed_run(run, offload_optimizer=offload, recompute=recompute)
                memory = division.memory(changed, layers)
                fits = self.fits(memory, run.parallel.world)
                if fits or (offload, recompute) == (self.offload[-1], RECOMPUTE[-1]):
                    yield changed, memory, fits
                if fits and recompute == RECOMPUTE[0]:
                    return  # nothing is computed again: the host cannot help
                if fits:
                    break

    def _routes(self, run: RunConfig) -> Iterator[RunConfig]:
        parallel, devices = run.parallel, self.hardware.devices_per_node
        if run.model.moe is None or parallel.ep * parallel.mp == 1:
            yield run
            return
        spread = parallel.ep > 1 and parallel.ep * parallel.mp > devices
        for route in ("flat", "hierarchical") if spread else ("flat",):
            for shards in (False, True) if parallel.mp > 1 else (False,):
                changed = parallel.model_copy(
                    update={"all_to_all": route, "group_wise_a2a": shards}
                )
                if changed.rules(model=run.model).broken_by(parallel.sizes) is None:
                    yield run.model_copy(update={"parallel": changed})

    def _divided(self, sizes: Sizes, chunks: int) -> RunConfig:
        values: dict[str, object] = {
            "dp": sizes.dp, "mp": sizes.mp, "pp": sizes.pp, "ep": sizes.ep,
        }  # fmt: skip
        values |= {"devices_per_node": self.hardware.devices_per_node, **_PLAIN}
        values |= {
            "optimizer_parallel": self._can_shard(sizes, chunks),
            "pp_interleave_num": chunks,
        }
        if self.interleaved:
            values["execution"] = "explicit"
        if self.execution == "graph" or chunks > 1:
            values["pipeline_scheduler"] = "1f1b"
        parallel = self.run.parallel.model_copy(update=values)
        return self.run.model_copy(update={"parallel": parallel})

    def _can_shard(self, sizes: Sizes, chunks: int = 1) -> bool:
        """Whether each card can have a shard of the optimizer's state."""
        moe, copies = self.run.model.moe, sizes.dp // sizes.ep
        if sizes.dp == 1:
            return False
        if self.execution == "explicit":  # every card owns at least one weight
            parts = stages_of(self.run.model, sizes.pp * chunks)
            held = [len(held_specs(part, self.weights)) for part in parts]
            return all(sum(held[stage :: sizes.pp]) >= sizes.dp for stage in range(sizes.pp))
        local = 1 if moe is None else moe.num_local_experts // sizes.ep
        return not (local % copies and copies % local)

    def _micro_batches(self, sizes: Sizes) -> list[int]:
        """What divides a rank's sequences; enough to fill the pipeline of the graph."""
        sequences = self.run.training.global_batch_size // sizes.dp
        halves = self.run.parallel.micro_batch_interleave_num
        counts = [n for n in divisors(sequences) if (sequences // n) % halves == 0]
        if self.execution == "graph" and sizes.world == 1:
            return [n for n in counts if n == 1]  # the graph of one process takes a batch at once
        if self.execution == "graph" and sizes.pp == 1 and self._can_shard(sizes):
            alike = sizes.dp // (sizes.ep if self.run.model.moe is not None else 1)
            if alike == 1:  # MindSpore adds up only what the optimizer's shards are made of
                return [n for n in counts if n == 1]
        return [n for n in counts if n >= sizes.pp or self.execution == "explicit"]

    def division(self, run: RunConfig) -> Division:
        """The stages of a layout."""
        return Division(run, self.hardware, self.execution, self.weights, self.balance)

    def candidate(
        self,
        run: RunConfig,
        memory: CardMemory,
        fits: bool,
        step: StepSeconds | None = None,
        spread: Balance | None = None,
    ) -> Candidate:
        """A layout, judged."""
        spread = self.balance(run) if spread is None else spread
        return Candidate(run, memory, fits, step, spread, self.usable_gib, self.execution)

    def balance(self, run: RunConfig) -> Balance:
        """Of the experts, in a layout."""
        tokens = tokens_of(run)
        length = run.training.seq_length
        return balance(run.model, run.routing, run.parallel.ep, tokens, self.loads, length)


@lru_cache(maxsize=8)
def _weights(model: ModelConfig) -> tuple[ParamSpec, ...]:
    """Of a model, whose layouts are often judged one after the other."""
    return specs(model)


_PLAIN: dict[str, object] = {
    "all_to_all": "flat",
    "group_wise_a2a": False,
    "optimizer_parallel": False,
}


def _seconds(option: _Option) -> float:
    step = option.candidate.step
    return math.inf if step is None else step.seconds
