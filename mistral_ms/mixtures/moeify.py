"""Feed-forwards of any Cell become mixtures of experts, in one line (FastMoE, arXiv:2103.13262)."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from mistral_ms.config import DROPLESS, ModelConfig, RoutingConfig
from mistral_ms.config.base import validate
from mistral_ms.config.moe import MoEArchitecture
from mistral_ms.errors import ConfigError
from mistral_ms.mixtures.routed import AnyGate, RoutedFeedForward, Spread
from mistral_ms.moe import Gate, make_gate, try_gates
from mistral_ms.weights import init_values, router_specs

Layers: TypeAlias = str | type[nn.Cell] | Callable[[str, nn.Cell], bool]
"""Which Cells: names with wildcards, divided by ``|``; a class; or a function of name and Cell."""

ExpertMaker: TypeAlias = Callable[[int], nn.Cell]
"""Makes an expert; called with H, as FastMoE's ``expert=``."""

FEED_FORWARDS = "*mlp|*ffn|*feed_forward"
"""What implementations call them."""
PROBE_ROWS = 16
"""Rows with which the weights of a gate are looked at."""


def moeify(
    model: nn.Cell,
    num_experts: int = 8,
    gate: str | Mapping[str, Any] | Callable[..., AnyGate] = "softmax_top_k",
    *,
    top_k: int = 2,
    norm_topk_prob: bool = True,
    layers: Layers = FEED_FORWARDS,
    init: Literal["copy", "fresh"] = "copy",
    experts: ExpertMaker | Sequence[ExpertMaker] | None = None,
    hidden_size: int | None = None,
    routing: RoutingConfig = DROPLESS,
    eval_routing: RoutingConfig | None = None,
    packed: bool | None = None,
    losses: Mapping[str, float] | None = None,
    seed: int = 0,
    spread: Spread | None = None,
) -> dict[str, RoutedFeedForward]:
    """Replaces feed-forwards of a model in place, each by a gate and experts.

    With ``init="copy"`` every expert begins as a copy of what it replaces, so that the model's
    outputs are what they were, whatever the gate chooses (sparse upcycling, arXiv:2212.05055); that
    takes weights that add up to 1, which is checked on a few rows.

    Args:
        model: any Cell: a plain one, ours, or another library's.
        num_experts: E of each layer.
        gate: name or settings of a registered gate (:mod:`mistral_ms.moe.gates`), or what is
            called with H, E, K for each layer and gives a gate: a class as those of
            :mod:`mistral_ms.mixtures.fastmoe`, or a function; see
            :data:`~mistral_ms.mixtures.routed.AnyGate`.
        top_k: K.
        norm_topk_prob: of registered gates: whether the K weights are divided by their sum.
        layers: which Cells are replaced; not those inside of one that is.
        init: ``copy``; or ``fresh``: copies whose matrices are drawn again with the deviation of
            the replaced ones, and whose other parameters (biases, norms) stay.
        experts: with ``fresh``: makes the experts instead, all of them, or one function for each.
        hidden_size: H; None: the last axis of the replaced Cell's first matrix.
        routing: ``dropless`` or ``capacity``. A capacity drops choices, so outputs at the start are
            those of before only where nothing is dropped.
        eval_routing: the policy outside of training; None: the same.
        packed: see :class:`~mistral_ms.mixtures.routed.RoutedFeedForward`; None: packed in
            PyNative without a capacity.
        losses: likewise.
        seed: of gates, fresh experts and noise.
        spread: see :class:`~mistral_ms.mixtures.routed.Spread`; every process calls with the same
            model and seed, and keeps its experts.

    Returns:
        The new layers by the names of what they replaced.

    Raises:
        ConfigError: nothing matches; H cannot be seen; a copy with a gate whose weights do not add
            up to 1; experts of another number than E, or with ``copy``.
    """
    found = matching(model, layers)
    _check_experts(num_experts, experts, init)
    if packed is None:
        pynative = ms.get_context("mode") == ms.PYNATIVE_MODE
        packed = pynative and routing.policy == "dropless"
    replaced: dict[str, RoutedFeedForward] = {}
    for number, (name, cell) in enumerate(found.items()):
        H = _hidden_size(name, cell) if hidden_size is None else hidden_size
        settings = (H, num_experts, top_k)
        if isinstance(gate, str | Mapping):
            chooses: Any = registered_gate(gate, *settings, norm_topk_prob, routing, seed, number)
        else:
            chooses = gate(*settings)
        if init == "copy":
            _check_weights(chooses, H, name)
        made = _experts(cell, settings, init, experts, [seed, zlib.crc32(name.encode())])
        layer = RoutedFeedForward(
            made, chooses, routing, packed, losses, seed, eval_routing=eval_routing, spread=spread
        )
        layer.set_train(cell.training)
        _put(model, name, layer)
        for inner, parameter in layer.parameters_and_names():
            parameter.name = f"{name}.{inner}"  # those of copies are all the same
        replaced[name] = layer
    return replaced


def update_gates(layers: Mapping[str, RoutedFeedForward]) -> dict[str, np.ndarray]:
    """To be called after each update of the weights, with what :func:`moeify` gave.

    Returns:
        Choices of each expert of each layer since the last call.
    """
    return {name: layer.update_gate() for name, layer in layers.items()}


def matching(model: nn.Cell, layers: Layers) -> dict[str, nn.Cell]:
    """The Cells of a model that are meant, by name, outer ones before inner ones of them.

    Raises:
        ConfigError: there is none.
    """
    found: dict[str, nn.Cell] = {}
    for name, cell in model.cells_and_names():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        if name and not inside and _matches(layers, name, cell):
            found[name] = cell
    if not found:
        raise ConfigError(
            "no feed-forward",
            where="layers",
            value=layers if isinstance(layers, str) else getattr(layers, "__name__", layers),
            rule=f"must match a Cell inside {type(model).__name__}",
            todo="give names as cells_and_names() shows them, a class, or a function",
        )
    return found


def _matches(layers: Layers, name: str, cell: nn.Cell) -> bool:
    if isinstance(layers, str):
        return any(fnmatchcase(name, pattern) for pattern in layers.split("|"))
    if isinstance(layers, type):
        return isinstance(cell, layers)
    return layers(name, cell)


def _check_experts(num_experts: int, experts: Any, init: str) -> None:
    if init not in ("copy", "fresh"):
        raise ConfigError("unknown start", where="init", value=init, rule="copy or fresh")
    if experts is None:
        return
    if init == "copy":
        raise ConfigError(
            "two kinds of experts",
            where="experts",
            rule='init="copy" makes them of what they replace',
            todo='set init="fresh"',
        )
    if not callable(experts) and len(experts) != num_experts:
        raise ConfigError(
            "other experts",
            where="experts",
            value=f"{len(experts)} functions",
            rule=f"one for each of the {num_experts} experts",
        )


def _hidden_size(name: str, cell: nn.Cell) -> int:
    for parameter in cell.get_parameters():
        if parameter.ndim == 2:
            return int(parameter.shape[-1])
    raise ConfigError(
        "unknown width",
        where=name,
        value=type(cell).__name__,
        rule="has no matrix whose last axis could be its input",
        todo="give hidden_size",
    )


def registered_gate(
    gate: str | Mapping[str, Any],
    hidden_size: int,
    num_experts: int,
    top_k: int,
    norm_topk_prob: bool,
    routing: RoutingConfig,
    seed: int,
    layer: int = 0,
) -> Gate:
    """A gate of the register, with fresh parameters, outside of a decoder.

    Args:
        gate: its name or settings.
        hidden_size: H.
        num_experts: E.
        top_k: K.
        norm_topk_prob: whether the K weights are divided by their sum.
        routing: see :class:`~mistral_ms.moe.Gate`.
        seed: of the parameters.
        layer: layers of other numbers draw other parameters, and other noise.

    Raises:
        ConfigError: an unknown gate, settings that it cannot have, or one that breaks its contract.
    """
    H, E, K = hidden_size, num_experts, top_k
    values = {
        "num_local_experts": E,
        "num_experts_per_tok": K,
        "norm_topk_prob": norm_topk_prob,
        "gate": gate,
    }
    moe = validate(MoEArchitecture, values, "moeify")
    if moe.gate.takes_ids:
        raise ConfigError(
            "gate of token ids",
            where="gate",
            value=moe.gate.name,
            rule="a layer in the place of a feed-forward gets states, not ids",
        )
    config = ModelConfig(
        vocab_size=1,
        hidden_size=H,
        intermediate_size=1,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=2,
        moe=moe,
    )
    made = make_gate(config, routing, layer)
    for spec in router_specs(config):
        drawn = init_values(replace(spec, name=f"layers.{layer}.{spec.name}"), seed)
        getattr(made, spec.name).set_data(Tensor(drawn))
        if spec.kind == "buffer":
            getattr(made, spec.name).requires_grad = False
    try_gates(made, config, training=True)
    return made


def _check_weights(gate: Any, H: int, name: str) -> None:
    """A copy computes what was there only if its weights add up to 1.

    Raises:
        ConfigError: they do not, on rows of standard normal numbers.
    """
    rows = np.random.default_rng(0).standard_normal((PROBE_ROWS, H)).astype(np.float32)
    found = gate(Tensor(rows), None) if isinstance(gate, Gate) else gate(Tensor(rows))
    sums_T = found[0].asnumpy().sum(-1)
    if np.abs(sums_T - 1).max() > 1e-3:
        raise ConfigError(
            "copies would not compute what they replace",
            where=name,
            value=f"weights add up to {sums_T.min():.3g} to {sums_T.max():.3g}",
            rule='init="copy" needs a gate whose weights add up to 1',
            todo='set norm_topk_prob=True, or init="fresh"',
        )


def _experts(
    cell: nn.Cell,
    settings: tuple[int, int, int],
    init: str,
    experts: ExpertMaker | Sequence[ExpertMaker] | None,
    seed: Sequence[int],
) -> list[nn.Cell]:
    H, E, _ = settings
    if experts is not None:
        makers = [experts] * E if callable(experts) else experts
        return [maker(H) for maker in makers]
    copies = [_copy(cell) for _ in range(E)]
    if init == "fresh":
        for e, each in enumerate(copies):
            rng = np.random.default_rng([*seed, e])
            for parameter in each.get_parameters():
                if parameter.ndim > 1:
                    _draw(parameter, rng)
    return copies


def _copy(cell: nn.Cell) -> nn.Cell:
    """A Cell with parameters of its own. Operators have no state and are shared: those made by
    ``ops.Custom`` cannot be copied.
    """
    shared = {}
    for _, each in cell.cells_and_names():
        for value in (*vars(each).values(), *each._primitives.values()):
            if isinstance(value, ops.Primitive):
                shared[id(value)] = value
    return copy.deepcopy(cell, shared)


def _draw(parameter: Parameter, rng: np.random.Generator) -> None:
    """Normal numbers with the deviation that a matrix has."""
    std = parameter.asnumpy().astype(np.float32).std()
    values = rng.standard_normal(parameter.shape, dtype=np.float32) * std
    parameter.set_data(Tensor(values).astype(parameter.dtype))


def _put(model: nn.Cell, name: str, layer: nn.Cell) -> None:
    parent, _, last = name.rpartition(".")
    for part in filter(None, parent.split(".")):
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    if last.isdigit():
        model[int(last)] = layer
    else:
        setattr(model, last, layer)
