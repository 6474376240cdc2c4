"""Files of hardware: all load, every number has a source, curves and errors."""

import pytest

from mistral_ms.config import read_yaml
from mistral_ms.config.base import validate
from mistral_ms.errors import ConfigError
from mistral_ms.planner.hardware import DIRECTORY, Cluster, Hardware, load_hardware

FILES = sorted(path.stem for path in DIRECTORY.glob("*.yaml"))


def test_the_expected_files_are_there():
    assert {"atlas_800t_a2", "atlas_a3", "h100", "this_machine"} <= set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_files_load(name):
    hardware = load_hardware(name)
    assert hardware == load_hardware(DIRECTORY / f"{name}.yaml")
    shares = [hardware.compute.product_efficiency(n) for n in (1, 16, 300, 5000, 10**6)]
    assert shares == sorted(shares)
    assert shares[0] > 0
    assert shares[-1] <= 1


def test_efficiency_between_points():
    compute = load_hardware("atlas_800t_a2").compute.model_copy(
        update={"efficiency": ((64, 0.2), (256, 0.6))}
    )
    shares = [compute.product_efficiency(n) for n in (32, 64, 128, 256, 999)]
    assert shares == pytest.approx([0.1, 0.2, 0.4, 0.6, 0.6])  # 128 is half way in logarithms


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"memory_gib": -1}, "memory_gib"),
        ({"reserved_gib": 64}, "reserved_gib must be less"),
        ({"sources": {}}, "between.efficiency has no entry in sources"),
        ({"price": 3}, "unknown key"),
    ],
)
def test_what_is_wrong_is_said(change, message):
    values = read_yaml(DIRECTORY / "atlas_800t_a2.yaml") | change
    with pytest.raises(ConfigError, match=message):
        validate(Hardware, values, "file")


def test_a_name_that_is_not_known():
    with pytest.raises(ConfigError, match=r"known: .*perhaps h100"):
        load_hardware("h1000")


def test_clusters_use_nodes_whole():
    hardware = load_hardware("h100")
    assert Cluster.of(hardware, 4).nodes == 1
    assert Cluster.of(hardware, 32).nodes == 4
    with pytest.raises(ConfigError, match="12 cards"):
        Cluster.of(hardware, 12)
