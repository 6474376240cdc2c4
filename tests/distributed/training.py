"""Trainings in several layouts; run in the workers."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from distributed import corners
from distributed.worker import Worker
from mindspore import Tensor
from support.configs import TINY
from support.configs import model as small_model
from support.preferences import random_pairs

from mistral_ms.config import (
    DpoConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RoutingConfig,
    TrainingConfig,
)
from mistral_ms.datasets import Batch, InMemorySequences
from mistral_ms.datasets.preferences import PreferenceSequences
from mistral_ms.mixtures.domains import RandomRoutedSettings
from mistral_ms.mixtures.lifelong import StagedTopKSettings
from mistral_ms.models import CausalLM
from mistral_ms.parallel.context import ParallelContext
from mistral_ms.training import NotFiniteError, TrainStep, make_objective
from mistral_ms.training.failure import write_failure
from mistral_ms.training.loss_scale import LossScale
from mistral_ms.training.preferences import add_reference

STEPS = 8
HALF_STEPS = 4
"""Of a training in float16. The gradient of experts that ranks share out is rounded once, over the
rows of all ranks; one process rounds each dispatch group's and adds in float32. In these steps that
moves the lead of a token's last chosen expert over the next one by an eighth of itself at most
(measured with oneDNN's kernels for AVX2 and for AVX-512 with float16). In the sixth it may move it
by more than the lead: a token changes its expert, and from then on the two trainings part.
"""


def model(name: str) -> ModelConfig:
    """As many layers as a layout has stages, or chunks of stages, which is what compiles fastest;
    test_train_command.py trains ranks with several. Every other one is dense where that is asked
    for.
    """
    layout = next((sizes[name] for sizes in LAYOUTS.values() if name in sizes), ParallelConfig())
    stages = layout.pp * layout.pp_interleave_num
    moe = {"sparse_layers": tuple(range(1, stages, 2))} if name in MIXED else {}
    if name in GATES:
        moe["gate"] = GATES[name]
    if name in OF_ONE:
        moe |= {"num_experts_per_tok": 1, "norm_topk_prob": False}
    if name in FINE:
        moe |= FINE[name]
    moe["extra_feed_forward"] = EXTRA.get(name, "none")
    lora = {}
    if name in ADAPTERS:
        lora, moe["n_shared_experts"] = {"lora": ADAPTERS[name]}, 1
    layers = 2 if name in DEEP else stages
    sizes = {"num_hidden_layers": layers}
    tied = name in TIED
    # float16 gives the bias of keys, whose gradient is nearly zero, one that is all rounding
    sizes |= {"tie_word_embeddings": tied, "qkv_bias": tied and "chunks" not in name}
    return small_model(**TINY | sizes, moe=moe, **lora)


LAYOUTS = {
    2: {
        "dp2": ParallelConfig(dp=2),
        "pp2, two chunks": ParallelConfig(pp=2, pp_interleave_num=2),
        "dp2 ep2 zero1": ParallelConfig(dp=2, ep=2, optimizer_parallel=True, recompute="full"),
        "dp2 ep2 zero1, muon": ParallelConfig(dp=2, ep=2, optimizer_parallel=True),
        "dp2 ep2 interleaved": ParallelConfig(dp=2, ep=2, micro_batch_interleave_num=2),
        "dp2 ep2 zero1, adapters": ParallelConfig(dp=2, ep=2, optimizer_parallel=True),
        "mp2": ParallelConfig(mp=2),
        "mp2, adapters": ParallelConfig(mp=2),
    },
    4: {
        "dp2 mp2 ep2": ParallelConfig(dp=2, mp=2, ep=2, group_wise_a2a=True, recompute="full"),
        "pp4, gpipe": ParallelConfig(pp=4, pipeline_scheduler="gpipe"),
        "dp4 ep2 zero1": ParallelConfig(dp=4, ep=2, optimizer_parallel=True),
    },
}
MIXED = ("pp4, gpipe",)
"""Layouts with stages that have no experts."""
FROZEN, DOMAINS = 5, 2
GATES = {
    "dp2 mp2 ep2": "noisy_top_k",
    "dp2": {"name": "gshard_top_2", "router_jitter_noise": 0.1},
    "pp4, gpipe": {"name": "sigmoid_top_k", "bias_update_rate": 0.05},
    "dp2 ep2 zero1, muon": StagedTopKSettings(frozen_experts=FROZEN),
    "dp4 ep2 zero1": RandomRoutedSettings(domains=DOMAINS),
    "pp2, two chunks": RandomRoutedSettings(domains=DOMAINS),
    "generating": {"name": "hash_top_1", "hash_seed": 1},
}
"""Gates other than the usual one: noise and state are those of one process, too. With the frozen
experts outputs are held to those of another model: a stage of Lifelong-MoE. Domains: PanGu-Sigma's
random routed experts, where each rank has those of one domain, and rows of both; in a pipeline
every stage needs ids and domains of the tokens, and so it does when tokens are generated.
"""
EXTRA = {"dp2 ep2 interleaved": "after", "pp4, gpipe": "both"}
"""Where dense feed-forwards stand beside the experts, in the same block."""
OF_ONE = ("dp4 ep2 zero1", "pp2, two chunks", "generating")
"""Layouts whose gates choose one expert."""
FINE = {
    "dp2 ep2 interleaved": {
        "num_local_experts": 16,
        "moe_intermediate_size": 12,
        "moe_token_dropout": 0.2,
        "n_shared_experts": 2,
        "shared_expert_gate": "cmr",
        "cmr_gate_drop": 0.2,
        "sparse_layers": {"first_k_dense_replace": 1},
        "gate": {
            "name": "sigmoid_top_k",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 2.5,
            "bias_update_rate": 0.05,
        },
    },
    "dp2 ep2 zero1": {"num_local_experts": (8, 16)},
}
"""DeepSeek-V3's layers: the first one dense, fine-grained and shared experts, a bias that balances
those of two of four groups. Beside that masked results, and NLLB-MoE's conditional routing: a gate
that at times leaves the shared experts out. And more experts in the last of two layers.
"""
ADAPTERS = {
    "dp2 ep2 zero1, adapters": {"r": 2, "target_modules": ["o_proj", "w2"], "use_dora": True},
    "mp2, adapters": {"r": 2, "target_modules": "all-linear"},
}
"""Trained in the place of the weights; those of experts are divided as the experts are."""
TIED = ("dp2 mp2 ep2", "pp4, gpipe", "pp2, two chunks")
DEEP = ("dp2 ep2 interleaved", "dp2 ep2 zero1", "generating")
"""Of two layers: what a recomputed block sends must not meet the gradients of the next one."""
WATCHED = ("dp2 ep2 zero1, muon", "pp2, two chunks", "mp2")
"""Whose layers' outputs are looked at after the training, and whose next step fails."""
FIGURES = ("loss", "lm_loss", "aux_loss", "z_loss", "grad_norm", "routed_LE", "kept_LE")
EXPERTS = ({"pattern": "*.experts.*", "lr_factor": 0.5, "weight_decay": 0.02},)
"""Settings of the optimizer for experts alone."""
VARIANTS = {
    "plain": {},
    "muon on the host, two micro-batches, dropless, held": {
        "offload_optimizer": "host",
        "gradient_accumulation_steps": 2,
        "optimizer": {"name": "muon", "learning_rate": 1e-3},
    },
    "host, four micro-batches, dropless": {
        "offload_optimizer": "host",
        "gradient_accumulation_steps": 4,
    },
    "float16": {"dtype": "float16"},
    "float16, four micro-batches": {"dtype": "float16", "gradient_accumulation_steps": 4},
    "experts choose": {"param_groups": EXPERTS},
    "host": {"offload_optimizer": "host", "param_groups": EXPERTS},
    "preferences on the host, dropless": {"offload_optimizer": "host"},
}
"""Of the training."""
OTHERS = {
    "dp2": ("float16",),
    "dp2 ep2 zero1": ("float16",),
    "dp2 ep2 zero1, muon": ("muon on the host, two micro-batches, dropless, held",),
    "pp2, two chunks": ("float16, four micro-batches",),
    "pp4, gpipe": ("host, four micro-batches, dropless",),
    "dp4 ep2 zero1": ("host",),
    "dp2 ep2 zero1, adapters": ("preferences on the host, dropless",),
    "mp2": ("experts choose",),
}
"""Layouts that are not trained plainly. Every case compiles for seconds in each process, so each
layout is trained once. Whole copies of the model see the rows that one process sees, so what they
get in float16 is equal in every bit.
"""
CASES = [
    (world, name, variant)
    for world, names in LAYOUTS.items()
    for name in names
    for variant in OTHERS.get(name, ("plain",))
]


def steps(variant: str) -> int:
    """How long a training is."""
    return HALF_STEPS if "float16" in variant else STEPS


def groups(world: int, name: str) -> int:
    """Dispatch groups of a layout for each micro-batch of one process."""
    layout = LAYOUTS[world][name]
    return layout.dp * layout.micro_batch_interleave_num


def routing(variant: str) -> RoutingConfig:
    if variant == "experts choose":  # of so few slots that some tokens have no expert
        return RoutingConfig(policy="experts_choose", capacity_factor=0.5, aux_loss="per_layer")
    policy = "dropless" if "dropless" in variant else "capacity"
    # what is drawn, in gates and in the order of service, is drawn alike in all layouts
    more = {"drop_priority": "random", "aux_choices": "first"} if variant == "plain" else {}
    if "float16" in variant:  # where experts are divided, too, every sequence has slots of its own
        more = {"capacity_group": "sequence", "aux_scope": "sequence"}
    return RoutingConfig(policy=policy, capacity_factor=1.1, aux_loss="per_layer", **more)


def training(variant: str, groups: int = 1) -> TrainingConfig:
    """A training; in one process with as many micro-batches as all ranks together have."""
    values = {
        "max_steps": steps(variant), "seq_length": 8, "global_batch_size": 16,
        "router_aux_loss_coef": 0.02,
        "router_z_loss_coef": 0.001, "max_grad_norm": 0.5,
        "optimizer": OptimizerConfig(learning_rate=1e-3),
        "lr_scheduler_type": "constant", **VARIANTS[variant],
    }  # fmt: skip
    values["gradient_accumulation_steps"] = values.get("gradient_accumulation_steps", 1) * groups
    return TrainingConfig(**values)


def dpo(variant: str) -> DpoConfig | None:
    """Learns pairs of answers in one variant."""
    return DpoConfig(beta=0.5, label_smoothing=0.1) if "preferences" in variant else None


def before(variant: str) -> tuple[CausalLM, float] | None:
    """In one variant a model to whose outputs the training is held, and the coefficient."""
    if "held" not in variant:
        return None
    other = CausalLM(small_model(**TINY | {"num_hidden_layers": 1}))
    other.initialize(7)
    return other, 0.5


class OfDomains(InMemorySequences):
    """Windows that are of several domains in turn."""

    def batch(self, step: int) -> Batch:
        batch = super().batch(step)
        return replace(batch, domains_B=batch.samples_B % np.int32(DOMAINS))


def data(architecture: ModelConfig, variant: str) -> InMemorySequences | PreferenceSequences:
    """147 tokens: 18 windows of eight and one of three, most of which is padding. Or 19 pairs."""
    if dpo(variant) is not None:
        return random_pairs(19, 8, 16)
    text = np.random.default_rng(3).integers(3, 48, 148).tolist()
    of_domains = architecture.moe is not None and architecture.moe.gate.row_domains > 1
    return (OfDomains if of_domains else InMemorySequences)(text, 8, 16, 0)


def train(name: str, parallel_context: ParallelContext, variant: str) -> tuple[list, TrainStep]:
    """The results of all steps, and the training with this rank's weights at the end."""
    config = training(variant)
    part = parallel_context.build_stage(model(name), routing(variant), config.dtype)
    parallel_context.initialize(part, 0)
    update = TrainStep(
        make_objective(
            part,
            config,
            pooled_aux=False,
            parallel_context=parallel_context,
            before=before(variant),
            dpo=dpo(variant),
        ),
        config,
        parallel_context=parallel_context,
    )
    sequences = data(model(name), variant)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.npz"
        add_reference(part, config, sequences, path, parallel_context, lambda line: None)
    results = [update(sequences.batch(step)) for step in range(steps(variant))]
    return results, update


def break_last(context: ParallelContext, update: TrainStep) -> Callable[[], None]:
    """Puts an infinity into the last rank's part of the last layer's experts, and says how to take
    it out again.
    """
    last = update.model.config.num_hidden_layers - 1
    weight = update.model.weights().get(f"layers.{last}.moe.experts.w1")
    if weight is None or context.rank != context.world - 1:
        return lambda: None
    whole = weight.asnumpy().copy()
    values = whole.copy()
    values[..., 0] = np.inf
    weight.set_data(Tensor(values))
    return lambda: weight.set_data(Tensor(whole))


def watch(
    worker: Worker, name: str, context: ParallelContext, update: TrainStep, batch: Batch
) -> None:
    """The report of a step that is not finite, and what layers give without the fault.

    Last: a training step after a look at the layers' outputs would be compiled again.
    """
    mend = break_last(context, update)
    if update.config.scaling is not None:  # no smaller one could help
        update.progress.scale = LossScale(update.config.scaling.minimum)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "failure.json"
        try:
            update(batch)
        except NotFiniteError as error:
            write_failure(path, update, error, context)
        if context.is_rank_0:
            worker.keep(f"watched/{name}/failure", np.array(path.read_text()))
    mend()
    for number, each in enumerate(update.layer_statistics(batch)):
        worker.keep(f"watched/{name}/{number}", np.array(list(each.values())[1:]))


def run_training(worker: Worker) -> None:
    worker.mode("graph")
    for world, name, variant in CASES:
        if world != worker.world:
            continue
        parallel_context = ParallelContext(LAYOUTS[world][name], worker.rank, world)
        results, update = train(name, parallel_context, variant)
        key = f"training/{name}/{variant}"
        for figure in FIGURES:
            worker.keep(f"{key}/{figure}", np.array([getattr(r, figure) for r in results]))
        measures = [list(result.preference.values()) for result in results]
        worker.keep(f"{key}/preference", np.array(measures))
        if results[0].distillation is not None:
            distances = [result.distillation for result in results]
            worker.keep(f"{key}/distillation", np.array(distances))
        for path, weight in update.model.weights().items():
            worker.keep(f"{key}/weights/{path}", weight.asnumpy().copy())  # corners go on
            if weight.requires_grad:
                norms = [result.gradient_norms[path] for result in results]
                worker.keep(f"{key}/norms/{path}", np.array(norms))
        if corners.TRAINED.get(variant) == name:
            for corner, batch in corners.batches().items():
                results = [update(batch) for _ in range(corners.STEPS)]
                for figure in FIGURES:
                    values = np.array([getattr(r, figure) for r in results])
                    worker.keep(f"corners/{corner}/{variant}/{figure}", values)
            for path, weight in update.model.weights().items():
                worker.keep(f"corners/{variant}/weights/{path}", weight.asnumpy())
        state = sum(parameter.size for parameter in update.optimizer.state().values())
        worker.keep(f"{key}/state", np.array(state))
        if name in WATCHED:
            watch(worker, name, parallel_context, update, data(model(name), variant).batch(0))
    worker.mode("pynative")
