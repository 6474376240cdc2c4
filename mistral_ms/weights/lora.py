"""Low-rank adapters of a model's matrices: :class:`mistral_ms.layers.LowRank`.

Their parameters follow from those of the matrices, which say everything: shape, division among
processes, place in the pipeline. A matrix stands frozen beside its adapter.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from mistral_ms.config import LoraConfig, ModelConfig, to_hf
from mistral_ms.config.hugging_face_families import FAMILIES
from mistral_ms.config.lora import ALL_LINEAR, matches
from mistral_ms.errors import ConfigError
from mistral_ms.weights.spec import ParamSpec, inside


@dataclass(frozen=True)
class Adaptable:
    """A matrix of a decoder block that can have an adapter.

    Attributes:
        product: path of the cell that multiplies by it, within the block; the adapter's parameters
            are within that.
        module: what Hugging Face's classes call the module that holds it, within the block.
    """

    product: str
    module: str


_MLP, _SPARSE = "mlp", "block_sparse_moe"
ADAPTABLE = {
    **{
        f"attention.{name}.weight": Adaptable(f"attention.{name}.linear", f"self_attn.{name}")
        for name in ("q_proj", "k_proj", "v_proj", "o_proj")
    },
    "feed_forward.w1.weight": Adaptable("feed_forward.gated.w1_linear", f"{_MLP}.gate_proj"),
    "feed_forward.w2.weight": Adaptable("feed_forward.w2.linear", f"{_MLP}.down_proj"),
    "feed_forward.w3.weight": Adaptable("feed_forward.gated.w3_linear", f"{_MLP}.up_proj"),
    "moe.router.weight": Adaptable("moe.router.linear", f"{_SPARSE}.gate"),
    **{
        f"moe.experts.{name}": Adaptable(
            f"moe.experts.{name}_linear", f"{_SPARSE}.experts.{{expert}}.{name}"
        )
        for name in ("w1", "w2", "w3")
    },
}
"""What can have adapters, by the names that the matrices have within their block."""

A, B, MAGNITUDE = "lora_A", "lora_B", "lora_magnitude"
"""The parameters of an adapter."""


def with_adapters(base: Iterable[ParamSpec], config: ModelConfig) -> tuple[ParamSpec, ...]:
    """The parameters of a model with those of its adapters, each behind its matrix.

    What was trained is frozen.

    Args:
        base: of the model without adapters.
        config: the model; has ``lora``.

    Raises:
        ConfigError: a name that no matrix has, or an adapter that cannot be had.
    """
    lora = config.lora
    assert lora is not None
    _check_family(config)
    found: list[ParamSpec] = []
    modules: list[str] = []
    for spec in base:
        found.append(replace(spec, kind="frozen") if spec.kind == "trained" else spec)
        place = _place(spec)
        if place is None:
            continue
        names = tuple(_modules(spec, place))
        modules += names
        wanted = [lora.targets(name) for name in names]
        if any(wanted) and not all(wanted):
            raise ConfigError(
                "adapters of some experts",
                where="lora.target_modules",
                value=f"{names[wanted.index(True)]}, not {names[wanted.index(False)]}",
                rule="all experts of a layer have adapters, or none",
            )
        if any(wanted):
            _check_router(spec, config)
            layer = f"layers.{spec.module}"
            found += (
                replace(each, module=spec.module, adapts=spec.name)
                for each in inside(f"{layer}.{place.product}", _adapter(spec, lora))
            )
    _check_names(lora, modules)
    return tuple(found)


def unmatched(names: Iterable[str], modules: Iterable[str]) -> tuple[str, ...]:
    """The names, or endings of names, that no module has."""
    modules = tuple(modules)
    return tuple(n for n in names if not any(matches((n,), module) for module in modules))


def adaptable_modules(base: Iterable[ParamSpec]) -> tuple[str, ...]:
    """Hugging Face's names of all modules of a model that can have adapters."""
    places = ((spec, _place(spec)) for spec in base)
    return tuple(
        name for spec, place in places if place is not None for name in _modules(spec, place)
    )


def _place(spec: ParamSpec) -> Adaptable | None:
    return ADAPTABLE.get(spec.pattern.removeprefix("layers.{layer}."))


def _modules(spec: ParamSpec, place: Adaptable) -> Iterator[str]:
    for expert in range(spec.shape[0] if spec.stacked else 1):
        yield f"model.layers.{spec.module}.{place.module.format(expert=expert)}"


def _adapter(spec: ParamSpec, lora: LoraConfig) -> tuple[ParamSpec, ...]:
    """A, B and the magnitude of one matrix, or of the stacked ones of experts.

    What divides the outputs divides B; all use A, each for its own outputs. What divides the inputs
    divides A, and all multiply by B.
    """
    *experts, O, I = spec.shape  # noqa: E741
    *stack, out, into = spec.axes
    last = len(spec.shape) - 1
    rows = tuple(cut for cut in spec.divide if cut.axis < last)
    columns = tuple(cut for cut in spec.divide if cut.axis != last - 1)
    by_rows, by_columns = (any(cut.by == "mp" for cut in cuts) for cuts in (rows, columns))
    # uniform in +-1 / sqrt(I), as PEFT draws it, has the deviation 1 / sqrt(3 I)
    a = ParamSpec(
        A, (*stack, "r", into), (*experts, lora.r, I), columns,
        init="uniform", std=(3 * I) ** -0.5, partial_gradient=by_rows,
    )  # fmt: skip
    b = ParamSpec(
        B, (*stack, out, "r"), (*experts, O, lora.r), rows,
        init="zeros", partial_gradient=by_columns,
    )  # fmt: skip
    if not lora.use_dora:
        return a, b
    return a, b, ParamSpec(MAGNITUDE, (*stack, out), (*experts, O), rows, decay=False, init="ones")


def _check_family(config: ModelConfig) -> None:
    """Hugging Face's classes of other families call their modules otherwise."""
    try:
        kind = to_hf(config.model_copy(update={"lora": None}))["model_type"]
    except ConfigError:
        return  # a model of ours alone, with Mixtral's names
    if kind not in FAMILIES:
        return
    raise ConfigError(
        "impossible adapter",
        where="lora",
        value=f"a model of the type {kind}",
        rule="adapters are for models of the types mistral, ministral and mixtral",
    )


def _check_router(spec: ParamSpec, config: ModelConfig) -> None:
    if not spec.name.endswith(".moe.router.weight"):
        return
    assert config.moe is not None
    if not config.moe.gate.default:
        raise ConfigError(
            "impossible adapter",
            where="lora.target_modules",
            value=f"{_SPARSE}.gate with the gate {config.moe.gate.name}",
            rule="of the gates only softmax_top_k can have adapters",
        )


def _check_names(lora: LoraConfig, modules: list[str]) -> None:
    for key, names in (
        ("target_modules", lora.target_modules),
        ("exclude_modules", lora.exclude_modules),
    ):
        if names is None or names == ALL_LINEAR:
            continue
        if isinstance(names, str):
            lost: tuple[str, ...] = (
                () if any(matches(names, module) for module in modules) else (names,)
            )
        else:
            lost = unmatched(names, modules)
        if lost:
            ends = {module.rpartition(".")[2] for module in modules}
            near = difflib.get_close_matches(lost[0], sorted(ends), 3, cutoff=0.0)
            raise ConfigError(
                "no such module",
                where=f"lora.{key}",
                value=lost[0],
                rule="a name means at least one matrix of the model; embedding and head have no "
                "adapters",
                todo=f"the nearest names: {', '.join(near)}",
            )
    if modules and not any(map(lora.targets, modules)):
        raise ConfigError(
            "no adapters",
            where="lora.exclude_modules",
            value=lora.exclude_modules,
            rule="at least one matrix has an adapter",
        )
