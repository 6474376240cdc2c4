"""What uneven experts cost, by hand."""

import json

import pytest
from support import configs

from mistral_ms.config import RoutingConfig
from mistral_ms.errors import ConfigError
from mistral_ms.planner.load import EVEN, balance, read_loads, zipf

MODEL = configs.model()
CAPACITY = RoutingConfig(policy="capacity", capacity_factor=1.0)


def test_zipf():
    assert zipf(4, 0) == (0.25,) * 4
    assert zipf(3, 1) == pytest.approx((6 / 11, 3 / 11, 2 / 11))
    with pytest.raises(ConfigError, match="0 or more"):
        zipf(4, -1)


def test_without_loads_everything_is_even():
    assert balance(MODEL, RoutingConfig(), 8, 100, ()) == EVEN
    assert balance(configs.model(moe=None), RoutingConfig(), 1, 100, [zipf(8, 0)]) == EVEN


def test_dropless_waits_for_the_fullest_rank():
    loads = (0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1)
    assert balance(MODEL, RoutingConfig(), 8, 100, [loads]).slowest == pytest.approx(2.4)
    assert balance(MODEL, RoutingConfig(), 4, 100, [loads]).slowest == pytest.approx(1.6)
    both = balance(MODEL, RoutingConfig(), 8, 100, [loads, zipf(8, 0)])
    assert both.slowest == pytest.approx(1.7)  # the mean over layers
    assert both.dropped == 0


def test_a_capacity_drops_what_is_above_it():
    """100 tokens, two choices each, 25 slots an expert: of 60 choices 35 are dropped."""
    loads = (0.3, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1)
    found = balance(MODEL, CAPACITY, 8, 100, [loads])
    assert found.slowest == 1
    assert found.dropped == pytest.approx(35 / 200)


def test_loads_that_a_training_recorded(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 1, "expert_load": [[0.5, 0.5]]}, {"step": 2, "expert_load": [[3, 1]]}]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert read_loads(path, 2) == ((0.75, 0.25),)  # of the last step
    with pytest.raises(ConfigError, match="8 numbers"):
        read_loads(path, 8)


@pytest.mark.parametrize(
    "line", ["", "[1]", "{}", "3", '{"expert_load": 3}', '{"expert_load": [[NaN, 1]]}',
             '{"expert_load": [[0, 0]]}', '{"expert_load": [[1, 2], "ab"]}', "not JSON"]
)  # fmt: skip
def test_lines_without_loads(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line)
    with pytest.raises(ConfigError, match="no expert loads"):
        read_loads(path, 2)
