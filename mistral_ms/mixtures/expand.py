"""Experts of a checkpoint: add, remove, export, import; some rows are in memory at a time.

What is read may be of any format that is known (Hugging Face's Mixtral, say); what is written is
ours. Whatever has a row for each expert (axis ``E`` of its specification) follows: the experts'
matrices, the gate's, its state.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mistral_ms.checkpoint import Source
from mistral_ms.checkpoint.dtypes import FROM_CONFIG, WEIGHT_DTYPES, bf16_to_fp32
from mistral_ms.checkpoint.safetensors_file import SafetensorsStore, encode_header, read_header
from mistral_ms.config import ModelConfig
from mistral_ms.config.base import validate
from mistral_ms.config.moe import MoEArchitecture
from mistral_ms.errors import CheckpointError, ConfigError
from mistral_ms.mixtures.lifelong import BIAS, CLOSED, StagedTopKSettings
from mistral_ms.mixtures.rewriting import Part, Rows, rewrite
from mistral_ms.weights import ParamSpec, specs

Init = Literal["copy", "fresh"]
MakePart = Callable[[ParamSpec, int], Part]
"""The rows of the n-th new expert in a parameter."""

BY_NUMBER = ("hash_top_1", "random_routed")
"""Gates that map tokens to numbers of experts."""


@dataclass(frozen=True)
class ExpertsResult:
    """What was done.

    Attributes:
        experts: of each sparse layer now.
        frozen_experts: of those.
        bytes: of all tensors.
    """

    experts: int
    frozen_experts: int
    bytes: int


def add_experts(
    source: Source,
    dst: Path,
    count: int,
    init: Init = "copy",
    *,
    freeze: bool = True,
    closed: bool = True,
    opening_updates: int = 50,
    seed: int = 0,
    **options: Any,
) -> ExpertsResult:
    """Adds experts to every sparse layer, behind the old ones: a stage of Lifelong-MoE.

    Args:
        source: an open checkpoint, whose gate is Mixtral's or ``staged_top_k``, which the new one
            has.
        dst: the new checkpoint.
        count: how many.
        init: ``copy``: new expert n and its row of the gate begin as old expert n mod E; ``fresh``:
            they are drawn as the specifications say.
        freeze: the old ones are not trained from now on; otherwise all are, those that an earlier
            stage froze, too.
        closed: tokens cannot choose the new ones at the first step, see
            :mod:`mistral_ms.mixtures.lifelong`.
        opening_updates: updates until they can.
        seed: of fresh ones.
        options: ``overwrite`` and ``progress``, as of
            :func:`~mistral_ms.mixtures.rewriting.rewrite`.

    Raises:
        ConfigError: a dense model, another gate, or a count below 1.
        CheckpointError: whatever reading and writing raise.
    """
    if count < 1:
        raise ConfigError("impossible count", where="count", value=count, rule="must be 1 or more")
    old = source.config
    E = _moe(old).num_local_experts

    def made(spec: ParamSpec, n: int) -> Part:
        if spec.name.endswith(BIAS):
            return np.full(1, CLOSED if closed else 0.0, np.float32)
        if init == "copy":
            return Rows(spec.name, n % E, n % E + 1)
        rng = np.random.default_rng([seed, zlib.crc32(spec.name.encode()), E + n])
        values = rng.standard_normal(spec.shape[1:], dtype=np.float32)
        return values * np.float32(spec.std)

    return _grown(source, dst, count, made, E if freeze else 0, opening_updates, options)


def freeze_experts(source: Source, dst: Path, count: int, **options: Any) -> ExpertsResult:
    """The same model, whose first experts and their rows of the gate are not trained from now on.

    Args:
        source: an open checkpoint, as of :func:`add_experts`.
        dst: the new checkpoint.
        count: how many; 0 trains all.
        options: as of :func:`add_experts`.

    Raises:
        ConfigError: as of :func:`add_experts`; more experts than there are.
        CheckpointError: whatever reading and writing raise.
    """

    def made(spec: ParamSpec, n: int) -> Part:
        raise AssertionError("nothing is added")

    return _grown(source, dst, 0, made, count, None, options)


def import_expert(
    source: Source, file: Path, dst: Path, *, closed: bool = False, **options: Any
) -> ExpertsResult:
    """Adds one expert that :func:`export_expert` wrote, behind the others; those that are frozen
    stay so.

    Args:
        source: an open checkpoint of the same sizes.
        file: the expert.
        dst: the new checkpoint.
        closed: as of :func:`add_experts`.
        options: likewise.

    Raises:
        ConfigError: as of :func:`add_experts`.
        CheckpointError: the file holds another model's expert; or reading and writing fail.
    """
    header = read_header(Path(file))
    wanted = {s.name: s.shape[1:] for s in _rows_of_experts(source.config) if s.kind == "trained"}
    found = {name: info.shape for name, info in header.tensors.items()}
    if found != wanted:
        name = next(n for n in {**wanted, **found} if wanted.get(n) != found.get(n))
        raise CheckpointError(
            "another model's expert",
            where=f"{file}: {name}",
            value=found.get(name),
            rule=f"this model's is {wanted.get(name)}",
        )
    store = SafetensorsStore({Path(file): header})

    def made(spec: ParamSpec, n: int) -> Part:
        if spec.name.endswith(BIAS):
            return np.full(1, CLOSED if closed else 0.0, np.float32)
        info = header.tensors[spec.name]
        values = np.empty(info.size, WEIGHT_DTYPES[info.dtype])
        store.read_into(spec.name, 0, values)
        if info.dtype == "BF16":
            wide = np.empty(info.size, np.float32)
            bf16_to_fp32(values, wide)
            return wide
        return values.astype(np.float32)

    try:
        return _grown(source, dst, 1, made, None, None, options)
    finally:
        store.close()


def remove_experts(
    source: Source, dst: Path, experts: Sequence[int], **options: Any
) -> ExpertsResult:
    """Leaves experts out of every sparse layer.

    Args:
        source: an open checkpoint.
        dst: the new checkpoint.
        experts: their numbers.
        options: as of :func:`add_experts`.

    Raises:
        ConfigError: numbers that are not there, or fewer experts left than a token visits.
        CheckpointError: whatever reading and writing raise.
    """
    moe = _moe(source.config)
    E, gone = moe.num_local_experts, set(experts)
    if not gone or not gone <= set(range(E)):
        raise ConfigError(
            "no such experts",
            where="experts",
            value=", ".join(map(str, experts)) or "none",
            rule=f"there are 0 to {E - 1}",
        )
    kept = [e for e in range(E) if e not in gone]
    if moe.gate.name in BY_NUMBER or getattr(moe.gate, "n_group", 1) > 1:
        raise ConfigError(
            "experts with numbers",
            where="model.moe.gate",
            value=moe.gate.name,
            rule="the gate finds experts by their numbers or in groups of neighbours, which would "
            "be others then",
        )
    changes: dict[str, Any] = {"num_local_experts": len(kept)}
    frozen = 0
    if isinstance(moe.gate, StagedTopKSettings):
        frozen = sum(e < moe.gate.frozen_experts for e in kept)
        seen = moe.gate.visible_experts
        seen = None if seen is None else sum(e < seen for e in kept)
        update = {"frozen_experts": frozen, "visible_experts": seen}
        changes["gate"] = moe.gate.model_copy(update=update)
    config = _changed(source.config, changes)
    tensors = {
        spec.name: [Rows(spec.name, e, e + 1) for e in kept]
        for spec in _rows_of_experts(source.config)
    }
    return ExpertsResult(len(kept), frozen, rewrite(source, dst, config, tensors, **options))


def export_expert(source: Source, file: Path, expert: int) -> int:
    """Writes one expert of all sparse layers into one file of safetensors: w1, w2, w3 and its rows
    of the gate, by our names without the axis of experts; not the gate's state.

    Args:
        source: an open checkpoint.
        file: the new file; an old one is replaced.
        expert: its number.

    Returns:
        Bytes of its tensors.

    Raises:
        ConfigError: no such expert.
        CheckpointError: reading or writing fails.
    """
    E = _moe(source.config).num_local_experts
    if not 0 <= expert < E:
        rule = f"there are 0 to {E - 1}"
        raise ConfigError("no such experts", where="expert", value=expert, rule=rule)
    named = [s for s in _rows_of_experts(source.config) if s.kind == "trained"]
    header = [(s.name, FROM_CONFIG[source.dtype(s.name)], s.shape[1:]) for s in named]
    aside, written = file.with_name(f".{file.name}.part"), 0
    try:
        with aside.open("wb") as out:
            out.write(encode_header(header, {"format": "ms"}))
            for spec in named:
                values = source.read(spec.name, "keep", (expert, expert + 1))
                out.write(values.tobytes())
                written += values.nbytes
            out.flush()
            os.fsync(out.fileno())
        source.verify()
        aside.replace(file)
    except OSError as error:
        raise CheckpointError("cannot write", where=file, value=error.strerror) from error
    finally:
        aside.unlink(missing_ok=True)
    return written


def _grown(
    source: Source,
    dst: Path,
    count: int,
    made: MakePart,
    frozen: int | None,
    opening_updates: int | None,
    options: Mapping[str, Any],
) -> ExpertsResult:
    moe = _moe(source.config)
    E = moe.num_local_experts
    if isinstance(moe.gate, StagedTopKSettings):
        settings = moe.gate
    elif moe.gate.default:
        settings = StagedTopKSettings()
    else:
        raise ConfigError(
            "impossible stage",
            where="model.moe.gate",
            value=moe.gate.name,
            rule="experts are added under the gates softmax_top_k and staged_top_k",
        )
    update: dict[str, Any] = {"visible_experts": None}
    if frozen is not None:
        update["frozen_experts"] = frozen
    if opening_updates is not None:
        update["opening_updates"] = opening_updates
    settings = settings.model_copy(update=update)
    config = _changed(source.config, {"num_local_experts": E + count, "gate": settings})
    known = set(source.names())
    tensors: dict[str, list[Part]] = {}
    for spec in _rows_of_experts(config):
        before: list[Part] = [Rows(spec.name, 0, E)]
        if spec.name not in known:  # the bias, which Mixtral's gate does not have
            before = [np.zeros(E, np.float32)]
        tensors[spec.name] = [*before, *(made(spec, n) for n in range(count))]
    written = rewrite(source, dst, config, tensors, **options)
    return ExpertsResult(E + count, settings.frozen_experts, written)


def _rows_of_experts(config: ModelConfig) -> tuple[ParamSpec, ...]:
    """The parameters whose first axis is the experts."""
    return tuple(spec for spec in specs(config) if spec.axes[0] == "E")


def _changed(config: ModelConfig, changes: Mapping[str, Any]) -> ModelConfig:
    values = {**_moe(config).model_dump(), "gate": _moe(config).gate, **changes}
    moe = validate(MoEArchitecture, values, "model.moe")
    changed = config.model_copy(update={"moe": moe})
    specs(changed)  # what the gate cannot do is said before anything is written
    return changed


def _moe(config: ModelConfig) -> MoEArchitecture:
    if config.moe is None:
        raise ConfigError("no experts", where="model.moe", rule="the model is dense")
    if config.moe.layer_experts is not None:
        raise ConfigError(
            "different numbers of experts",
            where="model.moe.num_local_experts",
            value=list(config.expert_counts),
            rule="experts come and go in all layers alike, so all have as many",
        )
    return config.moe
