"""What the compiler would refuse without saying why, refused before it runs."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from mistral_ms.config import (
    ModelConfig,
    MoEArchitecture,
    ParallelConfig,
    PredictConfig,
    RoutingConfig,
    RunConfig,
)
from mistral_ms.errors import ConfigError
from mistral_ms.moe import make_gate, try_gates
from mistral_ms.optimizers import check_layout, make_plan
from mistral_ms.parallel.pipeline import check_objective, check_trained
from mistral_ms.weights import specs

Rule = tuple[bool, str, Any, str, str | None]
"""Whether it is broken, the key, its value, the rule, and what to do."""


def check_run(run: RunConfig, layers: int) -> None:
    """Raises if the auto-parallel graph cannot express a training.

    Args:
        run: the run; its layout is legal already.
        layers: how many decoder blocks are built.

    Raises:
        ConfigError: names the value and the rule.
    """
    model, parallel, training = run.model, run.parallel, run.training
    rows = training.global_batch_size // training.gradient_accumulation_steps // parallel.dp
    tokens = rows * training.seq_length
    sparse = bool(model.sparse_layers)
    rules: tuple[Rule, ...] = (
        (
            run.dpo is not None,
            "dpo",
            str(run.dpo),
            "pairs of answers are learnt with explicit execution",
            "set parallel.execution=explicit",
        ),
        (
            training.neftune_noise_alpha is not None,
            "training.neftune_noise_alpha",
            training.neftune_noise_alpha,
            "noise is added to embedded tokens with explicit execution",
            "set parallel.execution=explicit",
        ),
        (
            sparse and parallel.optimizer_parallel and _crosses_experts(model, parallel),
            "parallel.optimizer_parallel",
            f"{parallel.dp // parallel.ep} replicas",
            "a rank's share of the experts is some of them, or a part of one: replicas (dp / ep) "
            "divide a rank's experts (num_local_experts / ep), or the other way round",
            None,
        ),
        (
            parallel.pp > layers,
            "layers",
            layers,
            f"every one of the {parallel.pp} pipeline stages holds a layer",
            None,
        ),
        (
            training.gradient_accumulation_steps < parallel.pp,
            "training.gradient_accumulation_steps",
            training.gradient_accumulation_steps,
            f"a pipeline of {parallel.pp} stages needs at least as many micro-batches",
            f"{4 * parallel.pp} keep it busy",
        ),
        (
            parallel.world == 1 and training.gradient_accumulation_steps > 1,
            "training.gradient_accumulation_steps",
            training.gradient_accumulation_steps,
            "the graph of one process takes its batch at once",
            "set training.gradient_accumulation_steps=1, or parallel.execution=explicit",
        ),
        (
            parallel.world > 1
            and parallel.pp == 1
            and training.gradient_accumulation_steps > 1
            and parallel.optimizer_parallel
            and parallel.dp == (parallel.ep if sparse else 1),
            "parallel.optimizer_parallel",
            f"{training.gradient_accumulation_steps} micro-batches with dp={parallel.dp} "
            f"ep={parallel.ep} pp=1",
            "without a pipeline MindSpore adds gradients up for the optimizer's shards, and a "
            "weight that no two ranks hold alike has none",
            "use one micro-batch, more stages or a smaller ep, or leave it out",
        ),
        (
            parallel.pp > 1 and parallel.pipeline_scheduler != "1f1b",
            "parallel.pipeline_scheduler",
            parallel.pipeline_scheduler,
            "MindSpore's pipeline is 1f1b",
            None,
        ),
        (
            parallel.pp_interleave_num > 1,
            "parallel.pp_interleave_num",
            parallel.pp_interleave_num,
            "the graph's stages are one run of layers each",
            "set it to 1, or parallel.execution=explicit",
        ),
        (
            bool(tokens % parallel.mp),
            "training.seq_length",
            training.seq_length,
            f"the {tokens} tokens of a rank's micro-batch must be divisible by parallel.mp "
            f"({parallel.mp}): norms and residuals divide them",
            None,
        ),
    )
    _refuse((*_of_all_graphs(model, parallel), *rules))
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
    model, parallel = run.model, run.parallel
    rules: tuple[Rule, ...] = (
        (
            parallel.pp > 1,
            "parallel.pp",
            parallel.pp,
            "the graph of generation has one stage",
            "divide by mp and ep, or generate on the explicit path",
        ),
        *(
            (True, f"parallel.{name}", value, "there is no gradient", f"leave {name} out")
            for name, value in (
                ("optimizer_parallel", parallel.optimizer_parallel),
                ("recompute", parallel.recompute != "none" and parallel.recompute),
                (
                    "micro_batch_interleave_num",
                    parallel.micro_batch_interleave_num > 1 and parallel.micro_batch_interleave_num,
                ),
            )
            if value
        ),
    )
    _refuse((*_of_all_graphs(model, parallel), *rules))


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


def check_sparse_layer(moe: MoEArchitecture) -> None:
    """Raises if the graph has no region for a sparse layer.

    Args:
        moe: what the layer is.

    Raises:
        ConfigError: names the value and the rule.
    """
    gate, todo = f"{moe.gate.name} with parallel.execution graph", "use parallel.execution=explicit"
    _refuse(
        (
            (
                moe.gate.takes_ids,
                "model.moe.gate",
                gate,
                "the gate routes by token ids, which a region of the graph does not get",
                todo,
            ),
            (
                moe.gate.explicit_only,
                "model.moe.gate",
                gate,
                "the gate goes on until it is done, which a region of the graph cannot",
                todo,
            ),
            (
                moe.shared_expert_gate == "cmr",
                "model.moe.shared_expert_gate",
                "cmr with parallel.execution graph",
                "the budget's loss takes shares from outside of the sparse layer's region",
                todo,
            ),
        )
    )


def _crosses_experts(model: ModelConfig, parallel: ParallelConfig) -> bool:
    assert model.moe is not None
    replicas, experts = parallel.dp // parallel.ep, model.moe.num_local_experts // parallel.ep
    divided = experts * model.hidden_size % replicas == 0  # else they are not divided at all
    return divided and bool(experts % replicas) and bool(replicas % experts)


def _of_all_graphs(model: ModelConfig, parallel: ParallelConfig) -> tuple[Rule, ...]:
    divided = parallel.world > 1
    return (
        (
            model.lora is not None,
            "lora",
            str(model.lora),
            "adapters are trained with explicit execution",
            "set parallel.execution=explicit",
        ),
        (
            len(set(model.expert_counts)) > 1,
            "model.moe.num_local_experts",
            list(model.expert_counts),
            "what the graph records of its layers has one shape, so they have as many experts",
            "use parallel.execution=explicit",
        ),
        (
            divided and bool(parallel.world % 8) and parallel.world not in (2, 4),
            "parallel",
            f"dp * mp * pp = {parallel.world}",
            "MindSpore divides a graph among 2, 4, or a multiple of 8 devices",
            None,
        ),
        (
            divided and (bool(model.head_size % 16) or model.head_size > 512),
            "model.head_dim",
            model.head_size,
            "FlashAttentionScore takes heads of a multiple of 16, at most 512",
            None,
        ),
        (
            bool(model.hidden_size % parallel.mp),
            "model.hidden_size",
            model.hidden_size,
            f"must be divisible by parallel.mp ({parallel.mp})",
            None,
        ),
    )


def _refuse(rules: Iterable[Rule]) -> None:
    for broken, where, value, rule, todo in rules:
        if broken:
            raise ConfigError("impossible graph", where=where, value=value, rule=rule, todo=todo)
