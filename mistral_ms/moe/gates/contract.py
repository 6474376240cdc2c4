"""Holds gates to their contract before anything is compiled with them.

A gate is written by whoever tries an idea. What it gives besides what is asked for would end deep
in a compiled graph, in a message that names neither the gate nor the rule. So a gate is tried on a
few rows first, operator by operator, with fresh weights: in training and outside of it.
MindSpore's dry run computes nothing: there a gate is tried beforehand, by the command.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from mistral_ms.config import ModelConfig
from mistral_ms.errors import ConfigError, MistralMsError
from mistral_ms.moe.gates.base import Gate
from mistral_ms.moe.losses import router_sums, stack_sums
from mistral_ms.moe.routing import Routing, gate_context
from mistral_ms.ops.modes import pynative_mode
from mistral_ms.weights import init_values, router_specs

TOKENS = 5
"""Of the trial: a number that is rarely one of experts, or of choices."""

Result = TypeVar("Result")


def try_gates(cells: nn.Cell, config: ModelConfig, training: bool) -> None:
    """Tries the gate of a model that is about to be compiled; all its layers have the same
    one, but for the number of experts.

    Args:
        cells: the model, or a layer.
        config: of the whole model.
        training: with a context, too.

    Raises:
        ConfigError: names the gate's method, what it gave, and the rule. Whether experts, scores
            and losses are good is not asked.
    """
    found = (cell for _, cell in cells.cells_and_names() if isinstance(cell, Gate))
    gate = next(found, None)
    if gate is None:
        return
    config = config.model_copy(update={"moe": gate.moe})  # layers may differ in their experts
    rows_TH = np.random.default_rng(0).standard_normal((TOKENS, config.hidden_size))
    x_TH = Tensor(rows_TH.astype(np.float32))
    random_B3 = Tensor(np.zeros((1, 3), np.int32))
    state = _drawn(gate, config, gate.buffer_names)
    with pynative_mode():
        for context in (None, gate_context(random_B3, TOKENS)) if training else (None,):
            weights = _drawn(gate, config, gate.weight_names)
            x_TH = x_TH.astype(weights[0].dtype) if weights else x_TH
            ids_T = Tensor(np.arange(TOKENS, dtype=np.int32))
            given = x_TH, ids_T, weights, state, context
            chosen = _called(gate, _method(gate), gate.route_with_ids, *given)
            _check_routing(gate, chosen)
        _check_losses(gate, chosen)
    if state and training:
        before = {n: v.asnumpy() for n, v in zip(gate.buffer_names, state, strict=True)}
        shapes = {name: values.shape for name, values in before.items()}
        routed_E = np.ones(gate.num_experts, np.float32)
        _check_state(gate, _called(gate, "next_state", gate.next_state, before, routed_E), shapes)


def _drawn(gate: Gate, config: ModelConfig, names: Sequence[str]) -> tuple[Tensor, ...]:
    """Initial values of a gate's parameters, which may have none yet."""
    drawn = {
        spec.name: init_values(replace(spec, name=f"layers.0.{spec.name}"), 0)
        for spec in router_specs(config)
    }
    return tuple(Tensor(drawn[name]).astype(getattr(gate, name).dtype) for name in names)


def _check_routing(gate: Gate, chosen: Any) -> None:
    method = _method(gate)
    T, K, E = TOKENS, gate.top_k, gate.num_experts
    names = ("weights_TK", "experts_TK", "scores_TE", "logits_TE", "terms")
    if not isinstance(chosen, tuple) or len(chosen) != len(names):
        value = f"{len(chosen)} results" if isinstance(chosen, tuple) else type(chosen).__name__
        _refuse(gate, method, value, f"gives a tuple of {', '.join(names)}")
    *parts, terms = chosen
    wanted = ((ms.float32, (T, K)), (ms.int32, (T, K)), *2 * ((ms.float32, (T, E)),))
    for name, part, (dtype, shape) in zip(names, parts, wanted, strict=False):
        _check_tensor(gate, method, name, part, dtype, shape)
    if not isinstance(terms, tuple) or len(terms) != len(gate.statistics):
        value = f"{len(terms)} terms" if isinstance(terms, tuple) else type(terms).__name__
        names_of = ", ".join(gate.statistics) or "none"
        _refuse(gate, method, value, f"the terms are a tuple of those in statistics: {names_of}")
    for name, term in zip(gate.statistics, terms, strict=True):
        _check_tensor(gate, method, f"the term {name}", term, ms.float32, (T, E))
    _check_experts(gate, chosen[0].asnumpy(), chosen[1].asnumpy())


def _check_experts(gate: Gate, weights_TK: Any, experts_TK: Any) -> None:
    method, E = _method(gate), gate.num_experts
    if experts_TK.min() < 0 or experts_TK.max() > E:
        value = f"experts from {experts_TK.min()} to {experts_TK.max()}"
        _refuse(gate, method, value, f"experts are 0 to {E - 1}, and {E} for a choice left out")
    for experts_K in experts_TK.tolist():
        chosen = [expert for expert in experts_K if expert < E]
        if len(set(chosen)) < len(chosen):
            _refuse(gate, method, f"experts {experts_K}", "those of a token are all different")
    if np.any(weights_TK[experts_TK == E]):
        _refuse(gate, method, "a weight", f"a choice that is left out (expert {E}) has weight 0")


def _check_losses(gate: Gate, chosen: Routing) -> None:
    """Of two layers that chose alike."""
    valid_T = Tensor(np.ones(TOKENS, np.float32))
    sums = stack_sums((router_sums(chosen, chosen[0], valid_T),) * 2)
    for name, loss in gate.losses.items():
        for pooled in (False, True):
            found = _called(gate, f"losses[{name!r}]", loss, sums, pooled)
            _check_tensor(gate, f"losses[{name!r}]", "the loss", found, ms.float32, ())


def _check_state(gate: Gate, after: Any, wanted: dict[str, tuple[int, ...]]) -> None:
    found = type(after).__name__
    if isinstance(after, dict):
        found = str({name: np.shape(values) for name, values in after.items()})
    if found != str(wanted):
        _refuse(gate, "next_state", found, f"gives every buffer, with its shape: {wanted}")


def _check_tensor(
    gate: Gate, method: str, name: str, found: Any, dtype: ms.Type, shape: tuple[int, ...]
) -> None:
    value = type(found).__name__
    if isinstance(found, Tensor):
        value = f"{found.dtype} {list(found.shape)}"
    if value != f"{dtype} {list(shape)}":
        sizes = f"{TOKENS} tokens, K = {gate.top_k} and E = {gate.num_experts}"
        rule = f"is a Tensor of {dtype} {list(shape)}, for {sizes}"
        _refuse(gate, method, f"{name} is {value}", rule)


def _called(gate: Gate, method: str, function: Callable[..., Result], *given: Any) -> Result:
    """What it gives, computed to the end; if it fails, the line of its file in which it did."""
    try:
        found = function(*given)
        for part in found if isinstance(found, tuple) else (found,):
            if isinstance(part, Tensor):
                part.asnumpy()  # errors of operators come when results are read
        return found
    except MistralMsError:
        raise
    except Exception as error:  # whatever its author or an operator raises
        frames = traceback.extract_tb(error.__traceback__)
        path = sys.modules[type(gate).__module__].__file__
        lines = [frame.lineno for frame in frames if frame.filename == path]
        place = f" ({Path(path).name}, line {lines[-1]})" if path and lines else ""
        said = str(error).strip().partition("\n")[0]
        value = f"{type(error).__name__}: {said}"
        _refuse(gate, f"{method}{place}", value, "failed on a few rows", error)


def _method(gate: Gate) -> str:
    return "route_with_ids" if gate.takes_ids else "route"


def _refuse(
    gate: Gate, method: str, value: str, rule: str, cause: Exception | None = None
) -> NoReturn:
    raise ConfigError(
        f"broken gate {gate.moe.gate.name}",
        where=f"{type(gate).__name__}.{method}",
        value=value,
        rule=rule,
        todo="mend the gate; docs/extending.md has its contract",
    ) from cause
