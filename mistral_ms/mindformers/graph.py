"""The auto-parallel graph under MindFormers' steps, for several processes on Ascend.

MindFormers' trainer cuts a batch into micro-batches and differentiates the sum of their losses. The
graph of :mod:`mistral_ms.parallel.graph` wants, for each row, what share of the whole batch a
micro-batch has, and the loss scale: its router losses start in the middle of the net and do not see
the gradient that MindFormers sends in at its end. :class:`WholeBatch` makes these inputs in front
of the net.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.common.initializer import Normal, initializer
from mindspore.communication import get_rank

from mistral_ms.checkpoint.load import load_weights
from mistral_ms.config import IGNORE_INDEX, PredictConfig, RunConfig
from mistral_ms.config.base import validate
from mistral_ms.errors import ConfigError
from mistral_ms.mindformers.config import MistralConfig, dtype_name
from mistral_ms.mindformers.monitor import StepLosses
from mistral_ms.mindformers.weights import open_same
from mistral_ms.parallel.graph import (
    GraphNextToken,
    build_model,
    decode,
    generation_storage,
)
from mistral_ms.parallel.graph.model import GraphModel
from mistral_ms.parallel.graph.step import NORM_EPS, GlobalNorm
from mistral_ms.parallel.pipeline import stages_of
from mistral_ms.parallel.sharding import Sharding, replica_fraction
from mistral_ms.weights import Specs

_hyper_map = ops.HyperMap()
_scale = ops.MultitypeFuncGraph("scale")


@_scale.register("Tensor", "Tensor")
def _scaled(factor: Tensor, gradient: Tensor) -> Tensor:
    return gradient * ops.cast(factor, gradient.dtype)


def is_divided() -> bool:
    """Whether MindSpore divides graphs among several processes."""
    return ms.get_auto_parallel_context("parallel_mode") in ("semi_auto_parallel", "auto_parallel")


def run_of(config: MistralConfig) -> RunConfig:
    """The run that MindFormers' configuration describes; its length and its optimizer say nothing.

    Raises:
        ConfigError: a layout that cannot be, or that does not divide the model.
    """
    theirs = config.parallel_config
    architecture = config.architecture()
    routing = config.routing(training=True)
    aux, z = config.router_loss_coefficients()
    moe = config.moe_config
    if theirs.pipeline_stage > 1:
        routing = routing.model_copy(update={"aux_loss": "per_layer"})
    micro = theirs.micro_batch_num if theirs.pipeline_stage > 1 else 1
    values = {
        "model": architecture,
        "routing": routing,
        "training": {
            "max_steps": 1,
            "seq_length": config.seq_length,
            "global_batch_size": config.batch_size * theirs.data_parallel * micro,
            "gradient_accumulation_steps": micro,
            "dtype": dtype_name(config.compute_dtype, "model_config.compute_dtype"),
            "router_aux_loss_coef": aux,
            "router_z_loss_coef": z,
        },
        "parallel": {
            "dp": theirs.data_parallel,
            "mp": theirs.model_parallel,
            "pp": theirs.pipeline_stage,
            "ep": theirs.expert_parallel,
            "optimizer_parallel": bool(ms.get_auto_parallel_context("enable_parallel_optimizer")),
            "group_wise_a2a": bool(moe.group_wise_a2a) and theirs.model_parallel > 1,
            "recompute": config.recompute,
            "execution": "graph",
        },
    }
    return validate(RunConfig, values, "parallel_config")


def _check_place(world: int) -> None:
    """Raises for several processes that are not on Ascend."""
    target = ms.get_context("device_target")
    if world > 1 and target != "Ascend":
        raise ConfigError(
            "unsupported value",
            where="parallel.parallel_mode",
            value=f"semi_auto_parallel on {target}",
            rule="MindSpore divides graphs for Ascend alone",
            todo="set parallel_mode: 0, which gives every process the whole model",
        )


def prediction_of(config: MistralConfig) -> PredictConfig:
    """The prediction that MindFormers' configuration describes.

    Raises:
        ConfigError: a layout that cannot be, or that does not divide the model.
    """
    theirs = config.parallel_config
    values = {
        "model": config.architecture(),
        "prediction": {
            "batch": config.batch_size,
            "max_length": config.seq_length,
            "chunk": config.seq_length,
            "dtype": dtype_name(config.compute_dtype, "model_config.compute_dtype"),
        },
        "parallel": {
            "dp": theirs.data_parallel,
            "mp": theirs.model_parallel,
            "pp": theirs.pipeline_stage,
            "ep": theirs.expert_parallel,
            "execution": "graph",
        },
    }
    return validate(PredictConfig, values, "parallel_config")


def build_generator(config: MistralConfig) -> GraphNextToken:
    """The graph of generation with this rank's parts of the weights: compiled, for it is the
    compiler that divides them.

    Args:
        config: of a prediction; its ``weights_from`` is a whole checkpoint of the model.

    Raises:
        ConfigError: no checkpoint, or see :func:`prediction_of` and
            :func:`~mistral_ms.parallel.graph.decode`.
        CheckpointError: see :func:`~mistral_ms.checkpoint.open_checkpoint`.
        TopologyError: more or fewer processes than the layout has.
    """
    if not config.weights_from:
        raise ConfigError(
            "no weights",
            where="model_config.weights_from",
            rule="several processes generate with weights that the model itself reads",
            todo="set load_checkpoint, with python -m mistral_ms.mindformers.run",
        )
    run = prediction_of(config)
    _check_place(run.parallel.world)
    built = decode(run)
    rank = 0
    if run.parallel.world > 1:
        rank = get_rank()
        built.cell.compile(*built.inputs)
    else:
        for parameter in built.cell.get_parameters():
            parameter.init_data()
    with open_same(Path(config.weights_from), run.model) as source:
        load_weights(source, built.cell.weights(), storage=generation_storage(run, rank))
    return built.cell


def build_graph(config: MistralConfig) -> tuple[GraphModel, Sharding | None, RunConfig]:
    """The net of a configuration; its weights are drawn when MindSpore has divided them.

    Raises:
        ConfigError: see :func:`run_of` and :func:`~mistral_ms.parallel.graph.build`; several
            processes that are not on Ascend.
        TopologyError: more or fewer processes than the layout has.
    """
    run = run_of(config)
    _check_place(run.parallel.world)
    # every weight is divided, as the norm of the gradients counts them
    ms.set_auto_parallel_context(parallel_optimizer_config={"parallel_optimizer_threshold": 0})
    model, layer_factory = build_model(run, segmented=False)
    for name, parameter in model.weights().items():
        spec = model.specs[name]
        draw: Any = Normal(spec.std) if spec.init == "normal" else spec.init
        parameter.set_data(initializer(draw, parameter.shape, parameter.dtype))
    for buffer in model.metrics_buffers().values():
        buffer.requires_grad = False  # no weight for MindFormers' optimizer; our step records them
    return model, layer_factory.sharding, run


def recorded_losses(model: GraphModel, sharding: Sharding | None, run: RunConfig) -> StepLosses:
    """What the last step's loss consisted of, of the stage of this process.

    Args:
        model: the net, whose buffers the step has filled.
        sharding: the table; None on one device.
        run: of the net.
    """
    config, pp = run.model, run.parallel.pp
    stage = stages_of(config, pp)[0 if sharding is None else get_rank() // sharding.ranks]
    layers = tuple(layer for layer in config.sparse_layers if layer in stage.layers)
    experts = 0 if config.moe is None else config.moe.num_local_experts
    buffers, columns = model.metrics_buffers(), 2 + 2 * experts
    table_LF = np.array([buffers[layer].asnumpy()[0] for layer in layers]).reshape(-1, columns)
    losses_L2, routed_LE, kept_LE = np.split(table_LF, (2, 2 + experts), 1)
    aux, z = losses_L2.sum(0) / max(1, len(layers))
    lm = float(buffers[None].asnumpy()[0, 0]) if stage.head else None
    return StepLosses(lm, float(aux), float(z), routed_LE, kept_LE, layers if pp > 1 else None)


class WholeBatch(nn.Cell):
    """The inputs of :class:`~mistral_ms.parallel.graph.model.GraphModel` of a whole batch. Every
    process has all rows here.

    Args:
        seq_length: S.
        pad_token_id: of tokens behind the last real one; -1: there are none.
        ignore_token_id: of labels that do not count.
    """

    def __init__(self, seq_length: int, pad_token_id: int, ignore_token_id: int) -> None:
        super().__init__(auto_prefix=False)
        self.length, self.pad, self.ignore = seq_length, pad_token_id, ignore_token_id
        self.column_1S = Tensor(np.arange(seq_length, dtype=np.int32).reshape(1, -1))
        whole, scalar = (1, 1), ()
        self.cut = ops.StridedSlice().shard((whole,))
        self.minus = ops.Sub().shard((whole, whole))
        self.plus = ops.Add().shard((whole, whole))
        self.shift = ops.Add().shard((whole, scalar))
        self.equal = ops.Equal().shard((whole, scalar))
        self.either = ops.LogicalOr().shard((whole, whole))
        self.negated = ops.LogicalNot().shard((whole,))
        self.select = ops.Select().shard((whole, whole, whole))
        self.largest = ops.ReduceMax(keep_dims=True).shard((whole,))
        self.at_most = ops.LessEqual().shard((whole, whole))
        self.cast = ops.Cast().shard((whole,))
        self.sum = ops.ReduceSum().shard((whole,))
        self.times = ops.Mul().shard((whole, scalar))
        self.larger = ops.Maximum().shard((scalar, scalar))
        self.divide = ops.RealDiv().shard((scalar, scalar))
        self.join = ops.Concat(1).shard((whole, whole, whole))
        self.one = Tensor(1.0, ms.float32)

    def construct(
        self, scale: Tensor, input_ids: Tensor, labels: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Tokens, labels, positions, segments [B, S]; scales and random numbers [B, 3].

        Args:
            scale: float32 scalar, the loss scale.
            input_ids: int32 [B, S + 1].
            labels: int32 [B, S + 1]; None: the tokens themselves.
        """
        rows, S = input_ids.shape[0], self.length
        tokens = self.cut(input_ids, (0, 0), (rows, S), (1, 1))
        given = input_ids if labels is None else labels
        targets = self.cut(given, (0, 1), (rows, S + 1), (1, 1))
        zero = self.minus(tokens, tokens)
        column, absent = self.plus(zero, self.column_1S), self.shift(zero, -1)
        padding = self.equal(tokens, self.pad)
        ignored = self.either(padding, self.equal(targets, self.ignore))
        targets = self.select(ignored, self.shift(zero, IGNORE_INDEX), targets)
        last_B1 = self.largest(self.select(padding, absent, column), 1)
        positions = self.select(self.at_most(column, last_B1), column, absent)
        counted = self.count(self.negated(self.equal(targets, IGNORE_INDEX)))
        present = self.count(self.negated(self.equal(positions, -1)))
        zero_B1 = self.cut(zero, (0, 0), (rows, 1), (1, 1))
        one_B1 = self.shift(self.cast(zero_B1, ms.float32), 1.0)
        scales = self.join(
            (self.times(one_B1, counted), self.times(one_B1, present), self.times(one_B1, scale))
        )
        random = self.join((zero_B1, zero_B1, zero_B1))
        return tokens, targets, positions, zero, scales, random

    def count(self, condition: Tensor) -> Tensor:
        """One over how many are true, a float32 scalar."""
        found = self.sum(self.cast(condition, ms.float32), ())
        return self.divide(self.one, self.larger(found, self.one))


class GraphClipping(nn.Cell):
    """Clipping by the norm over all stages and all processes' parts, in the place of MindFormers'.

    Args:
        names: of the weights, in the order of the gradients.
        specs: of the model.
        sharding: the table of layouts.
        optimizer_parallel: whether the update is divided among replicas.
        max_grad_norm: gradients are scaled down to this norm.
    """

    def __init__(
        self,
        names: tuple[str, ...],
        specs: Specs,
        sharding: Sharding | None,
        optimizer_parallel: bool,
        max_grad_norm: float,
    ) -> None:
        super().__init__()
        rank = 0 if sharding is None else get_rank()
        fractions = tuple(
            replica_fraction(specs[name], sharding, optimizer_parallel, rank) for name in names
        )
        self.norm, self.limit = GlobalNorm(fractions, sharding is not None), max_grad_norm

    def construct(self, gradients: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor]:
        """The clipped gradients, and the norm they had, float32 [1]."""
        norm = self.norm(gradients)
        factor = ops.minimum(self.limit / (norm + NORM_EPS), ops.ones_like(norm))
        return _hyper_map(ops.partial(_scale, factor), gradients), norm
