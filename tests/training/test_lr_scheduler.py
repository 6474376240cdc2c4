"""The learning rate, point by point."""

import itertools
import math

import pytest

from mistral_ms.config import OptimizerConfig, TrainingConfig
from mistral_ms.training import learning_rate

PEAK = 0.5


def rates(steps, **schedule):
    config = TrainingConfig(
        max_steps=steps,
        seq_length=1,
        global_batch_size=1,
        optimizer=OptimizerConfig(learning_rate=PEAK),
        **schedule,
    )
    return [learning_rate(config, step) / PEAK for step in range(steps)]


def test_constant():
    assert rates(3, lr_scheduler_type="constant") == [1, 1, 1]


def test_linear_ends_at_the_floor():
    assert rates(5, lr_scheduler_type="linear", min_lr_ratio=0.2) == pytest.approx(
        [1, 0.8, 0.6, 0.4, 0.2]
    )


def test_cosine_is_half_way_in_the_middle():
    assert rates(5, lr_scheduler_type="cosine", min_lr_ratio=0.2) == pytest.approx(
        [1, 0.6 + 0.4 * math.cos(math.pi / 4), 0.6, 0.6 - 0.4 * math.cos(math.pi / 4), 0.2]
    )


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
def test_warmup_rises_to_the_peak_and_then_the_peak_is_held_once_more(kind):
    got = rates(10, lr_scheduler_type=kind, warmup_steps=4, min_lr_ratio=0)
    assert got[:5] == pytest.approx([0.25, 0.5, 0.75, 1, 1])
    assert all(a >= b for a, b in itertools.pairwise(got[4:]))


def test_warmup_may_be_all_there_is():
    assert rates(4, warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75, 1])


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_never_below_the_floor_or_above_the_peak(kind):
    got = rates(50, lr_scheduler_type=kind, warmup_steps=7, min_lr_ratio=0.1)
    assert min(got[7:]) == got[-1] == pytest.approx(0.1)
    assert max(got) == 1


def test_one_step_runs_at_the_peak():
    assert rates(1, lr_scheduler_type="cosine") == [1]
