"""Questions that people ask before they book cards, each answered by one function.

All are predictions. ``python run_mixtral.py plan --study NAME`` prints and draws them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from mistral_ms.config.layout import Sizes
from mistral_ms.parallel.memory import GIB
from mistral_ms.parallel.topology import GroupKind
from mistral_ms.planner.explain import NAMES
from mistral_ms.planner.hardware import Hardware, load_hardware
from mistral_ms.planner.network import seconds
from mistral_ms.planner.search import OFFLOAD
from mistral_ms.planner.study import Chart, Series, Study, Table
from mistral_ms.planner.study_published import published
from mistral_ms.planner.study_runs import (
    A2,
    BATCH,
    CARDS,
    DEEPSEEK,
    MISTRAL_7B,
    MIXTRAL_8X7B,
    MIXTRAL_8X22B,
    SEQUENCES_A_CARD,
    TOP_1,
    TOP_4,
    active_parameters,
    best,
    billions,
    card_ticks,
    layout,
    line,
    model,
    rate,
    share,
    stacked,
    training,
)  # fmt: skip
from mistral_ms.planner.traffic import Message


def cards(counts: Sequence[int] = CARDS) -> Study:
    """8 to 4096 cards: the batch grows with them, or stays as it is."""
    grown = {n: best(training(MIXTRAL_8X7B, SEQUENCES_A_CARD * n), n) for n in counts}
    fixed = {n: best(training(MIXTRAL_8X7B, BATCH), n) for n in counts}
    tables = tuple(
        Table(
            title,
            ("cards", "best layout", "tokens/s per card", "bubble", "gradients and weights"),
            tuple(
                (
                    str(n),
                    layout(each),
                    rate(each),
                    share(each, "bubble"),
                    share(each, "gradient_reduction", "weights_gather"),
                )
                for n, each in found.items()
            ),
        )
        for title, found in (
            (f"{SEQUENCES_A_CARD} sequences of 4096 tokens for each card", grown),
            (f"{BATCH} sequences of 4096 tokens, however many cards there are", fixed),
        )
    )
    chart = Chart(
        "Mixtral 8x7B on Atlas 800T A2: more cards",
        "cards",
        "tokens/s per card (predicted)",
        (
            line(f"{SEQUENCES_A_CARD} sequences a card", grown),
            line(f"{BATCH} sequences in all", fixed, dashed=True),
        ),
        logarithmic="x",
        ticks=card_ticks(counts),
    )
    return Study("cards", "What do more cards bring?", tables, (chart,))


def routes(groups: Sequence[int] = (16, 32, 64, 128)) -> Study:
    """Where the flat all-to-all loses to the hierarchical one."""
    hardware = load_hardware(A2)
    shown = (0.1, 1.0, 10.0, 100.0, 1000.0)
    sizes_mb = tuple(10 ** (power / 4) for power in range(-4, 13))

    times = {
        (group, size): tuple(_milliseconds(group, size, hardware, way) for way in (False, True))
        for group in groups
        for size in (*sizes_mb, *shown)
    }
    rows = tuple(
        (
            str(group),
            *(f"{times[group, size][0]:.2f} / {times[group, size][1]:.2f}" for size in shown),
            _crossing(group, hardware),
        )
        for group in groups
    )
    table = Table(
        "One all-to-all in ms, flat / hierarchical, by what a card gives",
        ("cards of an expert group", *(f"{size:g} MB" for size in shown), "flat is faster from"),
        rows,
    )
    chart = Chart(
        "All-to-all on Atlas 800T A2: time of the flat one over the hierarchical one",
        "MB that a card gives (Mixtral 8x7B, 4096 tokens: 74 MB)",
        "flat / hierarchical",
        (
            *(
                Series(
                    f"{group} cards",
                    sizes_mb,
                    tuple(
                        _milliseconds(group, size, hardware, False)
                        / _milliseconds(group, size, hardware, True)
                        for size in sizes_mb
                    ),
                )
                for group in groups
            ),
            Series("equal", (sizes_mb[0], sizes_mb[-1]), (1.0, 1.0), dashed=True),
        ),
        logarithmic="xy",
        ticks=tuple((size, f"{size:g}") for size in shown),
    )
    notes = (
        "Two hops send fewer messages to other nodes and more bytes inside the node: they win "
        "where messages are short.",
    )
    return Study("routes", "Where does flat lose to hierarchical?", (table,), (chart,), notes)


def _milliseconds(group: int, megabytes: float, hardware: Hardware, hierarchical: bool) -> float:
    """Of one all-to-all."""
    message = Message("AlltoAll", GroupKind.EXPERT, megabytes * 1e6)
    sizes = Sizes(group, 1, 1, group)
    return 1e3 * seconds(message, sizes, hardware, hierarchical=hierarchical)


def _crossing(group: int, hardware: Hardware) -> str:
    """The bytes from which on the flat one is faster."""
    low, high = 1e-3, 1e5

    def flat_is_faster(size: float) -> bool:
        flat, hops = (_milliseconds(group, size, hardware, way) for way in (False, True))
        return flat < hops

    if not flat_is_faster(high):
        return "never"
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (low, middle) if flat_is_faster(middle) else (middle, high)
    return f"{high:.3g} MB"


def offload(counts: Sequence[int] = (16, 32, 64)) -> Study:
    """What the optimizer in host memory costs and saves."""
    rows, parts, ends, names = [], [], [], []
    for count in counts:
        for kind, where in zip(OFFLOAD, ("card", "host"), strict=True):
            run = training(MIXTRAL_8X7B, SEQUENCES_A_CARD * count)
            found = best(run, count, offload=(kind,))
            names.append(f"{count} cards,\n{where}")
            memory = None if found is None else found.memory
            rows.append(
                (
                    str(count),
                    where,
                    layout(found).removesuffix(", host"),
                    rate(found),
                    share(found, "optimizer"),
                    share(found, "recompute"),
                    "-" if memory is None else f"{memory.gib:.1f}",
                    "-" if memory is None else f"{memory.host_optimizer / GIB:.1f}",
                )
            )
            parts.append({} if memory is None else memory.parts)
            ends.append("none fits" if found is None else f"{rate(found)} tokens/s per card")
    table = Table(
        f"Mixtral 8x7B, {SEQUENCES_A_CARD} sequences a card, optimizer state on the card or on "
        "the host",
        ("cards", "optimizer", "best layout", "tokens/s per card", "time of optimizer",
         "computing again", "GiB a card", "GiB of host memory a card"),
        tuple(rows),
    )  # fmt: skip
    chart = stacked(
        "Mixtral 8x7B on Atlas 800T A2: where the optimizer lies",
        "GiB of the fullest card",
        names,
        [{key.replace("_", " "): value / GIB for key, value in part.items()} for part in parts],
        ends,
    )
    return Study("offload", "What does offload cost and save?", (table,), (chart,))


def models(
    counts: Sequence[int] = (32, 64, 128, 256, 512, 1024),
    names: Sequence[str] = (MISTRAL_7B, MIXTRAL_8X7B, MIXTRAL_8X22B, DEEPSEEK),
) -> Study:
    """Different models on more and more cards."""
    found = {
        name: {n: best(training(name, SEQUENCES_A_CARD * n), n) for n in counts} for name in names
    }
    table = Table(
        f"{SEQUENCES_A_CARD} sequences of 4096 tokens for each card",
        ("model", "active parameters", "cards", "best layout", "tokens/s per card"),
        tuple(
            (name, billions(name), str(n), layout(each), rate(each))
            for name, of_model in found.items()
            for n, each in of_model.items()
        ),
    )
    chart = Chart(
        "Models on Atlas 800T A2: more cards",
        "cards",
        "tokens/s per card (predicted)",
        tuple(line(f"{name} ({billions(name)} active)", each) for name, each in found.items()),
        logarithmic="xy",
        ticks=card_ticks(counts),
    )
    return Study("models", "What do other models need?", (table,), (chart,))


def sequence(
    lengths: Sequence[int] = (4096, 8192, 16384, 32768), count: int = 64, tokens: int = 1 << 20
) -> Study:
    """A batch of as many tokens, cut into longer and longer sequences."""
    found = {n: best(training(MIXTRAL_8X7B, tokens // n, n), count) for n in lengths}
    table = Table(
        f"Mixtral 8x7B, {count} cards, a million tokens in a batch",
        ("sequence", "best layout", "tokens/s per card", "attention", "collectives",
         "computing again", "GiB"),
        tuple(
            (
                str(n),
                layout(each),
                rate(each),
                share(each, "attention"),
                share(each, "all_to_all", "tensor_parallel"),
                share(each, "recompute"),
                "-" if each is None else f"{each.memory.gib:.1f}",
            )
            for n, each in found.items()
        ),
    )  # fmt: skip
    there = [each for each in found.values() if each is not None and each.step is not None]
    chart = stacked(
        f"Mixtral 8x7B on {count} cards of Atlas 800T A2: longer sequences",
        "seconds for a million tokens",
        [f"{n // 1024}k" for n, each in found.items() if each is not None],
        [{NAMES[key]: value for key, value in each.breakdown.items()} for each in there],
        [f"{rate(each)} tokens/s per card" for each in there],
    )
    return Study("sequence", "What do long sequences cost?", (table,), (chart,))


def cost(
    count: int = 128,
    names: Sequence[str] = (
        MISTRAL_7B, DEEPSEEK, TOP_1, MIXTRAL_8X7B, TOP_4, MIXTRAL_8X22B,
    ),
) -> Study:  # fmt: skip
    """Card-hours of a billion tokens against the parameters that a token meets."""
    rows, points = [], []
    for name in names:
        found = best(training(name, SEQUENCES_A_CARD * count), count)
        active = active_parameters(model(name)) / 1e9
        hours = math.nan if found is None else 1e9 / found.tokens_per_s_per_card / 3600
        rows.append((name, billions(name), layout(found), f"{hours:.0f}", f"{hours / active:.1f}"))
        points.append((active, hours, name))
    dense = next(hours / active for active, hours, name in points if name == names[0])
    ends = (min(active for active, *_ in points), max(active for active, *_ in points))
    table = Table(
        f"{count} cards, {SEQUENCES_A_CARD} sequences of 4096 tokens for each",
        ("model", "active parameters", "best layout", "card-hours a billion tokens",
         "of a billion active parameters"),
        tuple(rows),
    )  # fmt: skip
    chart = Chart(
        f"A billion tokens on {count} cards of Atlas 800T A2",
        "parameters that a token meets, in billions",
        "card-hours a billion tokens (predicted)",
        (
            Series(
                "models",
                tuple(active for active, *_ in points),
                tuple(hours for _, hours, _ in points),
                tuple(name for *_, name in points),
            ),
            Series(
                f"in proportion to {names[0]}", ends, tuple(dense * x for x in ends), dashed=True
            ),
        ),
        kind="points",
        logarithmic="xy",
        ticks=tuple(
            (float(x), str(x)) for x in (2, 5, 10, 20, 50) if ends[0] < 1.1 * x < 1.3 * ends[1]
        ),
    )
    return Study("cost", "What does a token cost?", (table,), (chart,))


STUDIES: dict[str, Callable[[], Study]] = {
    "published": published,
    "cards": cards,
    "routes": routes,
    "offload": offload,
    "models": models,
    "sequence": sequence,
    "cost": cost,
}
"""By the name that the command takes."""
