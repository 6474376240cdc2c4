"""What is shown while a model trains."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from mistral_ms.training import StepRecord, show_progress
from mistral_ms.training.progress import describe


def record(step):
    return StepRecord(step, step / 8, 9.0, 1 / step, 2.0, 0.0, 1e-3, 1.0, 1234.5, 1.0, 0, 0.0, ())


def test_of_preferences_their_loss_is_shown():
    """The language-model loss is not trained."""
    found = {"loss": 0.6875, "rewards/accuracies": 0.75}
    said = describe(replace(record(2), preference=found), "0:10")
    assert said.startswith("preference loss 0.6875  accuracy  75 %")
    assert "0.5000" not in said


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def show(steps, seconds_per_step, terminal=False):
    output, clock = io.StringIO(), Clock()
    console = Console(file=output, force_terminal=terminal, width=120)
    with show_progress(console, steps, clock) as observe:
        for step in range(1, steps + 1):
            clock.now += seconds_per_step
            observe(record(step))
    return output.getvalue()


class TestLog:
    def test_a_line_every_ten_seconds_and_at_both_ends(self):
        lines = show(steps=25, seconds_per_step=1.0).splitlines()
        assert [int(line.split()[1]) for line in lines] == [1, 11, 21, 25]
        assert not any("\x1b" in line for line in lines)

    def test_says_loss_speed_rate_and_time_left(self):
        lines = show(steps=301, seconds_per_step=0.5).splitlines()
        assert lines[1].startswith("step  21 of 301  loss  0.0476    1234 tokens/s  lr 1.0e-03")
        assert lines[1].endswith("2:20 left")
        assert lines[0].endswith("? left"), "one step says nothing about speed"
        assert lines[-1].endswith("0:00 left")

    def test_a_slow_training_shows_every_step(self):
        assert len(show(steps=4, seconds_per_step=20.0).splitlines()) == 4


def test_the_time_left_follows_a_change_of_speed():
    output, clock = io.StringIO(), Clock()
    with show_progress(Console(file=output, width=120), 200, clock) as observe:
        for step in range(1, 101):
            clock.now += 1.0 if step <= 50 else 2.0
            observe(record(step))
    left = {int(x.split()[1]): x.split()[-2] for x in output.getvalue().splitlines()}
    assert left[41] == "2:39"
    minutes, seconds = left[96].split(":")
    assert int(minutes) * 60 + int(seconds) == pytest.approx(2 * 104, rel=0.02)


def test_a_terminal_gets_a_bar():
    text = show(steps=3, seconds_per_step=1.0, terminal=True)
    assert "\x1b" in text
    assert "compiling the graph" in text
    assert "3/3" in text
    assert "0.3333" in text
