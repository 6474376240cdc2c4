"""Accepts the AscendC operators on the device at hand: right results, then the time they take.

On an NPU: every operator against ``mistral_ms.ops.reference`` on the device, in float32, float16
and bfloat16; then its time at Mixtral's size against what the memory allows. On a machine without
an NPU the comparison runs on the CPU twin, in float32, and nothing is timed: it says so.

Exit code: 0 all results agree, 1 some do not, 2 nothing could be run. Times are reported, not
judged: they are those of a call from Python, which for the small operators is mostly the call.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import mindspore as ms
from mindspore import Tensor

from ascend_kernels.build_twin import build_twin
from mistral_ms.errors import MistralMsError
from mistral_ms.ops import custom, reference

BANDWIDTH = 1.6e12
"""Bytes per second of a 910B's HBM; see ascend_kernels/README.md for the source."""

ROUNDING = {"float32": 1e-5, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Of the largest value: float32 sums of a few terms in another order and an exponential; for the
16-bit types two roundings to the nearest, of half a unit each."""


@dataclass(frozen=True)
class Sizes:
    """A routing problem."""

    tokens: int
    hidden: int
    experts: int
    k: int
    capacity: int


@dataclass(frozen=True)
class Check:
    """One comparison: the largest difference, and what is allowed."""

    name: str
    dtype: str
    difference: float
    allowed: float

    @property
    def agrees(self) -> bool:
        """Is the difference allowed?"""
        return self.difference <= self.allowed  # False for NaN


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, and what its bytes take at the memory's bandwidth."""

    name: str
    bytes: int
    seconds: float
    expected: float


def least_bytes(s: Sizes, row_bytes: int, logit_bytes: int = 4) -> dict[str, int]:
    """Bytes that each operator moves at least when no choice is dropped, as the kernels do."""
    choices, slots = s.tokens * s.k, s.experts * s.capacity
    kept = min(choices, slots)
    rows = {
        "dispatch": s.tokens + slots,
        "dispatch_grad": kept + s.tokens,
        "combine": kept + s.tokens,
        "combine_grad": s.tokens + kept + slots,
    }
    tables = {
        "dispatch": choices + slots,
        "dispatch_grad": choices,
        "combine": 2 * choices,
        "combine_grad": 3 * choices + slots,
    }
    moved = {name: rows[name] * row_bytes + 4 * tables[name] for name in rows}
    logits = s.tokens * s.experts
    moved["gating_top_k"] = logits * (logit_bytes + 4) + 12 * choices
    moved["gating_top_k_grad"] = logits * (2 * logit_bytes + 4) + 8 * choices
    moved["expert_capacity"] = 4 * (3 * choices + slots + s.experts)
    return moved


@dataclass(frozen=True)
class Problem:
    """Inputs of one size in one dtype, and the reference's row id map for them."""

    sizes: Sizes
    logits_TE: Tensor
    experts_TK: Tensor
    weights_TK: Tensor
    valid_T: Tensor
    x_TH: Tensor
    rows_EC_H: Tensor
    table: reference.RowIdMap


def make(s: Sizes, dtype: str, seed: int = 0) -> Problem:
    """Random inputs; a tenth of the tokens is padding."""
    rng = np.random.default_rng(seed)

    def normal(*shape: int) -> Tensor:
        return Tensor(rng.normal(size=shape).astype(np.float32)).astype(getattr(ms, dtype))

    # without ties, also after rounding: among equals TopK's choice depends on the device
    order = rng.permuted(np.tile(np.arange(s.experts), (s.tokens, 1)), axis=1)
    levels = ((order - s.experts / 2) * 8 / s.experts).astype(np.float32)
    logits = Tensor(levels).astype(getattr(ms, dtype))
    weights, experts, _ = reference.gating_top_k(logits, s.k, True)
    valid = Tensor((rng.random(s.tokens) >= 0.1).astype(np.float32))
    table = reference.assign_slots(experts, valid, s.experts, s.capacity, False)
    x, rows = normal(s.tokens, s.hidden), normal(s.experts * s.capacity, s.hidden)
    return Problem(s, logits, experts, weights, valid, x, rows, table)


def floats(x: Tensor) -> np.ndarray:
    """float32 on the host, whatever the dtype."""
    return x.astype(ms.float32).asnumpy()


def check(name: str, dtype: str, got: Tensor, want: Tensor) -> Check:
    """Compares with a tolerance relative to the largest wanted value; integers must be equal."""
    difference = float(np.abs(floats(got) - floats(want)).max())
    exact = not got.is_floating_point()
    return Check(
        name, dtype, difference, 0.0 if exact else ROUNDING[dtype] * float(abs(floats(want)).max())
    )


def check_gating(p: Problem, dtype: str) -> list[Check]:
    """Weights, experts, probabilities, and the gradient through weights and probabilities."""
    k = p.sizes.k
    fused = custom.GatingTopK(k, True)
    rng = np.random.default_rng(1)
    dweights = Tensor(rng.normal(size=p.weights_TK.shape).astype(np.float32))
    dprobs = Tensor(rng.normal(size=p.logits_TE.shape).astype(np.float32))

    def through(gating: Callable[[Tensor], tuple[Tensor, ...]]) -> Tensor:
        def value(logits: Tensor) -> Tensor:
            weights, _, probs = gating(logits)
            return (weights * dweights).sum() + (probs * dprobs).sum()

        return ms.grad(value)(p.logits_TE)

    def plain(logits: Tensor) -> tuple[Tensor, ...]:
        return reference.gating_top_k(logits, k, True)

    names = ("weights", "experts", "probabilities")
    # the probabilities are float32 whatever the logits are
    checks = [
        check(f"gating {name}", "float32", got, want)
        for name, got, want in zip(names, fused(p.logits_TE), plain(p.logits_TE), strict=True)
    ]
    return [*checks, check("gating gradient", dtype, through(fused), through(plain))]


def check_slots(p: Problem) -> list[Check]:
    """All four tables, both orders, equal to the integer."""
    s, checks = p.sizes, []
    for order, choice_major in (("token-major", False), ("choice-major", True)):
        got = custom.AssignSlots(s.experts, choice_major)(p.experts_TK, p.valid_T, s.capacity)
        want = reference.assign_slots(p.experts_TK, p.valid_T, s.experts, s.capacity, choice_major)
        for name, a, b in zip(("slot", "kept", "source", "filled"), got, want, strict=True):
            difference = float(np.abs(floats(a) - floats(b)).max())
            checks.append(Check(f"slots {name}, {order}", "int32", difference, 0.0))
    return checks


def check_choices(p: Problem) -> list[Check]:
    """DeepSeek-V3's choice of experts, and the tables of dropless routing."""
    s, k = p.sizes, p.sizes.k
    rules = reference.ScoringRules(sigmoid=True, groups=2, chosen_groups=2, best=2, factor=2.5)
    bias = Tensor(np.linspace(0.05, -0.05, s.experts).astype(np.float32))
    fused = custom.BiasedGatingTopK(k, True, rules)(p.logits_TE, bias)
    plain = reference.scored_top_k(p.logits_TE, bias, k, True, rules)
    checks = [
        check(f"scored {name}", "float32", got, want)
        for name, got, want in zip(("weights", "experts", "scores"), fused, plain, strict=True)
    ]
    got, got_sizes = custom.PackChoices(s.experts)(p.experts_TK, p.valid_T)
    want, want_sizes = reference.pack_choices(p.experts_TK, p.valid_T, s.experts)
    names = ("slot", "kept", "source", "filled", "sizes")
    for name, a, b in zip(names, (*got, got_sizes), (*want, want_sizes), strict=True):
        difference = float(np.abs(floats(a) - floats(b)).max())
        checks.append(Check(f"packed {name}", "int32", difference, 0.0))
    return checks


def check_rows(p: Problem, dtype: str) -> list[Check]:
    """Dispatch and combine with their gradients, against the reference in float32."""
    wide_x, wide_rows = p.x_TH.astype(ms.float32), p.rows_EC_H.astype(ms.float32)
    ours, theirs = custom.Permute(), reference.Permute()
    checks = [check("dispatch", dtype, ours(p.x_TH, *p.table), theirs(wide_x, *p.table))]

    def dispatched(cell: Callable[..., Tensor], x: Tensor, d: Tensor) -> Tensor:
        return ms.grad(lambda x: (cell(x, *p.table) * d).sum())(x)

    checks.append(
        check("dispatch gradient", dtype, dispatched(ours, p.x_TH, p.rows_EC_H),
              dispatched(theirs, wide_x, wide_rows))
    )  # fmt: skip
    both, plain = custom.Unpermute(), reference.Unpermute()
    checks.append(
        check("combine", dtype, both(p.rows_EC_H, p.weights_TK, *p.table),
              plain(wide_rows, p.weights_TK, *p.table))
    )  # fmt: skip

    def combined(cell: Callable[..., Tensor], rows: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        def value(rows: Tensor, weights: Tensor) -> Tensor:
            return (cell(rows, weights, *p.table) * d).sum()

        return ms.grad(value, (0, 1))(rows, p.weights_TK)

    got = combined(both, p.rows_EC_H, p.x_TH)
    want = combined(plain, wide_rows, wide_x)
    checks.append(check("combine gradient to rows", dtype, got[0], want[0]))
    checks.append(check("combine gradient to scales", "float32", got[1], want[1]))
    return checks


def compare(problems: Sequence[Sizes], dtypes: Sequence[str]) -> list[Check]:
    """All comparisons of all sizes in all dtypes."""
    checks = []
    for sizes in problems:
        for dtype in dtypes:
            p = make(sizes, dtype)
            checks += check_gating(p, dtype) + check_rows(p, dtype)
        p = make(sizes, "float32")
        checks += check_slots(p) + check_choices(p)
    return checks


def measure(call: Callable[[], object], repeats: int = 50) -> float:
    """Seconds of a call, the device drained before and after."""
    for _ in range(5):
        call()
    ms.runtime.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    ms.runtime.synchronize()
    return (time.perf_counter() - start) / repeats


def time_operators(s: Sizes, bandwidth: float) -> list[Timing]:
    """Forward operators by themselves, at Mixtral's dtype of rows."""
    p = make(s, "bfloat16")
    logits = p.logits_TE.astype(ms.float32)
    gating, slots = custom.GatingTopK(s.k, True), custom.AssignSlots(s.experts, False)
    dispatch, combine = custom.Permute(), custom.Unpermute()
    calls: dict[str, Callable[[], object]] = {
        "gating_top_k": lambda: gating(logits),
        "expert_capacity": lambda: slots(p.experts_TK, p.valid_T, s.capacity),
        "dispatch": lambda: dispatch(p.x_TH, *p.table),
        "dispatch_grad": lambda: dispatch.bprop(p.x_TH, *p.table, None, p.rows_EC_H),
        "combine": lambda: combine(p.rows_EC_H, p.weights_TK, *p.table),
        "combine_grad": lambda: combine.bprop(p.rows_EC_H, p.weights_TK, *p.table, None, p.x_TH),
    }
    moved = least_bytes(s, row_bytes=2 * s.hidden)
    return [
        Timing(name, moved[name], measure(call), moved[name] / bandwidth)
        for name, call in calls.items()
    ]


def report(checks: Sequence[Check], timings: Sequence[Timing]) -> None:
    """Two tables."""
    for c in checks:
        verdict = "agrees" if c.agrees else "DIFFERS"
        print(f"{verdict:8} {c.name:34} {c.dtype:9} {c.difference:.3g} (at most {c.allowed:.3g})")
    for t in timings:
        print(
            f"{t.name:16} {t.bytes / 1e6:9.2f} MB {t.seconds * 1e6:9.1f} us, "
            f"memory alone {t.expected * 1e6:9.1f} us: {t.seconds / t.expected:.2f} times that"
        )


def flags() -> argparse.ArgumentParser:
    """The command's flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192, help="of the timing")
    parser.add_argument("--hidden", type=int, default=4096, help="of the timing")
    parser.add_argument("--bandwidth", type=float, default=BANDWIDTH, help="bytes per second")
    parser.add_argument("--json", type=Path, help="write the results there")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Compares, times, reports."""
    given = flags().parse_args(arguments)
    npu = ms.device_context.ascend.is_available()
    if npu:
        ms.set_device("Ascend")
    small = [Sizes(67, 40, 8, 2, 20), Sizes(5, 7, 4, 1, 2), Sizes(40, 33, 12, 3, 9)]
    try:
        if npu:
            custom.check_installed()
            sizes = [*small, Sizes(4099, 4096, 8, 2, 1127), Sizes(1021, 2048, 128, 8, 80)]
            checks = compare(sizes, tuple(ROUNDING))
            # capacity 1.1 for two of eight, as Mixtral is trained here
            full = Sizes(given.tokens, given.hidden, 8, 2, -(-given.tokens * 22 // 80))
            timings = time_operators(full, given.bandwidth)
        else:
            print("No NPU here: results are compared on the CPU twin, nothing is timed.")
            custom.use_twin(build_twin())
            checks, timings = compare(small, ("float32",)), []
    except MistralMsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    report(checks, timings)
    wrong = sum(not c.agrees for c in checks)
    where = "the NPU" if npu else "the CPU twin; no NPU has run them"
    print(f"{len(checks) - wrong} of {len(checks)} comparisons agree on {where}")
    if given.json:
        results = {
            "device": "npu" if npu else "cpu twin",
            "comparisons": [{**asdict(c), "agrees": c.agrees} for c in checks],
            "timings": [asdict(t) for t in timings],
        }
        given.json.write_text(json.dumps(results, indent=1) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
