"""What balances a dispatch group balances each rank's: several processes compute what one does
with as many dispatch groups.
"""

import functools

import numpy as np
import pytest
from distributed.grouped import GATES, LAYOUTS, E, T, computed, config

from mistral_ms.moe import MoELayer
from mistral_ms.parallel.topology import Topology, weight_slice
from mistral_ms.weights import by_name, specs

each_gate = pytest.mark.parametrize("name", GATES)


@functools.cache
def alone(name, parts):
    """One process, the tokens of these ranks in one dispatch group."""
    return computed(name, MoELayer(config(name), GATES[name][2]), parts)


@each_gate
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_processes_compute_what_one_does_group_by_group(report, layout, name):
    topology, held = Topology.of(LAYOUTS[layout]), by_name(specs(config(name)))
    whole = [alone(name, (dp,)) for dp in range(LAYOUTS[layout].dp)]
    for coords in topology.all_coords:
        for what, own in whole[coords.dp].items():
            got = report(2).get(coords.rank, f"grouped/{layout}/{name}/{what}")
            if what in ("routed", "kept"):
                np.testing.assert_array_equal(got, own, err_msg=what)
                continue
            want = own
            if what.startswith("experts."):  # those of all rows, wherever they came from
                spec = held[f"layers.0.moe.{what}"]
                want = sum(each[what] for each in whole)
                want = want[weight_slice(spec, topology, coords.rank)]
            # float32 products whose rows stand in other places, added in another order
            limit = 2e-6 * np.abs(want).max()
            np.testing.assert_allclose(got, want, rtol=0, atol=limit, err_msg=what)
            assert limit > 0


@each_gate
def test_one_group_of_all_tokens_is_something_else(name):
    """So the number of dispatch groups matters, and with it that of data-parallel ranks."""
    _, K, routing = GATES[name]
    apart = [alone(name, (dp,)) for dp in range(2)]
    together = alone(name, (0, 1))
    assert (np.concatenate([each["y"] for each in apart]) != together["y"]).any()
    for each in (*apart, together):
        assert each["routed"].sum() == K * (2 * T if each is together else T)
    if name == "base":  # each group is balanced, so are both
        assert all((each["routed"] == T // E).all() for each in apart)
    if name == "reroute":
        assert (apart[0]["kept"] > apart[0]["routed"]).any(), "an expert that others were full for"
        assert apart[0]["kept"].sum() < T
    elif routing.policy == "capacity":
        assert (apart[0]["kept"] < apart[0]["routed"]).any()
