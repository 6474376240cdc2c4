"""What the compiler would refuse without saying why, refused before it runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import reduce
from typing import Any, NamedTuple

from mistral_ms.config import (
    ModelConfig,
    MoEArchitecture,
    PredictConfig,
    RoutingConfig,
    RunConfig,
)
from mistral_ms.errors import ConfigError
from mistral_ms.moe import make_gate, try_gates
from mistral_ms.optimizers import check_layout, make_plan
from mistral_ms.parallel.adapters import adapters_outside_graph
from mistral_ms.parallel.pipeline import check_objective, check_trained
from mistral_ms.weights import specs

EXPLICIT = "set parallel.execution=explicit"


class Broken(NamedTuple):
    """A rule that does not hold: where, why, what to do, and what stands there; None: what the
    configuration has under that key.
    """

    where: str
    rule: str
    todo: str | None = None
    value: Any = None


def check_run(run: RunConfig, layers: int) -> None:
    """Raises if the auto-parallel graph cannot express a training.

    Args:
        run: the run; its layout is legal already.
        layers: how many decoder blocks are built.

    Raises:
        ConfigError: names the value and the rule.
    """
    model, parallel, training = run.model, run.parallel, run.training
    for broken in (*_of_graph(run), *_of_training(run, layers)):
        refuse(broken, run)
    check_objective(model, run.routing, parallel, training.router_aux_loss_coef)
    built = model.model_copy(update={"num_hidden_layers": layers})
    plan = make_plan(training, specs(model))
    check_layout(plan, parallel)
    check_trained(built, parallel.pp, plan.group_of)


def check_prediction(run: PredictConfig) -> None:
    """Raises if the auto-parallel graph cannot express the generation of a model.

    Args:
        run: model, layout and cache; its layout is legal already.

    Raises:
        ConfigError: names the value and the rule.
    """
    for broken in (*_of_graph(run), *_of_prediction(run)):
        refuse(broken, run)


def check_gate(model: ModelConfig, routing: RoutingConfig, *, training: bool) -> None:
    """Tries the gate on a few rows (:func:`~mistral_ms.moe.try_gates`), before MindSpore is told
    that it divides graphs. In its dry run, which computes nothing, there is nothing to try.

    Args:
        model: the whole model.
        routing: its policy.
        training: whether gradients will be asked for.

    Raises:
        ConfigError: the gate breaks its contract.
    """
    if model.sparse_layers and "MS_SIMULATION_LEVEL" not in os.environ:
        try_gates(make_gate(model, routing), model, training)


def check_sparse_layer(moe: MoEArchitecture, pp: int) -> None:
    """Raises if the graph has no region for a sparse layer.

    Args:
        moe: what the layer is.
        pp: stages.

    Raises:
        ConfigError: names the value and the rule.
    """
    by_ids = moe.gate.takes_ids and pp > 1
    for broken, key, value, why in (
        (by_ids, "gate", moe.gate.name, f"with parallel.pp {pp} it gets the ids of all ranks"),
        (moe.gate.explicit_only, "gate", moe.gate.name, "it cannot go on until the gate is done"),
        (moe.shared_expert_gate == "cmr", "shared_expert_gate", "cmr", "it does not see shares"),
    ):
        if broken:
            value, rule = f"{value} with parallel.execution graph", f"a region of the graph: {why}"
            refuse(Broken(f"model.moe.{key}", rule, EXPLICIT, value))


def _of_graph(run: RunConfig | PredictConfig) -> Iterator[Broken]:
    model, parallel = run.model, run.parallel
    for key, value, why in adapters_outside_graph(model, parallel):
        yield Broken(key, why, EXPLICIT, value)
    if len(set(model.expert_counts)) > 1:
        why = "what the graph records of its layers has one shape, so they have as many experts"
        yield Broken("model.moe.num_local_experts", why, EXPLICIT, list(model.expert_counts))
    if parallel.world % 8 and parallel.world not in (1, 2, 4):
        why = "MindSpore divides a graph among 2, 4, or a multiple of 8 devices"
        yield Broken("parallel", why, value=f"dp * mp * pp = {parallel.world}")
    if parallel.world > 1 and (model.head_size % 16 or model.head_size > 512):
        why = "FlashAttentionScore takes heads of a multiple of 16, at most 512"
        yield Broken("model.head_dim", why, value=model.head_size)
    if model.hidden_size % parallel.mp:
        yield Broken("model.hidden_size", f"must be divisible by parallel.mp ({parallel.mp})")


def _of_training(run: RunConfig, layers: int) -> Iterator[Broken]:
    model, parallel, training = run.model, run.parallel, run.training
    micro, several = "training.gradient_accumulation_steps", training.gradient_accumulation_steps
    tokens = training.global_batch_size // several // parallel.dp * training.seq_length
    if run.dpo is not None:
        why = "pairs of answers are learnt with explicit execution"
        yield Broken("dpo", why, EXPLICIT, str(run.dpo))
    if training.neftune_noise_alpha is not None:
        why = "noise is added to embedded tokens with explicit execution"
        yield Broken("training.neftune_noise_alpha", why, EXPLICIT)
    if parallel.optimizer_parallel and _crosses_experts(run):
        why = (
            "a rank's shard of the experts is some of them, or a part of one: replicas (dp / ep) "
            "divide a rank's experts (num_local_experts / ep), or the other way round"
        )
        value = f"{parallel.dp // parallel.ep} replicas"
        yield Broken("parallel.optimizer_parallel", why, value=value)
    if parallel.pp > layers:
        why = f"every one of the {parallel.pp} pipeline stages holds a layer"
        yield Broken("layers", why, value=layers)
    if several < parallel.pp:
        why = f"a pipeline of {parallel.pp} stages needs at least as many micro-batches"
        yield Broken(micro, why, f"{4 * parallel.pp} keep it busy")
    if parallel.world == 1 and several > 1:
        why = "the graph of one process takes its batch at once"
        yield Broken(micro, why, f"set {micro}=1, or parallel.execution=explicit")
    alone = parallel.world > 1 and parallel.dp == (parallel.ep if model.sparse_layers else 1)
    if parallel.optimizer_parallel and several > 1 and parallel.pp == 1 and alone:
        why = (
            "without a pipeline MindSpore adds gradients up for the optimizer's shards, and a "
            "weight that no two ranks hold alike has none"
        )
        todo = "use one micro-batch, more stages or a smaller ep, or leave it out"
        value = f"{several} micro-batches with dp={parallel.dp} ep={parallel.ep} pp=1"
        yield Broken("parallel.optimizer_parallel", why, todo, value)
    if parallel.pp > 1 and parallel.pipeline_scheduler != "1f1b":
        yield Broken("parallel.pipeline_scheduler", "MindSpore's pipeline is 1f1b")
    if parallel.pp_interleave_num > 1:
        why = "the graph's stages are one run of layers each"
        yield Broken("parallel.pp_interleave_num", why, f"set it to 1, or {EXPLICIT[4:]}")
    if tokens % parallel.mp:
        why = (
            f"the {tokens} tokens of a rank's micro-batch must be divisible by parallel.mp "
            f"({parallel.mp}): norms and residuals divide them"
        )
        yield Broken("training.seq_length", why)


def _of_prediction(run: PredictConfig) -> Iterator[Broken]:
    parallel = run.parallel
    if parallel.pp > 1:
        todo = "divide by mp and ep, or generate on the explicit path"
        yield Broken("parallel.pp", "the graph of generation has one stage", todo)
    for name, without in (
        ("optimizer_parallel", False),
        ("recompute", "none"),
        ("micro_batch_interleave_num", 1),
    ):
        if getattr(parallel, name) != without:
            yield Broken(f"parallel.{name}", "there is no gradient", f"leave {name} out")


def _crosses_experts(run: RunConfig) -> bool:
    model, parallel = run.model, run.parallel
    if model.moe is None or not model.sparse_layers:
        return False
    replicas, experts = parallel.dp // parallel.ep, model.moe.num_local_experts // parallel.ep
    divided = experts * model.hidden_size % replicas == 0  # else they are not divided at all
    return divided and bool(experts % replicas) and bool(replicas % experts)


def refuse(broken: Broken, run: RunConfig | PredictConfig | None = None) -> None:
    """Raises.

    Args:
        broken: what for.
        run: has what stands there, unless that is said.

    Raises:
        ConfigError: always.
    """
    where, rule, todo, value = broken
    if value is None:
        value = reduce(getattr, where.split("."), run)
    raise ConfigError("impossible graph", where=where, value=value, rule=rule, todo=todo)
