"""How long a collective operation takes on two levels of network.

A message costs a latency and its bytes over a bandwidth. Inside a node and between nodes bytes
travel at the same time, unless one has to wait for the other. Every card has its own port to other
nodes, so groups of equal size do not slow each other down.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mistral_ms.config.layout import Sizes
from mistral_ms.planner.hardware import Hardware
from mistral_ms.planner.traffic import Message, Span, span


@dataclass(frozen=True, slots=True)
class Sent:
    """What a card sends in one operation: messages and bytes, inside its node and to others."""

    messages_inside: float = 0.0
    messages_between: float = 0.0
    bytes_inside: float = 0.0
    bytes_between: float = 0.0


def sent(message: Message, over: Span, *, hierarchical: bool = False) -> Sent:
    """What a card gives in one execution.

    Gathers, scatters and reductions go by two levels of rings: inside the node, then each of its
    cards carries its part to the others. An all-to-all sends each part straight to its receiver;
    the hierarchical one inside the node to the receiver's place first.

    Args:
        message: the operator.
        over: the group.
        hierarchical: of an all-to-all.
    """
    n, inside, nodes = over.size, over.inside, over.nodes
    if n == 1:
        return Sent()
    if message.operator == "AlltoAll":
        each = message.bytes / n
        if hierarchical and nodes > 1:
            return Sent(
                inside - 1, nodes - 1, nodes * (inside - 1) * each, (nodes - 1) * inside * each
            )
        return Sent(inside - 1, n - inside, (inside - 1) * each, (n - inside) * each)
    whole = message.bytes * (n if message.operator == "AllGather" else 1)
    times = 2 if message.operator == "AllReduce" else 1
    return Sent(
        times * (inside - 1),
        times * (nodes - 1),
        times * whole * (inside - 1) / inside,
        times * whole / inside * (nodes - 1) / nodes,
    )


def seconds(
    message: Message, sizes: Sizes, hardware: Hardware, *, hierarchical: bool = False
) -> float:
    """How long one execution of an operator takes.

    Args:
        message: the operator.
        sizes: of the layout.
        hardware: the cluster.
        hierarchical: of an all-to-all.
    """
    over = span(message.kind, sizes, hardware.devices_per_node)
    if hardware.device == "CPU":
        message, hierarchical = on_cpu(message, over.size), False
    given = sent(message, over, hierarchical=hierarchical)
    within, between = link_seconds(given, over.inside, hardware)
    if message.operator == "AlltoAll" and not hierarchical:
        return max(within, between)
    return within + between


def link_seconds(given: Sent, inside: int, hardware: Hardware) -> tuple[float, float]:
    """How long the links inside a node and those between nodes are busy.

    Args:
        given: what a card gives.
        inside: members of the group on its node, itself included.
        hardware: the cluster.
    """
    within = between = 0.0
    if given.bytes_inside:
        rate = hardware.inside.bytes_per_s(inside, hardware.devices_per_node)
        within = given.messages_inside * hardware.inside.latency + given.bytes_inside / rate
    if given.bytes_between:
        rate = hardware.between.bytes_per_s(2, 2)
        between = given.messages_between * hardware.between.latency + given.bytes_between / rate
    return within, between


def on_cpu(message: Message, members: int) -> Message:
    """What MindSpore's CPU backend does instead: its groups can only add up, so every member puts
    its part at its own place in a buffer of zeros (``parallel/collectives/cpu.py``).

    Args:
        message: as an NPU does it.
        members: of the group.
    """
    times = members if message.operator in ("AllGather", "AlltoAll") else 1
    return replace(message, operator="AllReduce", bytes=message.bytes * times)


def transfer_seconds(nbytes: float, boundary: int, sizes: Sizes, hardware: Hardware) -> float:
    """How long a card needs to hand a tensor to its place in the next stage.

    Args:
        nbytes: of the tensor.
        boundary: the number of the first of the two stages.
        sizes: of the layout.
        hardware: the cluster.
    """
    cards, devices = sizes.dp * sizes.mp, hardware.devices_per_node
    # ranks fill one node after the other: the last card of a stage is the first to leave its node
    last = (boundary + 1) * cards - 1
    messages = 2 if hardware.device == "CPU" else 1  # a pair adds up, see on_cpu
    if last // devices == (last + cards) // devices:
        rate = hardware.inside.bytes_per_s(2, devices)
        return messages * hardware.inside.latency + nbytes / rate
    return messages * hardware.between.latency + nbytes / hardware.between.bytes_per_s(2, 2)
