"""The plan command: what it prints, writes, and refuses."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from mistral_ms.cli.plan import Name, plan
from mistral_ms.config import load_run_config
from mistral_ms.errors import ConfigError
from mistral_ms.planner.studies import STUDIES

RUNS = Path(__file__).parents[2] / "configs" / "run"
RUN = str(RUNS / "pretrain_mixtral_8x7b_32card.yaml")
app = typer.Typer()
app.command()(plan)


def call(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


def test_a_plan(tmp_path):
    output, report, figure = (tmp_path / name for name in ("best.yaml", "plan.json", "plan.png"))
    done = call("--config", RUN, "--nodes", 2, "--top", 3, "--sensitivity",
                "--json", report, "--output", output, "--figure", figure)  # fmt: skip
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0].startswith("16 cards, Atlas 800T A2")
    assert lines[1].split()[:4] == ["dp", "mp", "pp", "ep"]
    assert all(line.split()[0].isdigit() for line in lines[2:5])
    assert lines[5].startswith("A step takes")
    assert "Runner-up" in done.output
    assert "another layout wins" in done.output
    assert "assumed or from memory" in done.output
    assert "With routing.policy dropless the same layout would give" in done.output
    assert [line.split()[-1] for line in lines[-3:]] == list(map(str, (report, output, figure)))
    assert figure.read_bytes().startswith(b"\x89PNG")
    best = json.loads(report.read_text())["candidates"][0]
    run = load_run_config(output)
    assert run.parallel.world == 16
    assert (run.parallel.dp, run.parallel.pp) == (best["dp"], best["pp"])
    assert run.training.gradient_accumulation_steps == best["micro_batches"]
    assert run.data.dataset.is_absolute()


def test_nothing_fits(tmp_path):
    done = call("--config", RUNS / "pretrain_mixtral_8x22b_128card.yaml", "--nodes", 1,
                "--output", tmp_path / "none.yaml")  # fmt: skip
    assert done.exit_code == 1
    assert "No layout fits" in done.output
    assert not (tmp_path / "none.yaml").exists()


def test_a_study(tmp_path):
    assert list(Name) == list(STUDIES)
    report, figure = tmp_path / "study.json", tmp_path / "study.png"
    done = call("--study", "routes", "--json", report, "--figure", figure)
    assert done.exit_code == 0, done.output
    assert "Where does flat lose" in done.output
    assert "All times are predictions" in done.output
    said = [line.split()[-1] for line in done.output.splitlines()[-2:]]
    assert said == list(map(str, (report, figure)))
    values = json.loads(report.read_text())
    assert values["study"] == "routes"
    assert values["tables"][0]["rows"][0]["cards of an expert group"] == "16"
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to plan: --config"),
        (("--study", "routes", "--nodes", "2"), "no plan: --study: --nodes"),
        (("--study", "routes", "--calibrate", "x.yaml"), "no plan: --study: --calibrate"),
        (("--calibrate", "x.yaml", "--config", RUN), "no plan: --calibrate: --config"),
        (("--study", "routes", "--config", RUN), "no plan: --study: --config"),
        (("--study", "routes", "--dispatch", "any"), "no plan: --study: --dispatch"),
    ],
)
def test_a_plan_or_a_study_or_a_calibration(arguments, message):
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(app, list(arguments), catch_exceptions=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--hardware", "a2"), "unknown hardware: --hardware: a2"),
        (("--expert-load", "zipf:much"), "no skew"),
        (("--expert-load", "missing.jsonl"), "cannot read"),
        (("--output", "/nowhere/run.yaml"), "cannot write"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(app, ["--config", RUN, *arguments], catch_exceptions=False)


def test_loads_are_of_sparse_models():
    dense = str(RUNS / "pretrain_mistral_7b_8card.yaml")
    with pytest.raises(ConfigError, match="only a sparse model"):
        CliRunner().invoke(app, ["--config", dense, "--expert-load", "zipf:1"],
                           catch_exceptions=False)  # fmt: skip
