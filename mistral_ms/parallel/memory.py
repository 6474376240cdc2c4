"""How many bytes a training step holds on one rank beside what it keeps between steps: calculated
from the configuration, without MindSpore.

Counted are the tensors that gradients are computed from. What else lives at the peak depends on the
order in which the back end works; ``working`` is an estimate of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from mistral_ms.config import (
    ModelConfig,
    ParallelConfig,
    Recompute,
    RoutingConfig,
    TrainingConfig,
    expert_capacity,
)
from mistral_ms.parallel.pipeline import Stage, in_flight, stages_of

FLOAT = 4
"""Bytes of float32."""
ASCEND_GIB = 64.0
"""Device memory of an Ascend 910B."""
GIB = 1 << 30
STATISTICS = 8
"""Times that FlashAttentionScore writes each of its two float32 statistics of a query and head."""
MASK = 1
"""Bytes of an element of the visible keys, which attention outside a fused operator keeps."""
Fused = Literal["all", "elementwise", "none"]
"""Which operators are fused and keep less: attention, norms and SwiGLU; norms and SwiGLU; none."""
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}
"""Bytes of an element of each dtype."""


@dataclass(frozen=True, slots=True)
class LayerMemory:
    """Bytes that one decoder block holds of one micro-batch until its gradient is computed.

    Attributes:
        states: the block's input.
        norms: what they normalised and gave, the states between them, what the router computed
            from and its scores.
        attention: queries, keys, values and the result.
        probabilities: of attention, with the visible keys; its statistics where the operator is
            fused.
        feed_forward: the intermediate activations.
        dispatch: token rows on their way to experts and back.
        results: of the norms and of attention, part of the above: what they gave, which is computed
            again with them.
        left: likewise: what the graph keeps of a block that is computed again as a whole, beside
            its input: queries and keys as they were rotated, and the rows that came back from
            experts. Its regions are not computed again.
    """

    states: int
    norms: int
    attention: int
    probabilities: int
    feed_forward: int
    dispatch: int
    results: int
    left: int

    @property
    def total(self) -> int:
        """All of it."""
        return (
            self.states
            + self.norms
            + self.attention
            + self.probabilities
            + self.feed_forward
            + self.dispatch
        )

    def kept(self, recompute: Recompute, *, in_graph: bool = False) -> int:
        """What is left between the forward and the backward pass.

        Args:
            recompute: what the backward pass computes again.
            in_graph: of the auto-parallel graph, see ``left``.
        """
        if recompute == "full":
            return self.states + (self.left if in_graph else 0)
        return self.total - (self.probabilities + self.results) * (recompute == "selective")


@dataclass(frozen=True, slots=True)
class ActivationMemory:
    """Bytes of one rank, at the fullest moment of a step.

    Attributes:
        layers: kept by the blocks of the stage, of all micro-batches whose blocks are kept.
        in_flight: micro-batches that the stage has begun and not ended.
        stage_inputs: what an explicit pipeline keeps of them.
        working: what the gradient of one block needs beside what was kept.
        dispatch: of ``layers`` or of ``working``: rows on their way to experts and back, of one
            block.
        logits: of the tokens whose loss is computed at a time, with probabilities and gradient.
        gradients: of the weights, from one micro-batch.
    """

    layers: int
    in_flight: int
    stage_inputs: int
    working: int
    dispatch: int
    logits: int
    gradients: int

    @property
    def total(self) -> int:
        """The sum; logits and the gradient of a block do not live at the same time."""
        largest = max(self.working, self.logits)
        return self.layers + self.stage_inputs + largest + self.gradients

    def __str__(self) -> str:
        return (
            f"kept by layers {megabytes(self.layers)}, inputs of {self.in_flight} micro-batches in "
            f"flight {megabytes(self.stage_inputs)}, gradient of a layer {megabytes(self.working)} "
            f"(rows of its experts {megabytes(self.dispatch)}), logits {megabytes(self.logits)}, "
            f"gradients of weights {megabytes(self.gradients)}"
        )


def megabytes(nbytes: int) -> str:
    """A number of bytes for a reader."""
    return f"{nbytes / 1e6:.1f} MB"


def fused_operators(device: str, dtype: str) -> Fused:
    """What is fused on a device: all of it on Ascend; on a CPU, in float32, what has an operator in
    C++ (where no compiler is found norms and SwiGLU keep more than that).

    Args:
        device: "Ascend" or "CPU"; whatever is no CPU has fused operators.
        dtype: of activations.
    """
    if device != "CPU":
        return "all"
    return "elementwise" if dtype == "float32" else "none"


def layer_memory(
    model: ModelConfig,
    routing: RoutingConfig,
    parallel: ParallelConfig,
    *,
    layer: int,
    rows: int,
    seq_length: int,
    itemsize: int,
    fused: Fused,
) -> LayerMemory:
    """What one block keeps of one micro-batch of a rank if nothing is computed again.

    Args:
        model: the whole model.
        routing: how many rows experts compute.
        parallel: the layout.
        layer: index of the block.
        rows: sequences of the micro-batch, B.
        seq_length: S.
        itemsize: bytes of an activation.
        fused: which operators are fused, see :func:`fused_operators`.
    """
    T, H, D = rows * seq_length, model.hidden_size, model.head_size
    N, G = model.num_attention_heads // parallel.mp, model.num_key_value_heads // parallel.mp
    I = model.intermediate_size // parallel.mp  # noqa: E741
    states = T * H * itemsize
    # between the norms the states again; of each norm its result, one number a token and, unfused,
    # the normalised states and a float32 copy of its input
    count = 2 + (len(model.extra_feed_forwards) if model.is_sparse(layer) else 0)
    norms = (2 * count - 1) * states + count * T * FLOAT
    results = count * states + T * N * D * itemsize
    if fused == "none":
        copies = count * (states + (T * H * FLOAT if itemsize != FLOAT else 0))
        norms, results = norms + copies, results + copies
    attention = T * (2 * N + 2 * G) * D * itemsize
    left = T * (N + G) * D * itemsize
    if model.qk_norm != "none":  # as of the norms: inputs, means, and unfused two copies more
        pieces = N + G if model.qk_norm == "head" else 2
        attention += T * (N + G) * D * itemsize + T * pieces * FLOAT
        if fused == "none":
            attention += T * (N + G) * D * (itemsize + (FLOAT if itemsize != FLOAT else 0))
    if fused == "all":
        probabilities = 2 * T * N * STATISTICS * FLOAT
    else:
        copy = itemsize if itemsize != FLOAT else 0  # what the values are multiplied with
        probabilities = T * N * seq_length * (FLOAT + copy + MASK)
    widths = 4 if fused == "none" else 3  # gate, up, their product; unfused silu(gate), too
    if not model.is_sparse(layer):
        return LayerMemory(
            states,
            norms,
            attention,
            probabilities,
            widths * T * I * itemsize,
            dispatch=0,
            results=results,
            left=left,
        )
    model = model.of_layer(layer)
    assert model.moe is not None
    norms += 2 * T * model.moe.num_local_experts * FLOAT
    if itemsize != FLOAT and routing.router_dtype == "float32":
        # the router computes from a copy in float32, and nobody else from what the norm gave
        norms, results = norms + T * H * FLOAT - states, results - states
    R = expert_rows(model, routing, parallel, T, seq_length)
    expert = model.expert_size // parallel.mp
    shared = 0
    if model.shared_expert_size:  # its own activations, its result and that of the chosen ones
        shared = widths * T * model.shared_expert_size // parallel.mp * itemsize + 2 * states
    return LayerMemory(
        states,
        norms,
        attention,
        probabilities,
        widths * (R * expert + (count - 2) * T * I) * itemsize + shared,
        dispatch=2 * R * H * itemsize,
        results=results,
        left=left + R * H * itemsize,
    )


def expert_rows(
    model: ModelConfig,
    routing: RoutingConfig,
    parallel: ParallelConfig,
    tokens: int,
    seq_length: int = 1,
) -> int:
    """R: rows of the buffers that a rank's experts compute from.

    Args:
        model: the whole model, which has experts.
        routing: the policy.
        parallel: the layout.
        tokens: T of this rank.
        seq_length: tokens of each sequence, for a capacity that goes by sequences.
    """
    assert model.moe is not None
    E, K = model.moe.num_local_experts, model.moe.num_experts_per_tok
    if routing.policy == "dropless":
        if parallel.ep == 1:
            return tokens * K
        return parallel.ep * tokens * min(K, E // parallel.ep)  # room for the worst case
    return E * expert_capacity(tokens, E, K, routing, seq_length)


def activation_memory(
    model: ModelConfig,
    routing: RoutingConfig,
    training: TrainingConfig,
    parallel: ParallelConfig,
    *,
    stage: int,
    execution: Literal["explicit", "graph"],
    fused: Fused,
    logit_tokens: int | None,
    gradients: int,
) -> ActivationMemory:
    """What a step holds on a rank.

    Args:
        model: the whole model.
        routing: the routing policy.
        training: batch, sequence length, micro-batches, dtype.
        parallel: the layout and what is computed again.
        stage: the rank's pipeline stage.
        execution: an explicit pipeline keeps the inputs of its stages alone, that of the graph
            what the layers keep.
        fused: see :func:`layer_memory`.
        logit_tokens: the most tokens whose logits are held at a time; None: all of a micro-batch.
        gradients: bytes of the weights' gradients from one micro-batch.
    """
    parts = stages_of(model, parallel.pp * parallel.pp_interleave_num)[stage :: parallel.pp]
    held = fullest_chunk(parts, stage)
    layers = [
        layer_memory(
            model,
            routing,
            parallel,
            layer=layer,
            rows=rows_of(training, parallel),
            seq_length=training.seq_length,
            itemsize=ITEMSIZE[training.dtype],
            fused=fused,
        )
        for layer in held.layers
    ]
    return stage_memory(
        model,
        training,
        parallel,
        held,
        layers,
        execution=execution,
        fused=fused,
        logit_tokens=logit_tokens,
        gradients=gradients,
    )


def fullest_chunk(parts: Sequence[Stage], stage: int) -> Stage:
    """Of a stage's interleaved chunks, of which one is computed at a time, the one that needs most:
    that with the head, or the longest.

    Args:
        parts: what the stage holds.
        stage: its number.
    """
    return replace(max(parts, key=lambda part: (part.head, len(part.layers))), number=stage)


def rows_of(training: TrainingConfig, parallel: ParallelConfig) -> int:
    """B: sequences of a rank's micro-batch."""
    ranks = parallel.dp * training.gradient_accumulation_steps
    return max(1, training.global_batch_size // ranks)


def stage_memory(
    model: ModelConfig,
    training: TrainingConfig,
    parallel: ParallelConfig,
    held: Stage,
    layers: Sequence[LayerMemory],
    *,
    execution: Literal["explicit", "graph"],
    fused: Fused,
    logit_tokens: int | None,
    gradients: int,
) -> ActivationMemory:
    """What a step holds on a rank, from what each layer keeps.

    Args:
        model: the whole model.
        training: batch, sequence length, micro-batches, dtype.
        parallel: the layout and what is computed again.
        held: the rank's pipeline stage.
        layers: of the stage, see :func:`layer_memory`.
        execution: see :func:`activation_memory`.
        fused: see :func:`layer_memory`.
        logit_tokens: see :func:`activation_memory`.
        gradients: likewise.
    """
    tokens, stage = rows_of(training, parallel) * training.seq_length, held.number
    flying = 1
    if parallel.pp > 1:
        micro_batches = training.gradient_accumulation_steps
        chunks = parallel.pp_interleave_num
        flying = in_flight(parallel.pipeline_scheduler, stage, parallel.pp, micro_batches, chunks)
    explicit = execution == "explicit"
    recompute: Recompute = parallel.recompute
    if explicit and parallel.pp > 1 and recompute == "full":
        recompute = "selective"  # the whole stage is computed again in any case
    left = [layer.kept(recompute, in_graph=not explicit) for layer in layers]
    kept = sum(left) * (1 if explicit else flying)
    scores = 0 if fused == "all" else 2 * max(layer.probabilities for layer in layers)
    inputs = tokens * model.hidden_size * ITEMSIZE[training.dtype]
    logits = 0
    if held.head:
        tokens = tokens if logit_tokens is None else min(tokens, logit_tokens)
        # tensor-parallel ranks divide the vocabulary, in the graph the tokens
        logits = 3 * tokens * model.vocab_size // parallel.mp * FLOAT
    return ActivationMemory(
        layers=kept,
        in_flight=flying,
        stage_inputs=flying * inputs if explicit and parallel.pp > 1 else 0,
        working=max(layer.total - own for layer, own in zip(layers, left, strict=True)) + scores,
        dispatch=max(layer.dispatch for layer in layers),
        logits=logits,
        gradients=gradients,
    )


def too_large(nbytes: int, limit_gib: float | None, device: str) -> str | None:
    """What to say of a step that does not fit a device; None if it does.

    Args:
        nbytes: everything that the step holds there.
        limit_gib: memory of the device in GiB; None: :data:`ASCEND_GIB` on Ascend, and on CPU
            whatever the host has.
        device: "Ascend" or "CPU".
    """
    if limit_gib is None:
        if device != "Ascend":
            return None
        limit_gib = ASCEND_GIB
    if nbytes <= limit_gib * GIB:
        return None
    return (
        f"warning: about {nbytes / GIB:.1f} GiB on a device of {limit_gib:g} GiB "
        "(parallel.max_device_memory): parallel.recompute, training.gradient_accumulation_steps, "
        "parallel.optimizer_parallel or training.offload_optimizer need less"
    )
