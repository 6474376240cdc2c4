"""What a layout asks for, as one process is told it."""

from pathlib import Path

import pytest

from mistral_ms.config import ParallelConfig, load_run_config
from mistral_ms.parallel.context import ParallelContext

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("amount", ["none", "selective", "full"])
def test_a_stage_that_goes_forward_again_recomputes_no_block_in_that(amount):
    assert ParallelContext(ParallelConfig(recompute=amount)).recompute == amount
    assert ParallelContext(ParallelConfig(dp=2, recompute=amount), world=2).recompute == amount
    wanted = "selective" if amount == "full" else amount
    assert ParallelContext(ParallelConfig(pp=2, recompute=amount), world=2).recompute == wanted


def test_the_run_of_the_ready_made_script_is_not_refused():
    run = load_run_config(ROOT / "configs" / "run" / "pretrain_mixtral_8x7b_32card.yaml")
    for rank in (0, 31):
        assert ParallelContext(run.parallel, rank, 32).is_pipelined


def test_auto_is_the_graph_on_ascend():
    auto = ParallelConfig()
    assert auto.execution == "auto"
    assert [auto.execution_on(device) for device in ("Ascend", "CPU")] == ["graph", "explicit"]
    for chosen in ("explicit", "graph"):
        config = ParallelConfig(execution=chosen)
        assert {config.execution_on(device) for device in ("Ascend", "CPU")} == {chosen}
