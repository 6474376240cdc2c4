"""What calibration measures becomes a file of hardware; how fast this machine is, no test asks."""

import math

import pytest
import typer
import yaml
from typer.testing import CliRunner

from mistral_ms.cli import calibrate, calibrate_operators
from mistral_ms.cli.plan import plan
from mistral_ms.config.base import validate
from mistral_ms.config.layout import Sizes
from mistral_ms.parallel.topology import GroupKind
from mistral_ms.planner import Hardware, load_hardware
from mistral_ms.planner.network import seconds
from mistral_ms.planner.traffic import Message

MEASURED = {
    "products": [1e9, 8e9, 7e9, 2e10],  # the third is an accident of the clock
    "stream": 1e10,
    "beside": 4e9,
    "attention": [2e9, 1e9],
    "alone": 1.9,
    "messages": [2e-3, 5e-1],
}


def of(processes):
    return validate(Hardware, calibrate.hardware_of(MEASURED, processes), "measured")


def test_rates():
    compute = of(1).compute
    assert compute.peak_tflops.float32 == pytest.approx(0.02)
    shares = [share for _, share in compute.efficiency]
    assert shares == pytest.approx([0.05, 0.4, 0.4, 1.0])  # never falls
    assert compute.memory_gb_per_s == 10
    assert compute.streamed(4e9) == pytest.approx(1)  # operators of a block
    assert compute.passed(1e10) == pytest.approx(1)  # updates, sums of gradients
    assert compute.slowdown == 1  # they are measured as a step has them
    assert (compute.alone, of(2).compute.alone) == (None, 1.9)
    assert compute.attention_forward == pytest.approx(0.1)
    assert compute.attention_backward == pytest.approx(0.05)


@pytest.mark.parametrize("processes", [2, 4])
def test_the_planner_gives_the_measured_messages_back(processes):
    hardware, sizes = of(processes), Sizes(processes, 1, 1, 1)
    for nbytes, measured in zip(calibrate.MESSAGES, MEASURED["messages"], strict=True):
        found = seconds(Message("AllReduce", GroupKind.WORLD, nbytes), sizes, hardware)
        assert found == pytest.approx(measured, rel=1e-3)  # the file has six digits


def test_the_command(monkeypatch, tmp_path):
    """All but the measurement."""
    asked = []

    def measured(processes):
        asked.append(processes)
        return calibrate.hardware_of(MEASURED, processes)

    monkeypatch.setattr(calibrate, "calibrate", measured)
    app = typer.Typer()
    app.command()(plan)
    path = tmp_path / "here.yaml"
    done = CliRunner().invoke(app, ["--calibrate", str(path), "--processes", "2"])
    assert done.exit_code == 0, done.output
    assert asked == [2]
    assert load_hardware(path) == of(2)
    assert f"plan --hardware {path}" in done.output.replace("\n", "")


@pytest.mark.parametrize("processes", [1, 4])
def test_the_file_can_be_read(tmp_path, processes):
    path = tmp_path / "here.yaml"
    path.write_text(yaml.safe_dump(calibrate.hardware_of(MEASURED, processes), sort_keys=False))
    assert load_hardware(path) == of(processes)
    assert load_hardware(path).devices_per_node == processes


def test_what_a_process_measures(monkeypatch):
    """Every rate is there and finite; tiny operations, a few times each."""
    tiny = {"SECONDS": 0.0, "LENGTHS": (4, 16), "LONG": 32, "WIDTH": 32, "HEADS": 4, "HEAD": 8}
    for name, value in {**tiny, "LENGTH": 16, "VOCABULARY": 64}.items():
        monkeypatch.setattr(calibrate_operators, name, value)
    found = calibrate_operators.measure(1)
    assert set(found) == {"products", "stream", "beside", "attention"}
    rates = [*found["products"], found["stream"], found["beside"], *found["attention"]]
    assert all(0 < rate < math.inf for rate in rates)
    assert len(found["products"]) == 2
