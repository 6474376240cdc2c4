"""What a layout asks for and the explicit path does not do is refused before anything begins."""

from pathlib import Path

import pytest

from mistral_ms.config import ParallelConfig, load_run_config
from mistral_ms.errors import ConfigError
from mistral_ms.parallel.apply import Division

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("amount", ["selective", "full"])
def test_recomputing_needs_a_pipeline(amount):
    with pytest.raises(ConfigError, match=f"recompute: {amount} with parallel.pp=1: .*use none"):
        Division(ParallelConfig(dp=2, recompute=amount))
    Division(ParallelConfig(pp=2, recompute=amount))  # stages recompute everything anyway


def test_the_run_of_the_ready_made_script_is_not_refused():
    run = load_run_config(ROOT / "configs" / "run" / "pretrain_mixtral_8x7b_32card.yaml")
    for rank in (0, 31):
        assert Division(run.parallel, rank, 32).is_pipelined
