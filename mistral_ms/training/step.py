"""One update: the batch in its parts, the graphs, and what is reported of it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np
from mindspore import Parameter, Tensor, nn

from mistral_ms.config import ModelConfig, TrainingConfig
from mistral_ms.datasets.batches import Batch
from mistral_ms.models import CausalLM, LossReport, StageChunks, StageObjectives, recompute
from mistral_ms.models.distillation import DISTANCE
from mistral_ms.moe import try_gates
from mistral_ms.ops.graph_cache import kept_graphs
from mistral_ms.ops.modes import graph_mode
from mistral_ms.optimizers import Plan, check_layout, make_plan, with_settings
from mistral_ms.parallel.context import ParallelContext
from mistral_ms.parallel.pipeline import check_trained
from mistral_ms.parallel.storage import Storage
from mistral_ms.parallel.zero1 import Zero1Reduction
from mistral_ms.training.graphs import (
    AccumulatedOptimizerStep,
    BatchTensors,
    FusedUpdate,
    GradientAccumulation,
    MicroBatchGradients,
    OptimizerStep,
    batch_tensors,
)
from mistral_ms.training.loss_scale import LossScale
from mistral_ms.training.lr_scheduler import learning_rate
from mistral_ms.training.memory import MemoryReport, memory_report
from mistral_ms.training.objective import TrainedObjective
from mistral_ms.training.offload import HostOptimizer
from mistral_ms.training.optimizer import MASTER, DeviceOptimizer, is_mixed
from mistral_ms.training.pipelined import PipelinedGradients
from mistral_ms.training.result import NotFiniteError, StepResult
from mistral_ms.training.statistics import combined, layer_names, output_magnitudes
from mistral_ms.weights import specs


@dataclass(slots=True)
class Progress:
    """How far a training is: with weights and optimizer state, all that a resume needs.

    Attributes:
        step: batches seen. The data position follows from it, and the learning rate.
        updates: updates made; fewer than steps where float16 overflowed.
        scale: the loss scale of the next step.
    """

    step: int = 0
    updates: int = 0
    scale: LossScale = field(default_factory=LossScale)


class Update(Protocol):
    """A training step with everything that it changes.

    Attributes:
        config: the training, its steps counted out.
        progress: how far it is; may be set before the first step.
    """

    config: TrainingConfig
    progress: Progress

    def __call__(self, batch: Batch) -> StepResult:
        """Runs the next step and waits for it."""

    @property
    def architecture(self) -> ModelConfig:
        """Of the model that is trained."""

    @property
    def storage(self) -> Storage:
        """How weights and state lie in a checkpoint."""

    def held(self) -> dict[str, Parameter]:
        """What checkpoints hold of this process's weights, by name: all, frozen ones too; with
        adapters these alone.
        """

    def state(self) -> dict[str, Parameter]:
        """Everything that a resume needs beside the weights, by the names of checkpoints."""

    def state_kinds(self) -> frozenset[str]:
        """What stands before the names of weights in ``state``, over all processes."""

    def restored(self) -> None:
        """To be called when weights or state were set from outside."""

    def memory(self) -> MemoryReport:
        """Bytes that are kept between steps."""

    def layer_statistics(self, batch: Batch) -> list[dict[str, Any]]:
        """The outputs of embedding and blocks on a batch, of all processes; all must ask."""


def advance(
    progress: Progress, config: TrainingConfig, batch: Batch, result: StepResult
) -> StepResult:
    """Counts a step that was made, and sets the next one's loss scale.

    Args:
        progress: of the training, still that of this step.
        config: the training.
        batch: what the step saw.
        result: what it reported.

    Returns:
        The result.

    Raises:
        NotFiniteError: it is not finite, and no smaller loss scale could help.
    """
    scaling = config.scaling
    if not result.finite and (scaling is None or result.loss_scale <= scaling.minimum):
        raise NotFiniteError(progress.step + 1, batch, result, scaling is not None)
    progress.step += 1
    progress.updates += result.finite
    progress.scale = progress.scale.after(scaling, result.finite)
    return result


class TrainStep:
    """Everything an update needs; the graphs are compiled at the first one.

    Args:
        objective: of a model (``objective.model``), which is trained in place, with its initial
            weights. Used of it is what :class:`~mistral_ms.models.Objective` has: the call,
            ``forward_step`` in pipelines, ``model``, ``others``, ``measures``, ``embeds`` and
            ``predicts``.
        config: optimizer, schedule, micro-batches; its steps are counted out.
        parallel_context: which part of model and batch this process has; None when it is alone.
            Each data-parallel rank's micro-batches are dispatch groups of their own.

    Raises:
        ConfigError: the optimizer, its settings or its parameter groups are not possible for this
            model and layout; a gate that breaks its contract.

    Attributes:
        weights: the parameters that are trained, by name.
        optimizer: on the device or on the host.
        progress: how far the training is; may be set before the first step.
    """

    def __init__(
        self,
        objective: TrainedObjective,
        config: TrainingConfig,
        *,
        parallel_context: ParallelContext | None = None,
    ) -> None:
        config, model = with_settings(config), objective.model
        try_gates(model, model.config, training=True)
        self.model, self.config = model, config
        self._parallel_context = parallel_context
        self._plan = _plan_of(model, config, parallel_context)
        self.weights: dict[str, Parameter] = {
            name: weight
            for name, weight in model.weights().items()
            if weight.requires_grad and name in self._plan.group_of
        }
        self._reduction = (
            None
            if parallel_context is None
            else parallel_context.reduction(self.weights, model.specs)
        )
        self.progress = Progress(scale=LossScale.start(config.scaling))
        recompute(model.layers, "none" if parallel_context is None else parallel_context.recompute)
        self._others, self._measures = objective.others, objective.measures
        updated = dict(self.weights)
        self._all_gather_weights: nn.Cell | None = None
        if isinstance(self._reduction, Zero1Reduction):
            updated = {name: self.weights[name] for name in self._reduction.updated}
            self._all_gather_weights = self._reduction.all_gather_weights(self.weights)
        self.optimizer: DeviceOptimizer | HostOptimizer
        if config.offload_optimizer == "host":
            self.optimizer = HostOptimizer(updated, self._plan)
            optimizer_step = OptimizerStep(None, config.max_grad_norm, self._reduction)
        else:
            self.optimizer = DeviceOptimizer(updated, self._plan)
            optimizer_step = OptimizerStep(self.optimizer, config.max_grad_norm, self._reduction)
        self._fused: FusedUpdate | None = None
        self._gradients: GradientAccumulation | PipelinedGradients | None = None
        self._optimizer_step: AccumulatedOptimizerStep | None = None
        parts = objective.parts if isinstance(objective, StageObjectives) else (objective,)
        self._parts = parts
        self._compiled = False
        if parallel_context is not None and parallel_context.is_pipelined:
            schedule, p2p = (
                parallel_context.schedule(config.gradient_accumulation_steps),
                parallel_context.p2p(),
            )
            self._gradients = PipelinedGradients(parts, self.weights, schedule, p2p)
        elif config.gradient_accumulation_steps > 1 or self._all_gather_weights is not None:
            # Ranks that update different weights have different graphs of the update. The compiler
            # orders collectives that do not wait for each other, so the model's own (recomputed
            # ones beside those of the gradient) must be in a graph that is the same on all ranks.
            self._gradients = GradientAccumulation(parts[0], self.weights)
        if self._gradients is None:
            self._fused = FusedUpdate(MicroBatchGradients(parts[0], self.weights), optimizer_step)
        else:
            self._optimizer_step = AccumulatedOptimizerStep(self._gradients.sums, optimizer_step)

    def __call__(self, batch: Batch) -> StepResult:
        """Runs the next step and waits for it.

        A step whose loss or gradients are not finite changes neither weights nor optimizer state.
        Under a loss scale that can be lowered that is an ordinary event.

        Raises:
            NotFiniteError: they are not finite and no smaller loss scale could help. The step has
                not been made: called again with its batch it would fail in the same way.
        """
        progress, config = self.progress, self.config
        lr = learning_rate(config, progress.step)
        scale = progress.scale.value
        coefficients = Tensor(self._plan.coefficients(progress.updates, lr))
        scales = [1.0 / max(1, batch.tokens), 1.0 / max(1, batch.present), scale]
        scales = Tensor(np.array(scales, np.float32))
        mine = self._own(batch)
        with graph_mode():
            with self._kept(mine):
                if self._fused is not None:
                    tensors = self._tensors(mine)
                    losses, norm, norms_n, clipped = self._fused(
                        *tensors[:5], scales, coefficients, *tensors[5:]
                    )
                    sums = [part.asnumpy() for part in losses]
                else:
                    sums, norm, norms_n, clipped = self._accumulated(mine, scales, coefficients)
            sums = self._of_all_ranks(sums)
            result = self._result(sums, norm, norms_n, lr, scale)
            if isinstance(self.optimizer, HostOptimizer) and result.finite:
                self.optimizer.update(clipped, coefficients)
            if self._all_gather_weights is not None and result.finite:
                self._all_gather_weights()
        if result.finite:
            self.model.update_gates(result.routed_LE)
        return advance(progress, config, batch, result)

    @property
    def architecture(self) -> ModelConfig:
        """See :class:`Update`."""
        return self.model.config

    @property
    def storage(self) -> Storage:
        """See :class:`Update`."""
        held = self.model.specs
        return (
            Storage(held)
            if self._parallel_context is None
            else self._parallel_context.storage(held)
        )

    def held(self) -> dict[str, Parameter]:
        """See :class:`Update`."""
        return self.model.stored_weights()

    def state(self) -> dict[str, Parameter]:
        """See :class:`Update`."""
        return self.optimizer.state()

    def state_kinds(self) -> frozenset[str]:
        """See :class:`Update`."""
        return self._plan.kinds | ({MASTER} if is_mixed(self.weights) else set())

    def restored(self) -> None:
        """See :class:`Update`."""
        self.optimizer.restored()

    def cells(self) -> tuple[nn.Cell, ...]:
        """The cells that are compiled for the device."""
        computing = () if self._gradients is None else self._gradients.cells()
        found = (self._fused, *computing, self._optimizer_step, self._all_gather_weights)
        return tuple(cell for cell in found if cell is not None)

    def memory(self) -> MemoryReport:
        """See :class:`Update`."""
        host = self.optimizer
        return memory_report(
            [p for cell in self.cells() for p in cell.get_parameters()],
            trained=self.weights.values(),
            weights=self.model.weights().values(),
            sums=() if self._gradients is None else self._gradients.sums,
            host=host.host_parameters() if isinstance(host, HostOptimizer) else (),
        )

    def layer_statistics(self, batch: Batch) -> list[dict[str, Any]]:
        """See :class:`Update`."""
        context, config = self._parallel_context, self.config
        parts = self._own(batch).split(config.gradient_accumulation_steps)
        groups = [self._tensors(part) for part in parts]
        table_RC = output_magnitudes(self.model, partial(self._forward, groups))
        tables = table_RC[None] if context is None else context.gather_outputs(table_RC)
        names = layer_names(self.model.config.num_hidden_layers)
        return [{"name": name, **combined(tables[:, row])} for row, name in enumerate(names)]

    def _own(self, batch: Batch) -> Batch:
        """This rank's rows."""
        if self._parallel_context is None:
            return batch
        number, parts = self._parallel_context.data_parallel
        return batch.split(parts)[number]

    def _kept(self, batch: Batch) -> AbstractContextManager[None]:
        """Around the first computation, which compiles: see :func:`kept_graphs`."""
        if self._compiled:
            return nullcontext()
        self._compiled = True
        shapes = [None if t is None else (t.shape, str(t.dtype)) for t in self._tensors(batch)]
        return kept_graphs(self.cells(), shapes, self.config.gradient_accumulation_steps)

    def _forward(self, groups: Sequence[BatchTensors]) -> None:
        """Once more through the objective, or through all stages."""
        counts = Tensor(np.ones(2, np.float32))
        if isinstance(self._gradients, PipelinedGradients):
            self._gradients.forward(groups, counts)
            return
        for ids, labels, positions, segments, random, *reference in groups:
            self._parts[0](ids, labels, positions, segments, counts, random, *reference)

    def _accumulated(
        self, batch: Batch, scales: Tensor, coefficients: Tensor
    ) -> tuple[list[np.ndarray], Tensor, Tensor, tuple[Tensor, ...]]:
        assert self._gradients is not None and self._optimizer_step is not None
        parts = [
            self._tensors(part) for part in batch.split(self.config.gradient_accumulation_steps)
        ]
        sums = self._gradients(parts, scales)
        return sums, *self._optimizer_step(Tensor(sums[0]), scales, coefficients)

    def _tensors(self, batch: Batch) -> BatchTensors:
        return batch_tensors(batch, self.config.seed, self.progress.step)

    def _of_all_ranks(self, sums: list[np.ndarray]) -> list[np.ndarray]:
        """Adds up what the ranks' dispatch groups contributed, in one message."""
        if self._reduction is None:
            return sums
        flat = np.concatenate([np.ravel(each) for each in sums]).astype(np.float32)
        ends = np.cumsum([each.size for each in sums])[:-1]
        parts = np.split(self._reduction(Tensor(flat)).asnumpy(), ends)
        return [part.reshape(each.shape) for part, each in zip(parts, sums, strict=True)]

    def _result(
        self, sums: list[np.ndarray], norm: Tensor, norms_n: Tensor, lr: float, scale: float
    ) -> StepResult:
        total, report = float(sums[0]), LossReport.unpack(sums[1:])
        norms = zip(self.weights, norms_n.asnumpy().tolist(), strict=True)
        values, others = list(map(float, report.others)), len(self._others)
        measures = dict(zip(self._measures, values[others:], strict=True))
        return StepResult(
            loss=total,
            lm_loss=float(report.lm),
            aux_loss=float(report.aux),
            z_loss=float(report.z),
            grad_norm=float(norm.asnumpy()),
            learning_rate=lr,
            loss_scale=scale,
            routed_LE=_table(report.routed_LE),
            kept_LE=_table(report.kept_LE),
            gradient_norms=dict(norms),
            router_losses=dict(zip(self._others, values[:others], strict=True)),
            distillation=measures.pop(DISTANCE, None),
            preference=measures,
        )


def _plan_of(
    model: CausalLM | StageChunks,
    config: TrainingConfig,
    parallel_context: ParallelContext | None,
) -> Plan:
    """The optimizer of the whole model, of which a process may hold a part."""
    plan = make_plan(config, specs(model.config))
    if parallel_context is not None:
        check_layout(plan, parallel_context.parallel)
        parallel = parallel_context.parallel
        check_trained(model.config, parallel.pp * parallel.pp_interleave_num, plan.group_of)
    return plan


def _table(counts: np.ndarray) -> np.ndarray:
    """[layers, E]; a dense model reports a scalar zero, which becomes an empty table."""
    return counts if counts.ndim == 2 else np.zeros((0, 0), np.float32)
