"""How much an answer rests on numbers that nobody has measured."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mistral_ms.planner.candidate import Candidate
from mistral_ms.planner.hardware import Cluster, Hardware
from mistral_ms.planner.load import Loads
from mistral_ms.planner.search import judge

WEAK = ("assumed", "partly assumed", "placeholder", "from memory")
"""What the source of a number begins with that is not measured."""
RIVALS = 5
"""So many of the best layouts are compared with each other."""
_NOT_OF_TIME = (
    "devices_per_node",
    "memory_gib",
    "reserved_gib",
    "communicator_mib",
    "host.memory_gib",
)


@dataclass(frozen=True, slots=True)
class Effect:
    """What one number does to the best layout.

    Attributes:
        key: of the number.
        source: of the number.
        low: tokens/s per card with the number divided by the factor, as a share of what it was.
        high: with the number multiplied by it; shares end at 1.
        overtaken: whether another layout is then faster.
    """

    key: str
    source: str
    low: float
    high: float
    overtaken: bool


def weak_numbers(hardware: Hardware) -> tuple[str, ...]:
    """The keys of the numbers that nobody has measured."""
    return tuple(key for key, source in hardware.sources.items() if source.startswith(WEAK))


def sensitivity(
    candidates: Sequence[Candidate],
    cluster: Cluster,
    *,
    factor: float = 1.5,
    loads: Sequence[Loads] = (),
) -> tuple[Effect, ...]:
    """Changes each number of the hardware that is not measured, one after the other.

    Args:
        candidates: of a plan, the best first.
        cluster: that they were planned for.
        factor: by which numbers are divided and multiplied.
        loads: of the experts.

    Returns:
        Of every number that has a part in the time, what matters most first.
    """
    rivals = [each for each in candidates if each.fits][:RIVALS]
    if not rivals:
        return ()
    before = _rates(rivals, cluster, loads)[0]
    found = []
    for key in weak_numbers(cluster.hardware):
        if key in _NOT_OF_TIME:
            continue
        rates = [
            _rates(
                rivals,
                Cluster(scaled(cluster.hardware, key, by), cluster.nodes, cluster.cards),
                loads,
            )
            for by in (1 / factor, factor)
        ]
        low, high = (each[0] / before for each in rates)
        overtaken = any(max(each) > each[0] for each in rates)
        found.append(Effect(key, cluster.hardware.sources[key], low, high, overtaken))
    return tuple(sorted(found, key=lambda effect: -abs(effect.high - effect.low)))


def scaled(hardware: Hardware, key: str, by: float) -> Hardware:
    """The same hardware with one number changed.

    Args:
        hardware: as it is.
        key: of the number, ``compute.memory_gb_per_s``.
        by: what it is multiplied by; shares end at 1.
    """
    group, _, name = key.rpartition(".")
    owner = getattr(hardware, group) if group else hardware
    value = getattr(owner, name)
    new: object
    if name == "efficiency" and isinstance(value, tuple):
        new = tuple((length, min(1.0, share * by)) for length, share in value)
    elif name == "peak_tflops":
        new = value.model_copy(update={k: getattr(value, k) * by for k in type(value).model_fields})
    else:
        is_share = name.endswith("efficiency") or name.startswith("attention")
        new = min(1.0, value * by) if is_share else value * by
    changed = owner.model_copy(update={name: new})
    return hardware.model_copy(update={group: changed}) if group else changed


def _rates(rivals: Sequence[Candidate], cluster: Cluster, loads: Sequence[Loads]) -> list[float]:
    return [judge(each.run, cluster, loads=loads).tokens_per_s_per_card for each in rivals]


def rows(effects: Sequence[Effect]) -> Iterator[tuple[str, str, str, str]]:
    """Of a table: number, effect of less, effect of more, whether another layout wins."""
    for each in effects:
        wins = "yes" if each.overtaken else "no"
        yield each.key, f"{each.low - 1:+.1%}", f"{each.high - 1:+.1%}", wins
