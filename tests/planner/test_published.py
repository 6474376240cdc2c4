"""Published throughput: one point is fitted, the errors of the others are those that docs show."""

import re
from pathlib import Path

import pytest

from mistral_ms.planner.published import FITTED, PREDICTED

PAGE = Path(__file__).parents[2] / "docs" / "planner.md"


def test_the_fitted_point_is_met():
    assert abs(FITTED.error()) < 0.01


@pytest.mark.parametrize("point", PREDICTED, ids=lambda point: point.name)
def test_the_page_shows_the_errors_that_there_are(point):
    """Good or bad: of the assumed values and of each other value of what is open."""
    text = PAGE.read_text(encoding="utf-8")
    for name in (None, *point.others):
        row = f"| {point.name if name is None else name} |"
        shown = [line for line in text.splitlines() if line.startswith(row)]
        assert len(shown) == 1, row
        predicted, error = re.findall(r"\| ([\d.]+) \| ([+-]\d+) % \|", shown[0])[0]
        assert float(predicted) == pytest.approx(point.predicted(name), abs=0.6)
        assert int(error) == round(100 * point.error(name))
