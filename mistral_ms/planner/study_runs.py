"""What the studies plan: models, trainings, their best layouts, and how rows say them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from mistral_ms.config import ModelConfig, RunConfig, read_yaml
from mistral_ms.config.base import validate
from mistral_ms.data import CONFIGS
from mistral_ms.errors import ConfigError
from mistral_ms.planner.candidate import Candidate
from mistral_ms.planner.hardware import Cluster, load_hardware
from mistral_ms.planner.search import OFFLOAD, Offload, plan
from mistral_ms.planner.study import Chart, Series
from mistral_ms.weights import specs

MIXTRAL_8X7B, MIXTRAL_8X22B, MISTRAL_7B = "Mixtral 8x7B", "Mixtral 8x22B", "Mistral 7B"
DEEPSEEK = "DeepSeekMoE 16B"
TOP_1, TOP_4 = "Mixtral 8x7B, Top-1", "Mixtral 8x7B, Top-4"
_FILES = {
    MISTRAL_7B: "mistral_7b_v0.1",
    MIXTRAL_8X7B: "mixtral_8x7b",
    MIXTRAL_8X22B: "mixtral_8x22b",
}
_DEEPSEEK: dict[str, Any] = {  # arXiv:2401.06066, table 1
    "vocab_size": 102400,
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "moe": {
        "num_local_experts": 64,
        "num_experts_per_tok": 6,
        "moe_intermediate_size": 1408,
        "n_shared_experts": 2,
        "sparse_layers": {"first_k_dense_replace": 1},
    },
}
CARDS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
SEQUENCES_A_CARD, BATCH = 4, 1024
A2 = "atlas_800t_a2"


@cache
def model(name: str) -> ModelConfig:
    """A model of the studies, by its name."""
    if name == DEEPSEEK:
        return validate(ModelConfig, _DEEPSEEK, name)
    if name in _FILES:
        path = CONFIGS / "model" / f"{_FILES[name]}.yaml"
        return validate(ModelConfig, read_yaml(path), str(path))
    values = model(MIXTRAL_8X7B).model_dump()
    choices = {TOP_1: 1, TOP_4: 4}[name]
    values["moe"] |= {"num_experts_per_tok": choices, "norm_topk_prob": choices > 1}
    return validate(ModelConfig, values, name)


def active_parameters(config: ModelConfig) -> float:
    """Parameters that a token meets: of experts its share."""
    moe = config.moe
    share = 1.0 if moe is None else moe.num_experts_per_tok / moe.num_local_experts
    trained = (spec for spec in specs(config) if spec.kind == "trained")
    return sum(math.prod(spec.shape) * (share if spec.stacked else 1) for spec in trained)


def training(name: str, sequences: int, seq_length: int = 4096) -> RunConfig:
    """A training of a model, whose layout a plan shall find."""
    values: dict[str, Any] = {
        "model": model(name),
        "routing": {"policy": "capacity", "capacity_factor": 1.1, "aux_loss": "per_layer"},
        "training": {
            "max_steps": 1,
            "seq_length": seq_length,
            "global_batch_size": sequences,
            "dtype": "bfloat16",
        },
    }
    return validate(RunConfig, values, f"study of {name}")


def best(
    run: RunConfig, cards: int, hardware: str = A2, offload: Sequence[Offload] = OFFLOAD
) -> Candidate | None:
    """The fastest layout; None where none fits or divides the training."""
    try:
        found = plan(run, Cluster.of(load_hardware(hardware), cards), offload=offload)
    except ConfigError:
        return None
    return found[0] if found[0].fits else None


def layout(candidate: Candidate | None) -> str:
    """Of a table: what a plan chose."""
    if candidate is None:
        return "none fits"
    run = candidate.run
    sizes, micro = run.parallel.sizes, run.training.gradient_accumulation_steps
    parts = [f"dp {sizes.dp}"]
    parts += [f"{key} {value}" for key in ("mp", "pp", "ep") if (value := getattr(sizes, key)) > 1]
    text = f"{', '.join(parts)}; m {micro}"
    text += "" if run.parallel.recompute == "none" else f", recompute {run.parallel.recompute}"
    chunks = run.parallel.pp_interleave_num
    text += f", {chunks} chunks (explicit)" if chunks > 1 else ""
    text += ", host" if run.training.offload_optimizer == "host" else ""
    return text + (", hierarchical" if run.parallel.all_to_all == "hierarchical" else "")


def rate(candidate: Candidate | None) -> str:
    """Of a table: throughput."""
    return "-" if candidate is None else f"{candidate.tokens_per_s_per_card:.0f}"


def share(candidate: Candidate | None, *names: str) -> str:
    """Of a table: what part of a step some of its parts are."""
    if candidate is None or candidate.step is None:
        return "-"
    spent = sum(candidate.breakdown[name] for name in names)
    return f"{spent / candidate.step.seconds:.0%}"


def line(name: str, found: Mapping[int, Candidate | None], *, dashed: bool = False) -> Series:
    """Throughput over cards, where a layout fits."""
    there = {x: each for x, each in found.items() if each is not None}
    rates = tuple(each.tokens_per_s_per_card for each in there.values())
    return Series(name, tuple(map(float, there)), rates, dashed=dashed)


def card_ticks(counts: Iterable[int]) -> tuple[tuple[float, str], ...]:
    """Every number of cards on its axis."""
    return tuple((float(count), str(count)) for count in counts)


def billions(name: str) -> str:
    """Of a table: the parameters that a token meets."""
    return f"{active_parameters(model(name)) / 1e9:.1f} billion"


def stacked(
    title: str,
    y: str,
    names: Sequence[str],
    parts: Sequence[Mapping[str, float]],
    ends: Sequence[str],
) -> Chart:
    """Bars of parts, one below the other.

    Args:
        title: of the chart.
        y: what the lengths are.
        names: of the bars.
        parts: of each bar, by name.
        ends: a text beside each bar.
    """
    keys = list(dict.fromkeys(key for part in parts for key in part))
    places = tuple(map(float, range(len(parts))))
    series = tuple(Series(key, places, tuple(part.get(key, 0.0) for part in parts)) for key in keys)
    ticks = tuple(zip(places, names, strict=True))
    return Chart(title, "", y, series, kind="stacked", ticks=ticks, ends=tuple(ends))
