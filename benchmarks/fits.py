"""How cost grows: a line or a power law through medians, whichever is closer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

ROUNDING = 1e-9
"""Of least squares in float64: of two formulas that are both exact the line is taken."""


@dataclass(frozen=True)
class Fit:
    """A formula for cost.

    Attributes:
        kind: ``line``: a + b x; ``power``: a x ** b.
        a: seconds.
        b: seconds for each of x, or the exponent.
        residual: the largest relative deviation of a point from the formula.
        points: how many points there were.
    """

    kind: Literal["line", "power"]
    a: float
    b: float
    residual: float
    points: int

    def text(self, x: str) -> str:
        """The formula in milliseconds."""
        if self.kind == "power":
            formula = f"{1e3 * self.a:.3g} ms x {x}^{self.b:.2f}"
        else:
            formula = f"{1e3 * self.a:.3g} ms + {1e3 * self.b:.3g} ms x {x}"
        return f"{formula}, within {self.residual:.0%}"


def fit(x: Sequence[float], seconds: Sequence[float]) -> Fit | None:
    """The closer of both; None of fewer than three points, through which anything goes.

    Both are fitted to relative deviations: the line with weights 1 / seconds, the power law in
    logarithms.
    """
    if len(x) < 3:
        return None
    values, times = np.asarray(x, float), np.asarray(seconds, float)
    design = np.stack([np.ones_like(values), values], 1) / times[:, None]
    (a, b), *_ = np.linalg.lstsq(design, np.ones_like(times), rcond=None)
    a, b = (0.0 if abs(each) < ROUNDING * times.max() else float(each) for each in (a, b))
    line = Fit("line", a, b, _residual(a + b * values, times), len(x))
    exponent, logarithm = np.polyfit(np.log(values), np.log(times), 1)
    at = float(np.exp(logarithm))
    power = Fit("power", at, float(exponent), _residual(at * values**exponent, times), len(x))
    # a line with a negative part says that nothing costs less than nothing
    return power if min(a, b) < 0 or power.residual < line.residual - ROUNDING else line


def _residual(predicted: np.ndarray, times: np.ndarray) -> float:
    return float(np.abs(predicted / times - 1).max())
