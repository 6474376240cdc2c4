"""What acceptance.py runs, and how it judges what the runs leave behind; nothing is run here."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from mistral_ms.training import StepRecord

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "configs" / "run" / "pretrain_mixtral_tiny_200ep.yaml"
LAUNCHER = ROOT / "scripts" / "msrun_train.sh"
LAUNCHER_32 = ROOT / "scripts" / "pretrain_mixtral_8x7b_4node_32card.sh"
STEPS, VOCABULARY, CARDS = 20, 32000, 8
QUARTER = 0.25
"""Of an even share, what an expert must have over all steps; a fresh router is not balanced yet."""
NEAR = 1.5
"""Of the first loss from ln(vocabulary). A drawn head's logits have the variance hidden_size *
initializer_range**2, 1.6 at 4096, and raise the loss by half of it."""
GRAPH_TOLERANCE = 2e-2
"""Of losses in bfloat16, whose 8 bits the two paths round in other places; not measured yet."""
SMALL = (
    *("model.hidden_size=32", "model.intermediate_size=64", "model.num_attention_heads=4"),
    "training.global_batch_size=8",
)
RATES_32 = ("training.warmup_steps=20", "training.optimizer.learning_rate=3.0e-6")
"""The rates of the first 20 of the run file's 2000 warm-up steps to 3e-4."""


@dataclass(frozen=True)
class Options:
    """What is asked for.

    Attributes:
        small: on any machine, with small models that the steps train themselves.
        workers: processes on this machine.
        output: directory of everything that is written.
        hf: model in Hugging Face's format; None: one is trained for a few steps.
        data: sequences of 4096 for the 32-card run.
        node_rank: number of this machine in the 32-card run.
        master: address of machine 0 in it.
        port: of its scheduler, and of those on this machine.
        tolerance: largest relative difference of losses that need not have the same bits.
        align_tolerance: as ``align`` has it; None: its own.
    """

    small: bool
    workers: int
    output: Path
    hf: Path | None
    data: Path | None
    node_rank: int
    master: str | None
    port: int
    tolerance: float
    align_tolerance: float | None


class Verdict(NamedTuple):
    """Whether a step passed, and the numbers that decided it."""

    passed: bool
    found: str


@dataclass(frozen=True)
class Run:
    """One command; steps may share it.

    Attributes:
        name: of its log, and of the directory that it writes.
        line: the command line.
    """

    name: str
    line: tuple[str, ...]


@dataclass(frozen=True)
class Step:
    """One thing to be accepted.

    Attributes:
        name: for ``--only``.
        what: is run.
        must: be seen.
        runs: in this order.
        judge: of what they left behind, told whether an NPU was there.
    """

    name: str
    what: str
    must: str
    runs: tuple[Run, ...]
    judge: Callable[[bool], Verdict]


EXPLICIT = "parallel.execution=explicit"
"""On Ascend the graph is the default."""
NAMES = ("align", "experts", "hierarchical", "offload", "graph", "cards32")


def make_steps(o: Options) -> tuple[Step, ...]:
    """All steps, in the order of :data:`NAMES`."""
    lines = _Lines(o)
    n = o.workers
    groups = (
        f"training.gradient_accumulation_steps={n}"  # as many dispatch groups as the ranks have
    )
    together = (f"parallel.dp={n}", f"parallel.ep={n}")
    hops = (f"parallel.devices_per_node={n // 2}", "parallel.all_to_all=hierarchical")
    one = lines.alone("one", groups)
    host = lines.alone("host", groups, "training.offload_optimizer=host")
    flat = lines.together("flat", *together)
    hierarchical = lines.together("hierarchical", *together, *hops)
    either = f"the same losses: to the last bit on a CPU, to {o.tolerance:g} on an NPU"
    return (
        _align(lines, one),
        Step(
            "experts",
            f"{STEPS} steps of a tiny Mixtral on {n} ranks (dp {n}, ep {n}), and on one rank with "
            "the same dispatch groups",
            f"losses of both equal to {o.tolerance:g} of each, and falling; every expert of every "
            f"layer is chosen, at least {QUARTER:g} of an even share",
            (one, flat),
            lambda npu: judge_experts(o.output / "flat", o.output / "one", o.tolerance),
        ),
        Step(
            "hierarchical",
            f"the same {n} ranks as 2 nodes of {n // 2}, whose rows travel in two hops",
            f"{either}, where reductions add in any order",
            (flat, hierarchical),
            lambda npu: compare(o.output / "hierarchical", o.output / "flat", npu * o.tolerance),
        ),
        Step(
            "offload",
            "the one rank again, with the optimizer in host memory",
            f"{either}, where host and device round by themselves; the state is on the host",
            (one, host),
            lambda npu: judge_offload(o.output / "host", o.output / "one", npu * o.tolerance),
        ),
        _graph(lines, together),
        _cards32(lines),
    )


def _graph(lines: _Lines, together: tuple[str, ...]) -> Step:
    """Fused attention has 16 bits, so on NPUs both paths do; only NPUs divide graphs."""
    o, changed = lines.options, "parallel.execution=graph"
    if o.small:
        runs, allowed = (lines.alone("explicit"), lines.alone("graph", changed)), o.tolerance
        where = "one rank, float32"
    else:
        same = (*together, "training.dtype=bfloat16")
        runs = lines.together("explicit", *same), lines.together("graph", *same, changed)
        allowed, where = (
            GRAPH_TOLERANCE,
            f"{o.workers} ranks (dp {o.workers}, ep {o.workers}), bfloat16",
        )
    return Step(
        "graph",
        f"{STEPS} steps of the tiny Mixtral by explicit collectives, and as MindSpore's "
        f"auto-parallel graph: {where}",
        f"the same losses to {allowed:g} of each",
        runs,
        lambda npu: compare(o.output / "graph", o.output / "explicit", allowed),
    )


def _align(lines: _Lines, one: Run) -> Step:
    o, runs, hf = lines.options, [], lines.options.hf
    model = "a Mixtral of a few steps" if hf is None else str(hf)
    if hf is None:
        hf, newest = o.output / "hf", o.output / "one" / "checkpoints" / f"step-{STEPS:08}"
        runs = [one, lines.command("hf", "convert", newest, hf)]
    ours, result = o.output / "converted", o.output / "align.json"
    runs.append(lines.command("converted", "convert", hf, ours))
    more: tuple[object, ...] = ("--max-new-tokens", 16) if o.small else ()
    if o.align_tolerance is not None:
        more += ("--tolerance", o.align_tolerance)
    runs.append(lines.command("align", "align", hf, ours, "--json", result, *more))
    return Step(
        "align",
        f"{model}, converted, and by Hugging Face's code: four prompts, and on from them",
        "logits within the tolerance of `align`; top-1, routes and greedy tokens equal",
        tuple(runs),
        lambda npu: judge_align(result),
    )


def _cards32(lines: _Lines) -> Step:
    o, output = lines.options, lines.options.output / "cards32"
    changes: tuple[str, ...] = (f"training.max_steps={STEPS}", f"output={output}", EXPLICIT)
    if o.small:
        half = o.workers // 2
        machines: tuple[str, ...] = ("--workers", str(o.workers), "--nodes", "1")
        changes += (
            *(f"model={ROOT}/configs/model/mixtral_tiny.yaml", *SMALL),
            *(f"data.inputs=[{ROOT}/mistral_ms/data/demo.txt]", "data.tokenizer=packaged-v1"),
            *(f"parallel.dp={half}", f"parallel.ep={half}", "parallel.pp=2"),
            *("training.dtype=float32", "training.seq_length=64"),
            "training.gradient_accumulation_steps=2",
            *("training.warmup_steps=5", "training.optimizer.learning_rate=3.0e-3"),
        )
    else:
        machines = ("--node-rank", str(o.node_rank), "--master", str(o.master))
        changes += (*RATES_32, f"data.dataset={o.data}")
    where = (
        f"{o.workers} ranks, layout and model made small" if o.small else "4 machines of 8 cards"
    )
    judge = judge_ended if o.node_rank > 0 else lambda npu: judge_course(output)
    return Step(
        "cards32",
        f"the first {STEPS} steps of pretrain_mixtral_8x7b_32card.yaml on {where}",
        f"the first loss within {NEAR} of ln {VOCABULARY}; the last five below the first five; no "
        "step skipped",
        (Run("cards32", (str(LAUNCHER_32), *machines, *lines.place("cards32"), *changes)),),
        judge,
    )


class _Lines:
    """Command lines."""

    def __init__(self, options: Options) -> None:
        self.options = options

    def command(self, name: str, *arguments: object) -> Run:
        """One of the package's commands."""
        return Run(name, (sys.executable, str(ROOT / "run_mixtral.py"), *map(str, arguments)))

    def alone(self, name: str, *overrides: str) -> Run:
        """A few steps of the tiny run in one process."""
        return self.command(name, "train", "--config", TINY, *self._tiny(name), *overrides)

    def together(self, name: str, *overrides: str) -> Run:
        """The same in several processes."""
        flags = ("--config", str(TINY), "--workers", str(self.options.workers))
        return Run(name, (str(LAUNCHER), *flags, *self.place(name), *self._tiny(name), *overrides))

    def place(self, name: str) -> tuple[str, ...]:
        """The launcher's port and logs, and the end of its flags."""
        logs = self.options.output / f"{name}-ranks"
        return ("--port", str(self.options.port), "--log-dir", str(logs), "--")

    def _tiny(self, name: str) -> tuple[str, ...]:
        length = (f"training.max_steps={STEPS}", "training.warmup_steps=5", EXPLICIT)
        sizes = (*SMALL, "model.num_hidden_layers=1") if self.options.small else ()
        return (f"output={self.options.output / name}", *length, *sizes)


def judge_align(result: Path) -> Verdict:
    """What ``align`` wrote; that the difference is small enough it has said by its exit code."""
    found = json.loads(result.read_text(encoding="utf-8"))
    equal = found["top1_agreement"] == found["routing_agreement"] == 1 and found["greedy_match"]
    return Verdict(
        bool(equal),
        f"largest difference {found['max_abs_diff']:.2g}; equal: top-1 "
        f"{found['top1_agreement']:.1%}, routes {found['routing_agreement']:.1%}, greedy "
        f"{'yes' if found['greedy_match'] else 'no'}",
    )


def records_of(run: Path) -> list[StepRecord]:
    """The metrics of a run."""
    from mistral_ms.training import read_metrics

    return read_metrics(run / "metrics.jsonl")


def compare(run: Path, other: Path, allowed: float) -> Verdict:
    """The largest relative difference of two runs' losses, step by step."""
    mine, theirs = records_of(run), records_of(other)
    if not len(mine) == len(theirs) == STEPS:
        return Verdict(False, f"{len(mine)} and {len(theirs)} steps instead of {STEPS}")
    pairs = [
        (getattr(a, field), getattr(b, field))
        for a, b in zip(mine, theirs, strict=True)
        for field in ("loss", "lm_loss", "aux_loss")
    ]
    if not all(math.isfinite(x) for pair in pairs for x in pair):
        return Verdict(False, "a loss is not finite")
    largest = max(abs(a - b) / abs(b) if a != b else 0.0 for a, b in pairs)
    limit = f"at most {allowed:g}" if allowed else "no difference is allowed"
    return Verdict(largest <= allowed, f"losses differ by {largest:.2g} ({limit})")


def judge_experts(many: Path, one: Path, tolerance: float) -> Verdict:
    """Equal, falling, and nobody idle."""
    same = compare(many, one, tolerance)
    records = records_of(many)
    first, last = records[0].lm_loss, records[-1].lm_loss
    loads = [[share for row in record.expert_load for share in row] for record in records]
    share = min(map(statistics.mean, zip(*loads, strict=True))) * len(records[0].expert_load[0])
    found = f"lm loss {first:.4f} -> {last:.4f}; smallest share of an expert {share:.2f} of even"
    return Verdict(same.passed and last < first and share >= QUARTER, f"{same.found}; {found}")


def judge_offload(host: Path, device: Path, allowed: float) -> Verdict:
    """Equal, and really elsewhere."""
    same = compare(host, device, allowed)
    memory = json.loads((host / "summary.json").read_text(encoding="utf-8"))["memory"]
    moved = memory["device_optimizer"] == 0 and memory["host_optimizer"] > 0
    found = f"state on the device {memory['device_optimizer']} bytes, on the host "
    return Verdict(same.passed and moved, f"{same.found}; {found}{memory['host_optimizer']}")


def judge_course(run: Path) -> Verdict:
    """A training from drawn weights that begins as it should."""
    records = records_of(run)
    losses = [record.lm_loss for record in records]
    if len(losses) != STEPS or not all(map(math.isfinite, losses)):
        return Verdict(False, f"{len(losses)} steps instead of {STEPS}, losses {losses}")
    first, last = (statistics.mean(part) for part in (losses[:5], losses[-5:]))
    begin, skipped = math.log(VOCABULARY), records[-1].skipped
    passed = abs(losses[0] - begin) <= NEAR and last < first and skipped == 0
    speed = statistics.median(record.tokens_per_s for record in records)
    return Verdict(
        passed,
        f"lm loss {losses[0]:.4f} (ln {VOCABULARY} = {begin:.4f}); means {first:.4f} -> "
        f"{last:.4f}; {skipped} skipped; {speed:.0f} tokens/s",
    )


def judge_ended(npu: bool) -> Verdict:
    """On the other machines."""
    return Verdict(True, "this machine's ranks ended well; machine 0 judges the losses")


def chosen(steps: Sequence[Step], names: Sequence[str]) -> list[Step]:
    """Those with the names; all when there are none."""
    return [step for step in steps if not names or step.name in names]
