"""What numbers that nobody has measured do to an answer."""

from pathlib import Path

from mistral_ms.config import load_run_config
from mistral_ms.planner import Cluster, judge, load_hardware
from mistral_ms.planner.sensitivity import rows, scaled, sensitivity, weak_numbers

RUNS = Path(__file__).parents[2] / "configs" / "run"
A2 = load_hardware("atlas_800t_a2")


def test_one_number_changes():
    assert scaled(A2, "host.gb_per_s", 2).host.gb_per_s == 40
    assert scaled(A2, "between.efficiency", 2).between.efficiency == 1
    assert scaled(A2, "compute.attention_forward", 0.5).compute.attention_forward == 0.215
    assert scaled(A2, "compute.efficiency", 2).compute.efficiency[0] == (64, 0.4)
    assert scaled(A2, "compute.peak_tflops", 2).compute.peak_tflops.float32 == 177
    assert scaled(A2, "reserved_gib", 2).reserved_gib == 8
    assert load_hardware("atlas_800t_a2") == A2


def test_every_weak_number_of_time_has_an_effect_in_the_right_direction():
    run = load_run_config(RUNS / "pretrain_mixtral_8x7b_16card.yaml")
    cluster = Cluster.of(A2, 16)
    effects = sensitivity([judge(run, cluster)], cluster)
    keys = [effect.key for effect in effects]
    assert set(keys) == set(weak_numbers(A2)) - {
        "reserved_gib", "communicator_mib", "host.memory_gib"
    }  # fmt: skip
    for effect in effects:
        if effect.key.endswith("latency_us"):
            assert effect.low >= 1 >= effect.high
        else:
            assert effect.low <= 1 <= effect.high
        assert not effect.overtaken  # there is no other
    widths = [abs(effect.high - effect.low) for effect in effects]
    assert widths == sorted(widths, reverse=True)
    # the optimizer is in host memory
    assert {"host.gb_per_s", "host.memory_gb_per_s"} <= set(keys[:3])
    assert "compute.efficiency" in keys  # of which only the largest is measured
    assert next(rows(effects))[3] == "no"


def test_nothing_fits():
    assert sensitivity([], Cluster.of(A2, 16)) == ()
