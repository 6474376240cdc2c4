"""From a run to its training step, and what MindSpore is told before."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from mindspore import ParameterTuple, Tensor, context, nn, set_recursion_limit
from mindspore.communication import get_rank
from mindspore.nn.utils import no_init_parameters

from mistral_ms.config import ModelConfig, PredictConfig, RunConfig
from mistral_ms.models import recompute
from mistral_ms.moe import router_loss_terms
from mistral_ms.optimizers import StoredMatrices, WeightUpdate, make_plan
from mistral_ms.parallel.graph.checks import check_run
from mistral_ms.parallel.graph.layer_factory import GraphLayerFactory
from mistral_ms.parallel.graph.metrics import LossCoefficients
from mistral_ms.parallel.graph.model import GraphModel, LazyGraphModel
from mistral_ms.parallel.graph.step import GlobalNorm, TrainingGraph
from mistral_ms.parallel.pipeline import stages_of
from mistral_ms.parallel.sharding import Sharding, graph_form, replica_fraction
from mistral_ms.parallel.topology import gradient_group
from mistral_ms.weights import ParamSpec, specs


def set_context(run: RunConfig | PredictConfig) -> None:
    """Tells MindSpore how the graphs of a run are divided.

    The device target must be Ascend and ``mindspore.communication.init()`` must have been called.
    All earlier settings are forgotten.

    Args:
        run: a training, or a prediction.
    """
    parallel = run.parallel
    context.reset_auto_parallel_context()
    context.set_auto_parallel_context(
        parallel_mode="semi_auto_parallel",
        device_num=parallel.world,
        full_batch=True,
        pipeline_stages=parallel.pp,
        enable_alltoall=True,  # else a change of layout is an AllGather and a cut
        gradients_mean=False,  # the loss is a sum of shares already
        enable_parallel_optimizer=parallel.optimizer_parallel,
        parallel_optimizer_config={"parallel_optimizer_threshold": 0},
    )


@dataclass(frozen=True)
class GraphStep:
    """A training step that is ready to be compiled: ``step.cell.compile(*step.inputs)``.

    Attributes:
        cell: the step.
        inputs: tensors of the shapes and dtypes that the step takes, all zero.
        model: the net inside it.
        segmented: whether attention keeps documents apart. When false it is causal and needs all
            padding at the end of a sequence.
    """

    cell: TrainingGraph
    inputs: tuple[Tensor, ...]
    model: GraphModel
    segmented: bool


def build(
    run: RunConfig,
    layers: int | None = None,
    segmented: bool | None = None,
    token_nll: nn.Cell | None = None,
) -> GraphStep:
    """The training step of a run; its weights are not initialised.

    With one process it is an ordinary graph for any device. With more, :func:`set_context` must
    have been called.

    Args:
        run: the run.
        layers: builds only so many decoder blocks.
        segmented: whether sequences hold documents that do not see each other; None takes the
            run's word for it, which says nothing about a dataset that is there already.
        token_nll: see :class:`~mistral_ms.parallel.graph.model.GraphModel`.

    Raises:
        ConfigError: the run cannot be expressed, see
            :func:`~mistral_ms.parallel.graph.checks.check_run`.
        TopologyError: there are more or fewer processes than the layout has.
    """
    # of calls in a graph: updating a weight takes three, and MindSpore's own limit of 1000 is less
    # than 32 layers need
    set_recursion_limit(10_000)
    model, layer_factory = build_model(run, layers, segmented, token_nll, records_outputs=True)
    with no_init_parameters():
        update = _weight_update(run, model, layer_factory)
        cell = _step(run, model, update, layer_factory.sharding)
    return GraphStep(cell, _inputs(run), model, layer_factory.segmented)


def build_model(
    run: RunConfig,
    layers: int | None = None,
    segmented: bool | None = None,
    token_nll: nn.Cell | None = None,
    records_outputs: bool = False,
) -> tuple[GraphModel, GraphLayerFactory]:
    """The net inside a training step, its weights not initialised; for another program's step.

    Args:
        run: the run.
        layers: see :func:`build`.
        segmented: see :func:`build`.
        token_nll: see :func:`build`.
        records_outputs: every block records how large its output is.

    Returns:
        The net, and what has made its pieces.

    Raises:
        ConfigError: see :func:`build`.
        TopologyError: see :func:`build`.
    """
    config, parallel, training = run.model, run.parallel, run.training
    if layers is not None:
        config = config.model_copy(update={"num_hidden_layers": layers})
    parallel.check(config)
    check_run(run, config.num_hidden_layers)
    if segmented is None:
        segmented = run.data is not None and run.data.packing.boundaries == "attention"
    with no_init_parameters():
        layer_factory = GraphLayerFactory(
            config,
            run.routing,
            parallel,
            training.dtype,
            sequence=training.seq_length,
            segmented=segmented,
            losses=_coefficients(run, config),
            records_outputs=records_outputs,
        )
        held = stages_of(config, parallel.pp)
        stages = tuple(stage.number for stage in held for _ in stage.layers)
        several = parallel.world > 1 and training.gradient_accumulation_steps > 1
        model = (LazyGraphModel if several else GraphModel)(layer_factory, stages, token_nll)
        recompute(model.layers, parallel.recompute)
    return model, layer_factory


def _coefficients(run: RunConfig, config: ModelConfig) -> LossCoefficients:
    """Of the router's losses; whatever is not pooled is a mean over layers."""
    training, sparse = run.training, max(1, len(config.sparse_layers))
    pooled = run.routing.aux_loss == "pooled" and run.parallel.pp == 1
    aux = training.router_aux_loss_coef if pooled else training.router_aux_loss_coef / sparse
    others = {name: value / sparse for name, value in training.router_losses.items()}
    router_loss_terms(config, tuple(others))  # which are not there are refused
    return LossCoefficients(aux, training.router_z_loss_coef / sparse, others, pooled)


def _weight_update(
    run: RunConfig, model: GraphModel, layer_factory: GraphLayerFactory
) -> WeightUpdate:
    """The optimizer of the weights that are trained.

    Args:
        run: the run.
        model: all its weights are whole; it may have fewer layers than the run's.
        layer_factory: has made the model's pieces.
    """
    training, weights = run.training, model.weights()
    plan = make_plan(training, specs(run.model))
    for name, weight in weights.items():  # MindSpore's pipeline adds up what wants a gradient
        weight.requires_grad = name in plan.group_of
    trained = {name: weight for name, weight in weights.items() if weight.requires_grad}
    stored = {
        name: stored_matrices(model.specs[name], layer_factory)
        for name in trained
        if not plan.groups[plan.group_of[name]].rule.elementwise
    }
    return WeightUpdate(trained, plan, on_host=training.offload_optimizer == "host", stored=stored)


def stored_matrices(spec: ParamSpec, layer_factory: GraphLayerFactory) -> StoredMatrices | None:
    """How a parameter keeps its matrices at the update; None: whole, as checkpoints do.

    Args:
        spec: of the weight, a matrix or stacked ones, whose columns nothing divides.
        layer_factory: of the model.
    """
    form, sharding, groups = graph_form(spec), layer_factory.sharding, layer_factory.groups
    group = None
    if sharding is not None and groups is not None:
        divides = layer_factory.parallel.optimizer_parallel
        if sharding.optimizer_shards(form.layout, form.shape, divides) > 1:
            group = groups.of(gradient_group(spec))
    if group is None and not spec.stacked:
        return None
    return StoredMatrices(form.rows or form.shape[0], form.order == (0, 2, 1), group)


def _step(
    run: RunConfig, model: GraphModel, update: WeightUpdate, sharding: Sharding | None
) -> TrainingGraph:
    training, parallel = run.training, run.parallel
    metrics_buffers = (*model.metrics_buffers().values(), *model.output_buffers())
    net, reducer = model, None
    if parallel.pp > 1:
        net = nn.PipelineCell(model, training.gradient_accumulation_steps)
    elif training.gradient_accumulation_steps > 1:
        net = nn.GradAccumulationCell(model, training.gradient_accumulation_steps)
    if training.gradient_accumulation_steps > 1:
        every = ParameterTuple((*update.weights, *metrics_buffers))
        reducer = nn.PipelineGradReducer(every, opt_shard=parallel.optimizer_parallel)
    rank = 0 if sharding is None else get_rank()
    fractions = tuple(
        replica_fraction(model.specs[name], sharding, parallel.optimizer_parallel, rank)
        for name in update.names
    )
    norm = GlobalNorm(fractions, sharding is not None)
    step = TrainingGraph(net, update, norm, training.max_grad_norm, reducer, metrics_buffers)
    step.set_train()
    return step


def _inputs(run: RunConfig) -> tuple[Tensor, ...]:
    B, S = run.training.global_batch_size, run.training.seq_length
    batch = tuple(Tensor(np.zeros((B, S), np.int32)) for _ in range(4))
    columns = 3 + (run.model.moe is not None and run.model.moe.gate.row_domains > 1)
    scales, random = np.zeros((B, 3), np.float32), np.zeros((B, columns), np.int32)
    return (*batch, Tensor(scales), Tensor(random))
