"""Studies: their numbers are the planner's, the page shows them, and they can be drawn."""

from pathlib import Path

import pytest

from mistral_ms.planner import studies
from mistral_ms.planner.study import markdown
from mistral_ms.planner.study_picture import study_png
from mistral_ms.planner.study_runs import (
    DEEPSEEK,
    MISTRAL_7B,
    MIXTRAL_8X7B,
    MIXTRAL_8X22B,
    TOP_1,
    TOP_4,
    active_parameters,
    best,
    layout,
    model,
    training,
)

PAGE = (Path(__file__).parents[2] / "docs" / "planner.md").read_text(encoding="utf-8")


def shown(study):
    """Rows of a study with fewer points than the command has: the page has each of them."""
    for table in study.tables:
        head, rule, *rows = markdown(table).splitlines()
        assert f"{head}\n{rule}\n" in PAGE
        assert rows
        assert all(row in PAGE.splitlines() for row in rows)


def test_active_parameters():
    """Published: 7.2, 12.9 of 46.7, 2.8 billion."""
    assert active_parameters(model(MISTRAL_7B)) / 1e9 == pytest.approx(7.24, abs=0.01)
    assert active_parameters(model(MIXTRAL_8X7B)) / 1e9 == pytest.approx(12.9, abs=0.05)
    assert active_parameters(model(DEEPSEEK)) / 1e9 == pytest.approx(2.8, abs=0.05)
    one, two, four = (active_parameters(model(n)) for n in (TOP_1, MIXTRAL_8X7B, TOP_4))
    assert four - two == pytest.approx(2 * (two - one))


def test_where_flat_loses():
    study = studies.routes()
    shown(study)
    ratios = {series.name: series.y for series in study.charts[0].series[:-1]}
    for line in ratios.values():
        assert line[0] > 1 > line[-1]  # few bytes, many bytes
        assert list(line) == sorted(line, reverse=True)
    crossings = [float(row[-1].removesuffix(" MB")) for row in study.tables[0].rows]
    assert crossings == sorted(crossings)  # more nodes, more messages
    assert study_png(study).startswith(b"\x89PNG")


def test_more_cards():
    study = studies.cards((16,))
    shown(study)
    assert study.values()["tables"][1]["rows"][0]["cards"] == "16"
    assert study_png(study).startswith(b"\x89PNG")


def test_what_offload_costs_and_saves():
    study = studies.offload((32,))
    shown(study)
    card, host = study.tables[0].rows
    assert float(card[-1]) == 0 < float(host[-1])  # GiB of host memory
    optimizer = next(series for series in study.charts[0].series if series.name == "optimizer")
    assert optimizer.y[0] > 0 == optimizer.y[1]
    assert study_png(study).startswith(b"\x89PNG")


def test_long_sequences():
    study = studies.sequence((4096, 16384))
    shown(study)
    attention = [int(row[3].rstrip("%")) for row in study.tables[0].rows]
    assert attention[0] < attention[1]


def test_cost():
    study = studies.cost(names=(MISTRAL_7B,))
    shown(study)
    assert study_png(study).startswith(b"\x89PNG")


def test_models():
    shown(studies.models((32,), (DEEPSEEK,)))


def test_what_does_not_fit():
    assert best(training(MIXTRAL_8X22B, 32), 8) is None
    assert layout(None) == "none fits"
