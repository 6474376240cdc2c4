"""All parameters of a model: :class:`mistral_ms.models.CausalLM`."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace

from mistral_ms.config import ModelConfig
from mistral_ms.errors import WeightError
from mistral_ms.weights.embedding import EMBEDDING, HEAD, vocabulary_specs
from mistral_ms.weights.layers import layer_specs
from mistral_ms.weights.lora import with_adapters
from mistral_ms.weights.norm import norm_specs
from mistral_ms.weights.spec import Module, ParamSpec, inside

Specs = Mapping[str, ParamSpec]
"""Parameters by name."""


def specs(config: ModelConfig) -> tuple[ParamSpec, ...]:
    """Every parameter of a model, in the order of the computation.

    Args:
        config: the architecture; its ``layer_kinds`` say which layers the blocks hold.

    Raises:
        WeightError: an unknown kind of layer, or a name given twice.
        ConfigError: adapters that the model cannot have.
    """
    found = tuple(_scaled(config, spec) for spec in _specs(config))
    if config.lora is not None:
        found = with_adapters(found, config)
    names = set()
    for spec in found:
        if spec.name in names:
            raise WeightError("parameter given twice", where=spec.name, rule="names are unique")
        names.add(spec.name)
    return found


def stored_specs(config: ModelConfig) -> tuple[ParamSpec, ...]:
    """What checkpoints of a model hold: every parameter, or its adapters alone where it has any."""
    found = specs(config)
    return found if config.lora is None else tuple(each for each in found if each.adapts)


def expert_weights(config: ModelConfig) -> tuple[ParamSpec, ...]:
    """The stacked matrices of all routed experts, in the order of the computation.

    Args:
        config: the architecture; of a sparse layer of another kind nothing is known.
    """
    if config.layer_kinds.sparse != "moe":
        return ()
    names = {f"layers.{{layer}}.moe.experts.{name}" for name in ("w1", "w2", "w3")}
    return tuple(spec for spec in specs(config) if spec.pattern in names)


def by_name(parameters: Iterable[ParamSpec]) -> dict[str, ParamSpec]:
    """Parameters by name, in their order."""
    return {spec.name: spec for spec in parameters}


def check_parameters(
    held: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Compares the parameters that a model has with those that its specifications describe.

    Args:
        held: shapes of the model's parameters, by name.
        expected: the shapes that this process should hold, by name.

    Raises:
        WeightError: a parameter without a specification, one that is missing, or another shape.
    """
    todo = "declare it beside its layer, in mistral_ms.weights or with register_layer"
    for name in held:
        if name not in expected:
            raise WeightError("weight without a specification", where=name, todo=todo)
    for name, shape in expected.items():
        if name not in held:
            raise WeightError("specification without a weight", where=name, value=list(shape))
        if held[name] != shape:
            raise WeightError(
                "weight of another shape",
                where=name,
                value=list(held[name]),
                rule=f"its specification says {list(shape)}",
            )


def _scaled(config: ModelConfig, spec: ParamSpec) -> ParamSpec:
    """A matrix, drawn as ``initializer_scale`` says: its last axis are its inputs."""
    scale, drawn = config.initializer_scale, spec.init == "normal" and len(spec.shape) > 1
    if scale is None or not drawn or spec.name == EMBEDDING:
        return spec
    return replace(spec, init="truncated_normal", std=math.sqrt(scale / spec.shape[-1]))


def _specs(config: ModelConfig) -> Iterator[ParamSpec]:
    module: Module = "tied" if config.tie_word_embeddings else "embedding"
    yield from _of(module, inside(EMBEDDING.removesuffix(".weight"), vocabulary_specs(config)))
    for layer in range(config.num_hidden_layers):
        yield from _of(layer, inside(f"layers.{layer}", _block(config, layer)))
    yield from _of("head", inside("norm", norm_specs(config.hidden_size)))
    if not config.tie_word_embeddings:
        yield from _of("head", inside(HEAD.removesuffix(".weight"), vocabulary_specs(config)))


def _block(config: ModelConfig, layer: int) -> tuple[ParamSpec, ...]:
    """:class:`mistral_ms.models.DecoderBlock`."""
    H, kinds = config.hidden_size, config.layer_kinds
    extra: dict[str, tuple[ParamSpec, ...]] = {"before": (), "after": ()}
    if config.is_sparse(layer):
        second = inside("moe", layer_specs(kinds.sparse, config.of_layer(layer)))
        for side in config.extra_feed_forwards:
            pieces = (
                *inside("layernorm", norm_specs(H)),
                *inside("feed_forward", layer_specs(kinds.dense, config)),
            )
            extra[side] = inside(f"extra_{side}", pieces)
    else:
        second = inside("feed_forward", layer_specs(kinds.dense, config))
    return (
        *inside("input_layernorm", norm_specs(H)),
        *inside("attention", layer_specs(kinds.attention, config)),
        *extra["before"],
        *inside("post_attention_layernorm", norm_specs(H)),
        *second,
        *extra["after"],
    )


def _of(module: Module, parameters: Iterable[ParamSpec]) -> Iterator[ParamSpec]:
    for spec in parameters:
        yield replace(spec, module=module)
