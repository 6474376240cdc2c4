"""The training step of the auto-parallel graph: what drives one graph that MindSpore divides."""

from __future__ import annotations

import math
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mistral_ms.config import ModelConfig, RunConfig
from mistral_ms.datasets.batches import Batch
from mistral_ms.errors import ConfigError, TopologyError
from mistral_ms.moe import update_gates
from mistral_ms.ops.modes import graph_mode
from mistral_ms.optimizers import with_settings
from mistral_ms.parallel import graph
from mistral_ms.parallel.context import ParallelContext
from mistral_ms.parallel.graph.checks import check_gate
from mistral_ms.parallel.storage import GraphStorage
from mistral_ms.training.graphs import batch_tensors
from mistral_ms.training.loss_scale import LossScale
from mistral_ms.training.lr_scheduler import learning_rate
from mistral_ms.training.memory import MemoryReport, memory_report
from mistral_ms.training.optimizer import weight_of
from mistral_ms.training.result import StepResult
from mistral_ms.training.step import Progress, advance


class GraphTrainStep:
    """A :class:`~mistral_ms.training.step.Update` that is one graph. Weights are float32, their
    optimizer's masters.

    Among several processes the graph is compiled here, which leaves each parameter as this rank's
    part of it, zero; alone it is compiled at the first step.

    Args:
        run: the run, its steps counted out.
        parallel_context: this process among the others.
        segmented: sequences hold documents that do not see each other.
        token_nll: the loss of tokens, see :class:`~mistral_ms.models.Objective`; None: the usual
            one.

    Attributes:
        config: see Update.
        progress: see Update.

    Raises:
        ConfigError: the graph cannot express the run, or the device cannot divide graphs; a gate
            that breaks its contract.
    """

    def __init__(
        self,
        run: RunConfig,
        parallel_context: ParallelContext,
        segmented: bool,
        token_nll: nn.Cell | None = None,
    ) -> None:
        self.config = with_settings(run.training)
        self.progress = Progress(scale=LossScale.start(run.training.scaling))
        self._model, self._parallel, self._parallel_context = (
            run.model,
            run.parallel,
            parallel_context,
        )
        divided = parallel_context.world > 1
        if divided and ms.get_context("device_target") != "Ascend":
            raise ConfigError(
                "no graph of many processes",
                where="parallel.execution",
                value="graph",
                rule="MindSpore divides graphs on Ascend only",
                todo="use explicit; dryrun compiles the graph here",
            )
        check_gate(run.model, run.routing, training=True)
        if divided:
            graph.set_context(run)
        self._outputs_L2 = np.zeros((0, 2), np.float32)
        self._built = graph.build(run, segmented=segmented, token_nll=token_nll)
        self._cell = self._built.cell
        self.storage = GraphStorage(run.model, run.parallel, parallel_context.rank)
        if divided:
            with graph_mode():
                self._cell.compile(*self._built.inputs)
        else:
            for parameter in self._cell.get_parameters():
                parameter.init_data()
        self._check_parts()

    @property
    def architecture(self) -> ModelConfig:
        """See Update."""
        return self._model

    def weights(self) -> dict[str, Parameter]:
        """All weights of this stage, by the names of checkpoints."""
        return self.storage.held(self._built.model.weights())

    def held(self) -> dict[str, Parameter]:
        """See Update; of this stage."""
        weights = self.weights()
        if self._model.lora is None:
            return weights
        return {n: each for n, each in weights.items() if self.storage.specs[n].adapts}

    def state(self) -> dict[str, Parameter]:
        """See Update; of this stage."""
        every = self._cell.weight_update.state()
        return {name: each for name, each in every.items() if weight_of(name) in self.storage.specs}

    def state_kinds(self) -> frozenset[str]:
        """See Update."""
        return self._cell.weight_update.plan.kinds

    def restored(self) -> None:
        """See Update; nothing depends on them."""

    def memory(self) -> MemoryReport:
        """See Update; of this stage, without the sums of gradients, which MindSpore makes."""
        weights, state = self.weights(), list(self.state().values())
        held, names = list(weights.values()), self._cell.weight_update.names
        trained = [weights[name] for name in names if name in weights]
        on_host = self.config.offload_optimizer == "host"
        owned = held if on_host else [*held, *state]
        host = state if on_host else []
        return memory_report(owned, trained=trained, weights=held, host=host)

    def layer_statistics(self, batch: Batch) -> list[dict[str, Any]]:
        """See Update; what the last step has recorded of its blocks, whatever the batch. Sums
        alone are recorded, so there is no largest magnitude.
        """
        elements = len(batch.samples_B) * self.config.seq_length * self._model.hidden_size
        return [
            {
                "name": f"layer {layer}",
                "mean": float(size / max(1.0, elements - broken)),
                "not_finite": int(broken),
            }
            for layer, (size, broken) in enumerate(self._outputs_L2.tolist())
        ]

    def __call__(self, batch: Batch) -> StepResult:
        """Runs the next step and waits for it.

        A step whose gradients are not finite changes neither weights nor optimizer state.

        Raises:
            NotFiniteError: a loss or the gradients are not finite and no smaller loss scale could
                help.
        """
        progress, config = self.progress, self.config
        lr = learning_rate(config, progress.step)
        scale = progress.scale.value
        coefficients = self._cell.weight_update.plan.coefficients(progress.updates, lr)
        for setting, value in zip(self._cell.coefficients, coefficients, strict=True):
            ops.assign(setting, Tensor(value, ms.float32))
        ops.assign(self._cell.unscale, Tensor(1.0 / scale, ms.float32))
        scales = [1.0 / max(1, batch.tokens), 1.0 / max(1, batch.present), scale]
        ordered = in_order_of_micro_batches(
            batch, self._parallel.dp, config.gradient_accumulation_steps
        )
        rows = np.tile(np.array(scales, np.float32), (len(batch.samples_B), 1))
        with graph_mode():
            *arrays, random = batch_tensors(ordered, config.seed, progress.step)
            self._cell(*arrays, Tensor(rows), random)
        result = self._result(lr, scale)
        if result.finite and self._model.lora is None:
            here = self.storage.stage.layers
            update_gates(
                {layer: self._built.model.layers[layer] for layer in here},
                self._model.sparse_layers,
                result.routed_LE,
            )
        return advance(progress, config, batch, result)

    def _result(self, lr: float, scale: float) -> StepResult:
        config, norm = self.config, float(self._cell.norm_seen.asnumpy()[0])
        lm, metrics_LF = self._metrics()
        further = config.router_losses
        table_LF, routed_LE, kept_LE = np.split(metrics_LF, self._columns, 1)
        aux, z, *others = table_LF.sum(0) / max(1, len(table_LF))
        loss = lm + config.router_aux_loss_coef * aux + config.router_z_loss_coef * z
        loss += sum(c * each for c, each in zip(further.values(), others, strict=True))
        return StepResult(
            loss=float(loss),
            lm_loss=float(lm),
            aux_loss=float(aux),
            z_loss=float(z),
            grad_norm=norm,
            learning_rate=lr,
            loss_scale=scale,
            routed_LE=routed_LE,
            kept_LE=kept_LE,
            gradient_norms={} if math.isfinite(norm) else self.gradient_norms(),
            router_losses=dict(zip(further, map(float, others), strict=True)),
        )

    def gradient_norms(self) -> dict[str, float]:
        """Of each trained weight of this stage in the last step, before clipping and without the
        loss scale; all processes must ask.
        """
        squares_N = np.concatenate([each.asnumpy() for each in self._cell.norm.squares])
        norms_N = np.sqrt(self._parallel_context.sum_over_ranks(squares_N))
        unscale = float(self._cell.unscale.asnumpy())
        named = zip(self._cell.weight_update.names, norms_N.tolist(), strict=True)
        return {name: norm * unscale for name, norm in named if name in self.storage.specs}

    @property
    def _columns(self) -> tuple[int, int]:
        """Where the choices before and after the capacity begin in what is recorded of a layer."""
        experts = 0 if self._model.moe is None else self._model.moe.num_local_experts
        losses = 2 + len(self.config.router_losses)
        return losses, losses + experts

    def _metrics(self) -> tuple[np.float32, np.ndarray]:
        """The language-model loss, and what was recorded of each sparse layer, of all stages;
        keeps what was recorded of each block.
        """
        first, second = self._columns
        here = self.storage.stage.layers
        metrics_buffers = self._built.model.metrics_buffers()
        layers = [layer for layer in metrics_buffers if layer is not None]
        table = np.zeros((len(layers), 2 * second - first), np.float32)
        lm = np.zeros(1, np.float32)
        for row, layer in enumerate(layers):
            if layer in here:
                table[row] = metrics_buffers[layer].asnumpy()[0]
        if self.storage.stage.head:
            lm = metrics_buffers[None].asnumpy()[0]
        outputs_L2 = np.zeros((self._model.num_hidden_layers, 2), np.float32)
        buffers = self._built.model.output_buffers()
        for layer in here:
            outputs_L2[layer] = buffers[layer].asnumpy()[0]
        flat = np.concatenate([lm, table.ravel(), outputs_L2.ravel()])
        flat = self._parallel_context.sum_over_stages(flat)
        lm, metrics, outputs = np.split(flat, [1, 1 + table.size])
        self._outputs_L2 = outputs.reshape(outputs_L2.shape)
        return lm[0], metrics.reshape(table.shape)

    def _check_parts(self) -> None:
        """Raises where MindSpore has cut a weight otherwise than its checkpoints will be."""
        for name, parameter in self.weights().items():
            local_slice = self.storage.local_slice(name)
            part = tuple(each.stop - each.start for each in local_slice)
            wanted = self.storage.parameter_shape(name, part)
            if tuple(parameter.shape) != wanted:
                raise TopologyError(
                    "a weight is divided otherwise",
                    where=name,
                    value=list(parameter.shape),
                    rule=f"this rank's part is {list(wanted)}",
                )


def in_order_of_micro_batches(batch: Batch, dp: int, micro_batches: int) -> Batch:
    """The rows as MindSpore cuts them, so that each data-parallel rank sees what it sees on the
    explicit path: it takes micro-batches out of the whole batch and divides each among the ranks,
    where the explicit path gives each rank its rows and takes micro-batches out of those.

    Args:
        batch: the whole batch.
        dp: data-parallel ranks.
        micro_batches: of each.
    """
    rows = np.arange(len(batch.samples_B)).reshape(dp, micro_batches, -1).transpose(1, 0, 2).ravel()
    return batch.of_rows(rows)
