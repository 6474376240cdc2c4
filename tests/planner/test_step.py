"""A step's seconds: sums, laws, and the two ways of running."""

from pathlib import Path

import pytest

from mistral_ms.config import load_run_config
from mistral_ms.parallel.pipeline import stages_of
from mistral_ms.planner.hardware import load_hardware
from mistral_ms.planner.load import EVEN
from mistral_ms.planner.memory import parameters
from mistral_ms.planner.network import transfer_seconds
from mistral_ms.planner.step import StepModel, elements
from mistral_ms.planner.traffic import stage_transfer
from mistral_ms.planner.work import Work
from mistral_ms.weights import specs

RUNS = Path(__file__).parents[2] / "configs" / "run"
A2 = load_hardware("atlas_800t_a2")
RUN = load_run_config(RUNS / "pretrain_mixtral_8x7b_32card.yaml")


def changed(run, **values):
    parallel = {k: v for k, v in values.items() if k in type(run.parallel).model_fields}
    training = {k: v for k, v in values.items() if k not in parallel}
    return run.model_copy(
        update={
            "parallel": run.parallel.model_copy(update=parallel),
            "training": run.training.model_copy(update=training),
        }
    )


def step(run=RUN, hardware=A2, execution="graph", **options):
    pp, weights = run.parallel.pp, specs(run.model)
    parts = stages_of(run.model, pp * run.parallel.pp_interleave_num)
    owned = [
        parameters(run.model, run.parallel, parts[number::pp], weights, execution).owned
        for number in range(pp)
    ]
    held = elements(weights, run.parallel.sizes)
    return StepModel(run, hardware, execution, parts, held).step(owned, **options)


@pytest.mark.parametrize("execution", ["graph", "explicit"])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_breakdown_adds_up(recompute, execution):
    found = step(changed(RUN, recompute=recompute), execution=execution)
    assert sum(found.breakdown.values()) == pytest.approx(found.seconds)
    assert min(found.breakdown.values()) >= 0


def test_one_card_takes_the_sum_of_its_operators():
    run = changed(
        RUN, dp=1, pp=1, ep=1, optimizer_parallel=False, recompute="none",
        global_batch_size=1, gradient_accumulation_steps=1,
    )  # fmt: skip
    work, found = Work(run, A2, "graph", EVEN), step(run)
    layers = [work.layer(n) for n in range(32)]
    passes = [work.embedding(), *layers, work.head()]
    seconds = sum(p.forward.total + p.backward.total for p in passes) * A2.compute.slowdown
    assert found.seconds == pytest.approx(seconds + found.breakdown["optimizer"])
    assert found.breakdown["bubble"] == pytest.approx(0)


def test_the_bubble_is_that_of_the_papers():
    """Stages are nearly equal: (p - 1) / (m + p - 1) of the pipeline's length."""
    found = step()
    pipeline = found.timeline
    assert pipeline.bubble_fraction == pytest.approx(3 / (16 + 3), abs=0.02)


@pytest.mark.parametrize("chunks", [1, 2])
def test_cores_that_stages_share_are_never_idle(chunks):
    """What a stage waits for then takes no core away from the others: a step takes less time, and
    is still the sum of its parts.
    """
    shared = A2.model_copy(update={"compute": A2.compute.model_copy(update={"alone": 4.0})})
    run = changed(RUN, pp_interleave_num=chunks)
    own, found = (step(run, hardware, "explicit") for hardware in (A2, shared))
    assert found.seconds < own.seconds
    assert sum(found.breakdown.values()) == pytest.approx(found.seconds)
    assert min(found.breakdown.values()) >= 0
    assert found.breakdown["optimizer"] == own.breakdown["optimizer"]


def test_interleaving_shortens_the_bubble_and_sends_more():
    """On the explicit path. Of v chunks a stage in the middle has 2 v boundaries, each of which
    states pass there and their gradients back; an end has v, and v - 1 from end to start.
    """
    m, pp = RUN.training.gradient_accumulation_steps, RUN.parallel.pp
    hop = transfer_seconds(stage_transfer(RUN, "explicit"), 0, RUN.parallel.sizes, A2)
    bubbles = []
    for v in (1, 2, 4):
        found = step(changed(RUN, pp_interleave_num=v), execution="explicit")
        boundaries = 2 * v - 1 if found.slowest in (0, pp - 1) else 2 * v
        assert found.breakdown["transfers"] == pytest.approx(2 * m * boundaries * hop)
        bubbles.append(found.breakdown["bubble"])
    assert bubbles == sorted(bubbles, reverse=True)
    assert bubbles[1] < 0.75 * bubbles[0]
    assert step().breakdown["transfers"] == 0


def slower(level, key, factor):
    rates = getattr(A2, level)
    return A2.model_copy(
        update={level: rates.model_copy(update={key: getattr(rates, key) * factor})}
    )


@pytest.mark.parametrize(
    ("level", "key", "factor"),
    [
        ("compute", "memory_gb_per_s", 0.5),
        ("compute", "attention_forward", 0.5),
        ("inside", "gb_per_s", 0.5),
        ("inside", "latency_us", 10),
        ("between", "gb_per_s", 0.1),
        ("between", "latency_us", 1000),
        ("host", "gb_per_s", 0.5),
        ("host", "memory_gb_per_s", 0.5),
    ],
)
def test_time_never_falls_when_something_gets_slower(level, key, factor):
    run = changed(RUN, offload_optimizer="host", dp=16, global_batch_size=256)
    for way, chunks in (("graph", 1), ("explicit", 1), ("explicit", 2)):
        each = changed(run, pp_interleave_num=chunks)
        assert step(each, slower(level, key, factor), way).seconds > step(each, A2, way).seconds


def test_what_is_computed_again_takes_time():
    seconds = [step(changed(RUN, recompute=r)).seconds for r in ("none", "selective", "full")]
    assert seconds == sorted(seconds)
    assert seconds[0] < seconds[1] < seconds[2]


def test_the_host_takes_longer_for_the_optimizer():
    assert step(changed(RUN, offload_optimizer="host")).seconds > step().seconds


def test_more_micro_batches_fill_the_pipeline():
    few = changed(RUN, gradient_accumulation_steps=8, global_batch_size=64)
    tokens = [run.training.global_batch_size / step(run).seconds for run in (few, RUN)]
    assert tokens[0] < tokens[1]


def test_gradients_travel_beside_the_last_backward_pass_in_the_graph():
    """So less of the same reduction is left over than on the explicit path, which reduces last."""
    run = changed(RUN, dp=16, global_batch_size=256)
    graph, explicit = (step(run, execution=e).breakdown for e in ("graph", "explicit"))
    assert 0 <= graph["gradient_reduction"] < explicit["gradient_reduction"]


def test_two_halves_hide_a_part_of_the_exchange():
    one, two = step(), step(changed(RUN, micro_batch_interleave_num=2))
    exchange, half = (each.breakdown["all_to_all"] for each in (one, two))
    # twice as many messages, each with its latency and half of the rows
    assert exchange / 2 < half < 0.6 * exchange


def test_the_estimate_is_the_simulation_where_stages_are_equal():
    """It only chooses what is simulated; the ends of a model differ by a few percent."""
    assert step(simulated=False).seconds == pytest.approx(step().seconds, rel=0.03)


def test_the_critical_path_is_named():
    assert "of stage" in step().critical
    assert step(changed(RUN, pp=1, dp=32, ep=8)).critical.startswith("one stage")
