"""Two sides compared: pure arithmetic on what they recorded."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from mistral_ms.alignment.record import Side, Trace

TOLERANCE = 2e-5
"""Largest logit difference, as a share of the largest logit, that float32 rounding explains.

Two float32 implementations of a 2-layer model differ by 1e-6 to 3e-6; ten times that leaves room
for depth, and is a thousand times below what a wrong formula gives.
"""


@dataclass(frozen=True)
class Place:
    """How far two hidden states are apart at one place of the network.

    Attributes:
        name: the place.
        difference: largest absolute difference over all prompts.
        scale: largest absolute value of the oracle there.
    """

    name: str
    difference: float
    scale: float

    @property
    def relative(self) -> float:
        """The difference as a share of the scale."""
        return self.difference / max(self.scale, 1e-30)


@dataclass(frozen=True)
class Rounding:
    """How far the oracle's own results in 16 bits are from those of the same weights in float32.

    Attributes:
        relative: largest difference of any logit, as a share of the largest logit; of tokens as
            :class:`Comparison` says.
        top1_agreement: share of tokens whose most likely successor is the same.
        routing_agreement: share of (sparse layer, token) with the same set of experts.
    """

    relative: float
    top1_agreement: float
    routing_agreement: float


@dataclass(frozen=True)
class Comparison:
    """The result of an alignment.

    In float32 every token must have the same experts and every continuation must be the same. In 16
    bits rounding decides where two experts or tokens are nearly as good. What is allowed there is
    what two sides may differ by that each differ from float32 as the oracle does; and logits are
    compared for tokens that have the same experts, in all layers, as those before them have.

    Attributes:
        max_abs_diff: largest difference of any logit.
        mean_abs_diff: mean difference of all logits.
        max_abs_logit: the oracle's largest logit.
        top1_agreement: share of tokens whose most likely successor is the same.
        routing_agreement: share of (sparse layer, token) with the same set of experts; 1.0 for a
            dense model.
        greedy_match: whether all greedy continuations are identical.
        greedy_tokens: how many tokens the oracle continued with, over all prompts (it stops at
            the end of a text).
        tokens: prompt tokens compared.
        tolerance: allowed share of the largest logit.
        places: hidden-state differences in the order of the computation.
        parted: where and why greedy continuations part, a line for each prompt that does.
        rounding: the oracle's own; None in float32.
        compared: share of tokens whose logits were compared.
    """

    max_abs_diff: float
    mean_abs_diff: float
    max_abs_logit: float
    top1_agreement: float
    routing_agreement: float
    greedy_match: bool
    greedy_tokens: int
    tokens: int
    tolerance: float
    places: tuple[Place, ...]
    parted: tuple[str, ...] = ()
    rounding: Rounding | None = None
    compared: float = 1.0

    @property
    def relative(self) -> float:
        """The largest logit difference as a share of the largest logit."""
        return self.max_abs_diff / max(self.max_abs_logit, 1e-30)

    @property
    def failures(self) -> tuple[str, ...]:
        """What is not as it must be, in words; empty when aligned."""
        found = []
        if not self.relative <= self.tolerance:  # a NaN fails too
            found.append(
                f"logits differ by {self.max_abs_diff:.3g}, {self.relative:.3g} of the largest "
                f"({self.max_abs_logit:.4g}); allowed {self.tolerance:.3g}"
            )
        if self.rounding is not None:
            for name in ("routing_agreement", "top1_agreement"):
                agreement, own = getattr(self, name), getattr(self.rounding, name)
                if agreement < 1 - 2 * (1 - own):
                    found.append(
                        f"{name} is {agreement:.2%}; that of Hugging Face's results in 16 bits and "
                        f"in float32 is {own:.2%}"
                    )
            return tuple(found)
        if self.routing_agreement < 1:
            found.append(f"routing agrees for {self.routing_agreement:.2%} of the tokens only")
        if not self.greedy_match:
            found += [f"greedy continuations differ: {line}" for line in self.parted]
        return tuple(found)

    @property
    def first_parting(self) -> Place | None:
        """The first place where the hidden states part by more than the tolerance."""
        return next((p for p in self.places if not p.relative <= self.tolerance), None)

    def to_json(self) -> dict[str, float | int | bool]:
        """The keys that `align --json` promises."""
        return {
            "max_abs_diff": self.max_abs_diff,
            "mean_abs_diff": self.mean_abs_diff,
            "top1_agreement": self.top1_agreement,
            "routing_agreement": self.routing_agreement,
            "greedy_match": self.greedy_match,
            "tokens": self.tokens,
        }


def compare(oracle: Side, ours: Side, tolerance: float = TOLERANCE) -> Comparison:
    """Compares two sides that ran the same prompts.

    Args:
        oracle: Hugging Face's.
        ours: the other one.
        tolerance: allowed share of the largest logit; raised to twice the oracle's own rounding
            where that is known.
    """
    if not oracle.exact:
        return _compare(oracle, ours, tolerance)
    own = _compare(Side(oracle.exact), Side(oracle.traces), tolerance, alike=True)
    rounding = Rounding(own.relative, own.top1_agreement, own.routing_agreement)
    allowed = max(tolerance, 2 * own.relative)
    return replace(_compare(oracle, ours, allowed, alike=True), rounding=rounding)


def _compare(oracle: Side, ours: Side, tolerance: float, alike: bool = False) -> Comparison:
    """The same with a tolerance that is known.

    Args:
        oracle: Hugging Face's.
        ours: the other one.
        tolerance: allowed share of the largest logit.
        alike: compare logits and states of those tokens alone that have the same experts on both
            sides, as all before them.
    """
    pairs = list(zip(oracle.traces, ours.traces, strict=True))
    taken = [_routed_alike(a, b) if alike else np.ones(len(a.logits_SV), bool) for a, b in pairs]
    differences = [
        np.abs(a.logits_SV - b.logits_SV)[own] for (a, b), own in zip(pairs, taken, strict=True)
    ]
    kept = float(np.concatenate(taken).mean())
    if kept == 0:  # nothing shows how large rounding is
        differences = [np.full((1, 1), np.inf)]
    same_top = [a.logits_SV.argmax(-1) == b.logits_SV.argmax(-1) for a, b in pairs]
    same_experts = [
        (a.experts[layer] == b.experts[layer]).all(-1) for a, b in pairs for layer in a.experts
    ]
    names = list(pairs[0][0].hidden)
    scale = float(np.max([np.abs(a.logits_SV).max() for a, _ in pairs]))
    return Comparison(
        # np.max, not max(): Python's would step over a NaN
        max_abs_diff=float(np.max([d.max(initial=0.0) for d in differences])),
        mean_abs_diff=float(np.concatenate([d.ravel() for d in differences]).mean()),
        max_abs_logit=scale,
        top1_agreement=float(np.concatenate(same_top).mean()),
        routing_agreement=float(np.concatenate(same_experts).mean()) if same_experts else 1.0,
        greedy_match=oracle.greedy == ours.greedy,
        greedy_tokens=sum(map(len, oracle.greedy)),
        tokens=sum(len(a.logits_SV) for a, _ in pairs),
        tolerance=tolerance,
        compared=kept,
        parted=_partings(oracle, ours, tolerance * scale),
        places=tuple(
            Place(
                name,
                float(
                    np.max(
                        [
                            np.abs(a.hidden[name] - b.hidden[name])[own].max(initial=0.0)
                            for (a, b), own in zip(pairs, taken, strict=True)
                        ]
                    )
                ),
                float(np.max([np.abs(a.hidden[name]).max() for a, _ in pairs])),
            )
            for name in names
        ),
    )


def _routed_alike(a: Trace, b: Trace) -> np.ndarray:
    """Bool [S]: whether a token and all before it have the same experts in all layers."""
    same = np.ones(len(a.logits_SV), bool)
    for layer in a.experts:
        same &= (a.experts[layer] == b.experts[layer]).all(-1)
    return np.logical_and.accumulate(same)


def _partings(oracle: Side, ours: Side, rounding: float) -> tuple[str, ...]:
    """Where and why continuations part, one line for each prompt whose do.

    Args:
        oracle: with its rivals, if it recorded them.
        ours: the other side.
        rounding: logits that are so near to each other may change places.
    """
    lines = []
    for prompt, (theirs, mine) in enumerate(zip(oracle.greedy, ours.greedy, strict=True)):
        if theirs == mine:
            continue
        both = zip(theirs, mine, strict=False)
        step = next((i for i, (a, b) in enumerate(both) if a != b), min(len(theirs), len(mine)))
        where = f"prompt {prompt}, new token {step + 1}"
        if step == len(theirs) or step == len(mine):
            ended, other = (
                ("Hugging Face's", f"ours goes on with {mine[step]}")
                if step == len(theirs)
                else ("ours", f"Hugging Face's goes on with {theirs[step]}")
            )
            lines.append(f"{where}: {ended} has ended, {other}: other tokens end a text")
            continue
        rivals = dict(oracle.rivals[prompt][step]) if oracle.rivals else {}
        lines.append(f"{where}: {_choice(theirs[step], mine[step], rivals, rounding)}")
    return tuple(lines)


def _choice(theirs: int, mine: int, rivals: dict[int, float], rounding: float) -> str:
    """Why two sides took different tokens, judged by the logits that the oracle had there."""
    found = f"Hugging Face's is {theirs}, ours {mine}"
    if mine not in rivals:
        if not rivals:
            return found
        return f"{found}, which is not among its {len(rivals)} most likely ones"
    gap = rivals[theirs] - rivals[mine]
    if gap <= 2 * rounding:  # each of the two logits may be off by so much
        return f"{found}; its logits are {gap:.2g} apart, so near that rounding decides"
    return (
        f"{found}; its logits are {gap:.3g} apart, more than rounding explains: what differs is "
        "the state or the choice of the token"
    )
