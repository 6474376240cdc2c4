"""What a run needs before its first step: data, tokenizer, weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

import mindspore as ms
from mindspore import Parameter

from mistral_ms.checkpoint import Source, open_checkpoint, open_merged, tokenizer_files
from mistral_ms.checkpoint.load import kept_quantization, load_weights
from mistral_ms.checkpoint.run_files import RunFiles
from mistral_ms.config import DROPLESS, DataConfig, DataSourceConfig, PackingConfig, RunConfig
from mistral_ms.config.computation import check_same_model
from mistral_ms.config.quantization import Quantization
from mistral_ms.config.run import data_of
from mistral_ms.datasets import DomainSequences, MindRecordSequences, build_dataset, check_length
from mistral_ms.errors import ConfigError, TokenizerError
from mistral_ms.models import CausalLM
from mistral_ms.moe import make_gate, router_loss_terms, try_gates
from mistral_ms.optimizers import check_layout, make_plan, with_settings
from mistral_ms.parallel.context import ParallelContext
from mistral_ms.parallel.pipeline import check_objective, check_trained
from mistral_ms.parallel.storage import Storage
from mistral_ms.tokenizer import Tokenizer, end_token_notes, find_tokenizer, load_tokenizer
from mistral_ms.weights import specs

Say = Callable[[str], None]
Packed = MindRecordSequences | DomainSequences
"""What is read from disk."""


def check_device(run: RunConfig) -> None:
    """Checks that the device has kernels for the run's dtype.

    Raises:
        ConfigError: it has not.
    """
    device = ms.get_context("device_target")
    if run.training.dtype == "bfloat16" and device == "CPU":
        raise ConfigError(
            "dtype without kernels",
            where="training.dtype",
            value="bfloat16 on CPU",
            rule="MindSpore's CPU back end multiplies float32 and (slowly) float16 matrices only",
            todo="use float32 here; bfloat16 is for Ascend",
        )


def check_settings(run: RunConfig) -> RunConfig:
    """Everything that can be said of a run without data, which may take long to pack.

    Returns:
        The run, its optimizer's settings spelled out.

    Raises:
        ConfigError: a dtype that the device does not compute in; an optimizer, its settings or its
            parameter groups; losses that the layout cannot form or the gate does not have; a gate
            with impossible settings, or one that breaks its contract; what the layout or the
            auto-parallel graph cannot train; preferences without a reference.
    """
    check_device(run)
    run = run.model_copy(update={"training": with_settings(run.training)})
    plan = make_plan(run.training, specs(run.model))
    graph = run.parallel.execution_on(ms.get_context("device_target")) == "graph"
    check_layout(plan, run.parallel)
    check_trained(run.model, run.parallel.pp, plan.group_of)
    check_objective(run.model, run.routing, run.parallel, run.training.router_aux_loss_coef)
    router_loss_terms(run.model, tuple(run.training.router_losses))
    if run.dpo is not None and run.init_from is None:
        raise ConfigError(
            "preferences without a model",
            where="init_from",
            rule="the model that a training with dpo begins with is its reference",
            todo="name a checkpoint",
        )
    if run.model.sparse_layers:
        try_gates(make_gate(run.model, run.routing), run.model, training=True)
    _check_way(run, graph)
    return run


def _check_way(run: RunConfig, graph: bool) -> None:
    """Raises where the auto-parallel graph, or a layout, has what it cannot train."""
    parallel = run.parallel
    frozen = 0 if run.model.moe is None else run.model.moe.gate.frozen
    divided = {"parallel.mp": parallel.mp, "parallel.pp": parallel.pp}
    given: dict[str, tuple[Any, dict[str, int], str]] = {
        "model.moe.gate.frozen_experts": (frozen or None, {}, ""),
        "distillation": (
            run.distillation and run.distillation.path,
            divided,
            "each process has the other model, and both models' logits, whole",
        ),
    }
    for key, (value, of_one, rule) in given.items():
        if value is None:
            continue
        if graph:
            raise ConfigError(
                "impossible layout",
                where=key,
                value=f"{value} with parallel.execution graph",
                rule="is trained with explicit execution alone",
                todo="leave it out, or set parallel.execution=explicit",
            )
        for size, number in of_one.items():
            if number > 1:
                raise ConfigError(
                    "impossible layout",
                    where=key,
                    value=f"{value} with {size} {number}",
                    rule=rule,
                    todo=f"leave it out, or set {size}=1",
                )


def open_teacher(run: RunConfig, say: Say) -> tuple[CausalLM, float] | None:
    """The model that the training is held to, dropless, and the coefficient; None without one.

    Raises:
        ConfigError: it has another vocabulary.
        CheckpointError: it cannot be read.
    """
    start = run.distillation
    if start is None:
        return None
    with open_checkpoint(
        start.path, start.format, verify=start.verify, follow_links=start.follow_links
    ) as source:
        if source.config.vocab_size != run.model.vocab_size:
            raise ConfigError(
                "another vocabulary",
                where=f"distillation {start.path}",
                value=source.config.vocab_size,
                rule=f"the model that is trained has model.vocab_size {run.model.vocab_size}",
            )
        length = run.training.seq_length
        model = CausalLM(source.config, DROPLESS, dtype=run.training.dtype, positions=length)
        load_weights(source, model.weights())
    say(f"held to the outputs of {start.path}, coefficient {start.coefficient:g}")
    return model, start.coefficient


def open_data(
    run: RunConfig,
    files: RunFiles,
    parallel_context: ParallelContext,
    say: Say,
    *,
    resuming: bool = False,
) -> tuple[Packed, Tokenizer | None]:
    """The sequences, packed first where the run names texts; and the tokenizer, if one is known.

    A run that goes on has its sequences in its own directory: texts, tokenizer and base model may
    be gone by then.

    Raises:
        ConfigError: no data, or sequences of another length than the run's.
        DataError: texts or a dataset that cannot be read, or that are not for this model.
    """
    data = data_of(run)
    packed = data.dataset is None and files.dataset.exists()
    tokenizer = tokenizer_of(run, optional=resuming and (packed or data.dataset is not None))
    sequences = _sequences(
        run, data, files.dataset, run.training.global_batch_size, tokenizer, parallel_context, say
    )
    if tokenizer is not None and parallel_context.is_rank_0:
        for note in end_token_notes(tokenizer, run.model.eos_token_ids):
            say(f"note: {note}")
    return sequences, tokenizer


def open_held_out(
    run: RunConfig,
    files: RunFiles,
    tokenizer: Tokenizer | None,
    parallel_context: ParallelContext,
    say: Say,
) -> Packed:
    """The held-out sequences, packed first where the run names texts.

    Raises:
        ConfigError: no data, or sequences of another length than the run's.
        DataError: as :func:`open_data`.
    """
    held_out = run.evaluation
    if held_out is None or (held_out.dataset is None and not held_out.inputs):
        raise ConfigError(
            "nothing to evaluate on",
            where="evaluation",
            rule="name evaluation.dataset, or evaluation.inputs",
        )
    packing = PackingConfig() if run.data is None else run.data.packing
    source = DataSourceConfig.model_construct(
        dataset=held_out.dataset, inputs=held_out.inputs, packing=packing
    )
    if held_out.inputs and tokenizer is None and not files.held_out.exists():
        raise ConfigError(
            "texts without a tokenizer", where="evaluation.inputs", rule="they need data.tokenizer"
        )
    return _sequences(run, source, files.held_out, 1, tokenizer, parallel_context, say)


def _sequences(
    run: RunConfig,
    data: DataSourceConfig,
    own: Path,
    batch_size: int,
    tokenizer: Tokenizer | None,
    parallel_context: ParallelContext,
    say: Say,
) -> Packed:
    """A dataset, made of texts first where its source names some; ``own`` is where to."""
    training = run.training
    if data.domains:
        parts = {}
        for domain in sorted(set(data.domains)):
            inputs = tuple(
                path for path, of in zip(data.inputs, data.domains, strict=True) if of == domain
            )
            source = data.model_copy(update={"inputs": inputs, "domains": ()})
            directory = own / f"domain-{domain}"
            parts[domain] = _sequences(
                run, source, directory, batch_size, tokenizer, parallel_context, say
            )
        return DomainSequences(
            cast(dict[int, MindRecordSequences], parts), batch_size, training.seed
        )
    if data.dataset is not None:
        directory = data.dataset
    else:
        directory = own
        if parallel_context.is_rank_0 and not directory.exists():
            assert tokenizer is not None
            config = DataConfig(seq_length=training.seq_length, **data.packing.model_dump())
            built = build_dataset(data.inputs, tokenizer, config, directory)
            counts = built.info.counts
            for note in built.notes:
                say(f"note: {note}")
            say(f"packed {counts.tokens} tokens into {counts.sequences} sequences: {directory}")
    parallel_context.barrier()
    sequences = MindRecordSequences(directory, batch_size, training.seed)
    check_length(directory, sequences.info, training.seq_length)
    sequences.check_model(run.model, tokenizer)
    return sequences


def tokenizer_of(run: RunConfig, optional: bool = False) -> Tokenizer | None:
    """The one that the run names, or that of the checkpoint it starts from.

    Args:
        run: the run.
        optional: nothing will be tokenised; one that is gone is no error.
    """
    if run.data is not None and run.data.tokenizer is not None:
        try:
            return find_tokenizer(run.data.tokenizer)
        except TokenizerError:
            if not optional:
                raise
            return None
    if run.init_from is None:
        return None
    try:
        return load_tokenizer(run.init_from.directory)
    except TokenizerError:
        return (
            None  # a checkpoint need not have one; then the sizes of the vocabularies are compared
        )


def side_files(
    begun_from: Path | None, tokenizer: Tokenizer | None, follow_links: bool = False
) -> dict[str, bytes]:
    """What checkpoints carry beside the weights: what lay beside those that were read, if any.

    Read now: the checkpoint that a training goes on from may be pruned before the next is written.
    """
    files = {} if begun_from is None else tokenizer_files(begun_from, follow_links)
    if not files and tokenizer is not None:
        files = dict(tokenizer.files)
    return {n: data if isinstance(data, bytes) else data.read_bytes() for n, data in files.items()}


def quantization_of_base(run: RunConfig, parallel_context: ParallelContext) -> Quantization | None:
    """How the experts of the checkpoint that a run begins with stay quantised beside adapters that
    are trained; None: they are weights.

    Args:
        run: the run.
        parallel_context: which part of the run this process has.

    Raises:
        CheckpointError: it cannot be read.
    """
    start = run.init_from
    if run.lora is None or start is None:
        return None
    with open_checkpoint(
        start.path, start.format, verify=False, follow_links=start.follow_links
    ) as source:
        return kept_in_training(source, run, parallel_context)


def kept_in_training(
    source: Source, run: RunConfig, parallel_context: ParallelContext
) -> Quantization | None:
    """The same of a checkpoint that is open."""
    graph = run.parallel.execution_on(ms.get_context("device_target")) == "graph"
    if run.lora is None or graph:
        return None
    return kept_quantization(source, run.training.dtype, parallel_context.world, run.lora)


def initialize(
    weights: Mapping[str, Parameter],
    storage: Storage,
    run: RunConfig,
    parallel_context: ParallelContext,
    say: Say,
) -> None:
    """Draws the weights, or reads them from the checkpoint that the run names. Parameters of
    adapters are drawn.

    Args:
        weights: what this process holds, by the names of checkpoints.
        storage: how it lies in a checkpoint.
        run: the run.
        parallel_context: which part of the run this process has.
        say: told where they are from.

    Raises:
        ConfigError: the checkpoint is of another model.
    """
    if run.init_from is None:
        storage.initialize(weights, run.training.seed)
        return
    start, rank, world = run.init_from, parallel_context.rank, parallel_context.world
    adapters = {name for name, spec in storage.specs.items() if spec.adapts}
    drawn = {name: each for name, each in weights.items() if name in adapters}
    storage.initialize(drawn, run.training.seed)
    base = run.model.model_copy(update={"lora": None})
    with open_merged(
        start.path,
        start.format,
        adapter=start.adapter if run.lora is None else None,
        verify=start.verify,
        follow_links=start.follow_links,
        rank=rank,
        world=world,
    ) as source:
        todo = "leave model out of the run to take the checkpoint's"
        check_same_model(base, source.config, f"init_from {start.path}", todo)
        held = {name: each for name, each in weights.items() if name not in drawn}
        load_weights(source, held, storage=storage)
        kept = kept_in_training(source, run, parallel_context)
        remark = source.remark(kept is not None)
    say(f"weights from {start.path}")
    if remark:
        say(remark)
