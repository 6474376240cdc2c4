"""Every operation of a group of two, and its gradient, against NumPy."""

import numpy as np
import pytest
from distributed.collectives import MAPPINGS, MODES, counts, floats, given, topology

from mistral_ms.parallel.topology import GroupKind

each_world = pytest.mark.parametrize("world", MODES)
each_run = pytest.mark.parametrize(
    ("world", "mode"), [(world, mode) for world, modes in MODES.items() for mode in modes]
)


def pairs(world):
    return [group.ranks for group in topology(world).groups(GroupKind.DATA)]


def test_with_four_processes_the_groups_are_not_the_world():
    assert pairs(2) == [(0, 1)]
    assert pairs(4) == [(0, 2), (1, 3)]


def want(operation, gave, me):
    """What member ``me`` gets when the two members gave ``gave``."""
    return {
        "all_reduce": lambda: gave[0] + gave[1],
        "all_gather": lambda: np.stack(gave),
        "reduce_scatter": lambda: gave[0][me] + gave[1][me],
        "all_to_all": lambda: np.stack([gave[0][me], gave[1][me]]),
        "broadcast": lambda: gave[0],
        "send_forward": lambda: gave[0],
        "send_backward": lambda: gave[1],
    }[operation]()


@each_run
@pytest.mark.parametrize("name", given(0))
def test_operations(report, world, mode, name):
    for ranks in pairs(world):
        gave = [given(rank)[name] for rank in ranks]
        for me, rank in enumerate(ranks):
            got = report(world).get(rank, f"{mode}/{name}")
            expected = want(name.partition("-")[0], gave, me)
            assert got.dtype == expected.dtype
            np.testing.assert_array_equal(got, expected)


@each_world
def test_unequal_rows_and_their_way_back(report, world):
    for ranks in pairs(world):
        gave = [floats(rank, 5, 2) for rank in ranks]
        douts = [floats(rank, 7, 2) for rank in ranks]
        for me, rank in enumerate(ranks):
            rows, dx = np.zeros((7, 2), np.float32), np.zeros((5, 2), np.float32)
            place = 0
            for sender in range(2):
                first = counts(sender)[:me].sum()
                for i in range(counts(sender)[me]):
                    rows[place] = gave[sender][first + i]
                    place += 1
            place = 0
            for receiver in range(2):
                before = sum(counts(q)[receiver] for q in range(me))
                for i in range(counts(me)[receiver]):
                    dx[place] = douts[receiver][before + i]
                    place += 1
            np.testing.assert_array_equal(report(world).get(rank, "all_to_all_v/rows"), rows)
            np.testing.assert_array_equal(report(world).get(rank, "all_to_all_v/dx"), dx)


@each_world
@pytest.mark.parametrize("name", [*(mapping.__name__ for mapping in MAPPINGS), "AllToAll"])
def test_mappings_and_their_gradients(report, world, name):
    """Forward and gradient, as the table of the module states them."""
    shape = (2, 3) if name == "AllToAll" else (3, 4)
    for ranks in pairs(world):
        x = [floats(rank, *shape) for rank in ranks]
        for me, rank in enumerate(ranks):
            out = report(world).get(rank, f"{name}/out")
            douts = [floats(r, *out.shape) for r in ranks]

            def own(a, me=me):
                half = a.shape[-1] // 2
                return a[..., me * half : (me + 1) * half]

            def whole(parts):
                return np.concatenate(parts, -1)

            forward, backward = {
                "CopyToGroup": (x[me], douts[0] + douts[1]),
                "ReduceFromGroup": (x[0] + x[1], douts[me]),
                "ScatterToGroup": (own(x[me]), whole(douts)),
                "GatherFromGroup": (whole(x), own(douts[me])),
                "AllGatherFromGroup": (whole(x), own(douts[0] + douts[1])),
                "ReduceScatterToGroup": (own(x[0] + x[1]), whole(douts)),
                "AllToAll": (
                    np.stack([x[0][me % 2], x[1][me % 2]]),
                    np.stack([douts[0][me % 2], douts[1][me % 2]]),
                ),
            }[name]
            np.testing.assert_array_equal(out, forward)
            np.testing.assert_array_equal(report(world).get(rank, f"{name}/dx"), backward)


@each_world
def test_activations_travel_on_and_gradients_back(report, world):
    """Stage s adds s on the way there, and doubles what comes back."""
    x = floats(0, 3)
    for stage in range(world):
        x = x + np.float32(stage)
    for stage in reversed(range(world)):
        x = x * np.float32(2)
        np.testing.assert_array_equal(report(world).get(stage, "there_and_back"), x)
