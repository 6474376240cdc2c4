"""Cards, nodes and networks as data: the files of ``configs/hardware``.

Rates are those of one card unless a key says otherwise; bandwidths are in one direction, in GB/s
of 10^9 bytes. Every number has a source; what nobody has measured says so.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from mistral_ms.config import read_yaml
from mistral_ms.config.base import Frozen, validate
from mistral_ms.config.names import perhaps
from mistral_ms.data import CONFIGS
from mistral_ms.errors import ConfigError

DIRECTORY = CONFIGS / "hardware"
"""The files that come with the package."""
GIGA, TERA, MICRO = 1e9, 1e12, 1e-6
_Share = Field(gt=0, le=1)
_Positive = Field(gt=0, allow_inf_nan=False)


class PeakRates(Frozen):
    """TFLOP/s of dense matrix products, by the dtype of their factors."""

    bfloat16: float = _Positive
    float16: float = _Positive
    float32: float = _Positive


class ComputeRates(Frozen):
    """How fast a card computes.

    Attributes:
        peak_tflops: of its matrix units.
        efficiency: what a product reaches of the peak, as points (length of its shortest axis,
            share); between them the share is linear in the logarithm of the length.
        attention_forward: what the fused attention operator reaches of the peak.
        attention_backward: likewise, its gradient.
        memory_gb_per_s: bandwidth of the card's memory.
        memory_efficiency: what operators that are bound by memory reach of it.
        slowdown: what a training step's operators take in multiples of what they take alone.
        stream_efficiency: what passes through whole weights reach of the memory's bandwidth: adding
            gradients up, updates, and what products read and write; None: as ``memory_efficiency``.
        alone: how many times as fast a card computes while all others of its node wait: of
            processes that share cores more than 1. None: cards share nothing.
    """

    peak_tflops: PeakRates
    efficiency: tuple[tuple[int, float], ...] = Field(min_length=1)
    attention_forward: float = _Share
    attention_backward: float = _Share
    memory_gb_per_s: float = _Positive
    memory_efficiency: float = _Share
    slowdown: float = Field(ge=1, allow_inf_nan=False)
    stream_efficiency: float | None = Field(default=None, gt=0, le=1)
    alone: float | None = Field(default=None, ge=1, allow_inf_nan=False)

    @model_validator(mode="after")
    def _rising(self) -> ComputeRates:
        lengths = [length for length, _ in self.efficiency]
        if lengths != sorted(set(lengths)) or lengths[0] < 1:
            raise ValueError(f"lengths in efficiency {lengths} must rise from 1 or more")
        if not all(0 < share <= 1 for _, share in self.efficiency):
            raise ValueError("shares in efficiency must be above 0 and at most 1")
        return self

    def product_efficiency(self, shortest: float) -> float:
        """The share of the peak that a matrix product reaches.

        Args:
            shortest: the length of its shortest axis.
        """
        points = self.efficiency
        index = bisect_right(points, shortest, key=lambda point: point[0])
        if index == 0:  # what is narrower fills less of the unit
            return points[0][1] * shortest / points[0][0]
        if index == len(points):
            return points[-1][1]
        (below, low), (above, high) = points[index - 1], points[index]
        return low + (high - low) * math.log(shortest / below) / math.log(above / below)

    def peak(self, dtype: str) -> float:
        """FLOP/s of the matrix units.

        Args:
            dtype: of the factors, one of :class:`PeakRates`.
        """
        rate: float = getattr(self.peak_tflops, dtype)
        return rate * TERA

    def streamed(self, nbytes: float) -> float:
        """Seconds of what is bound by memory.

        Args:
            nbytes: read and written.
        """
        return nbytes / (self.memory_gb_per_s * GIGA * self.memory_efficiency)

    def passed(self, nbytes: float) -> float:
        """Seconds of a pass through whole weights, see ``stream_efficiency``.

        Args:
            nbytes: read and written.
        """
        if self.stream_efficiency is None:
            return self.streamed(nbytes)
        return nbytes / (self.memory_gb_per_s * GIGA * self.stream_efficiency)

    def product(self, flops: float, nbytes: float, shortest: float, dtype: str) -> float:
        """Seconds of a matrix product: the longer of its operations and its bytes.

        Args:
            flops: two for each multiplication and addition.
            nbytes: read and written.
            shortest: the length of its shortest axis.
            dtype: of the factors.
        """
        rate = self.peak(dtype) * self.product_efficiency(max(1.0, shortest))
        return max(flops / rate, self.passed(nbytes))


class NetworkRates(Frozen):
    """One level of a network.

    Attributes:
        topology: ``mesh``, each card has an own link to each other one, so that few cards use few
            links; ``switch``, each card can give all of its bandwidth to any other.
        gb_per_s: bandwidth of a card, over all of its links.
        efficiency: what collective operations reach of it.
        latency_us: microseconds of a message, in addition to its bytes.
    """

    topology: Literal["mesh", "switch"]
    gb_per_s: float = _Positive
    efficiency: float = _Share
    latency_us: float = Field(ge=0, allow_inf_nan=False)

    def bytes_per_s(self, members: int, devices: int) -> float:
        """What a card can give to others at once.

        Args:
            members: cards that communicate with each other, this one included.
            devices: cards that this level connects.
        """
        links = (members - 1) / (devices - 1) if self.topology == "mesh" and devices > 1 else 1.0
        return self.gb_per_s * GIGA * self.efficiency * max(links, 0.0)

    @property
    def latency(self) -> float:
        """Seconds."""
        return self.latency_us * MICRO


class HostRates(Frozen):
    """The host of a node.

    Attributes:
        gb_per_s: bandwidth between a card and host memory, all cards at the same time.
        memory_gb_per_s: of the node's memory, shared by its cards.
        memory_gib: of the node, for all cards.
    """

    gb_per_s: float = _Positive
    memory_gb_per_s: float = _Positive
    memory_gib: float = _Positive


class Hardware(Frozen):
    """A kind of cluster.

    Attributes:
        name: for reports.
        device: what MindSpore calls it; decides who divides a training, see ``parallel.execution``.
        devices_per_node: cards of a node.
        memory_gib: memory of a card.
        reserved_gib: what driver and runtime take of it.
        communicator_mib: buffers of a card for each group that it communicates in.
        compute: how fast a card computes.
        inside: the network of a node.
        between: the network between nodes.
        host: the host of a node.
        sources: where each number is from, by its key (``compute.memory_gb_per_s``).
    """

    name: str
    device: Literal["Ascend", "GPU", "CPU"]
    devices_per_node: int = Field(ge=1)
    memory_gib: float = _Positive
    reserved_gib: float = Field(ge=0, allow_inf_nan=False)
    communicator_mib: float = Field(ge=0, allow_inf_nan=False)
    compute: ComputeRates
    inside: NetworkRates
    between: NetworkRates
    host: HostRates
    sources: dict[str, str]

    @model_validator(mode="after")
    def _every_number_has_a_source(self) -> Hardware:
        keys = set(_numbers(self))
        for key in sorted(keys - set(self.sources)):
            raise ValueError(f"{key} has no entry in sources")
        for key in sorted(set(self.sources) - keys):
            raise ValueError(f"sources.{key} is the source of no number")
        if self.reserved_gib >= self.memory_gib:
            raise ValueError("reserved_gib must be less than memory_gib")
        return self

    @property
    def usable_gib(self) -> float:
        """Of a card, for a training."""
        return self.memory_gib - self.reserved_gib


@dataclass(frozen=True)
class Cluster:
    """So many nodes of one kind.

    Attributes:
        hardware: the kind.
        nodes: how many. A single one may be used in part.
        cards: in all.
    """

    hardware: Hardware
    nodes: int
    cards: int

    @classmethod
    def of(cls, hardware: Hardware, cards: int) -> Cluster:
        """The nodes for a number of cards.

        Raises:
            ConfigError: more than a node's cards, and not a multiple of them.
        """
        devices = hardware.devices_per_node
        if cards < 1 or (cards > devices and cards % devices):
            raise ConfigError(
                "impossible cluster",
                where=hardware.name,
                value=f"{cards} cards",
                rule=f"a node has {devices} cards, and several nodes are used whole",
            )
        return cls(hardware, -(-cards // devices), cards)


def load_hardware(name: str | Path) -> Hardware:
    """Reads a file of hardware.

    Args:
        name: of a file of ``configs/hardware``, without its suffix; or a path.

    Raises:
        ConfigError: there is none, or a number is missing, impossible or without a source.
    """
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = DIRECTORY / f"{name}.yaml"
        known = sorted(each.stem for each in DIRECTORY.glob("*.yaml"))
        if str(name) not in known:
            raise ConfigError(
                "unknown hardware",
                where="--hardware",
                value=name,
                rule=f"known: {', '.join(known)}; or the path of a YAML file",
                todo=perhaps(str(name), known),
            )
    return validate(Hardware, read_yaml(path), str(path))


def _numbers(group: Frozen, prefix: str = "") -> Iterator[str]:
    """The keys of all numbers that are given; peak rates and curves count as one."""
    for key in type(group).model_fields:
        value = getattr(group, key)
        if value is None:
            continue
        if isinstance(value, Frozen) and not isinstance(value, PeakRates):
            yield from _numbers(value, f"{prefix}{key}.")
        elif not isinstance(value, str | dict):
            yield f"{prefix}{key}"
