"""``moeify`` with experts on two processes computes what it computes in one."""

import re

import numpy as np
import pytest
from distributed.moeified import POLICIES, E, computed


@pytest.mark.parametrize("policy", POLICIES)
def test_two_processes_compute_what_one_does(report, policy):
    """Rows and experts in halves: results, and the gradients of experts, which are those of all
    rows; gradients of gates add up; counts and the bias that follows them are everybody's.
    """
    found, whole = report(2), computed(policy, None)
    held, size = E // 2, len(whole["y"]) // 2
    assert sum("experts" in name for name in whole) == 2 * E * 4
    for name, want in whole.items():
        parts = []
        for rank in range(2):
            local = re.sub(r"experts\.(\d+)", lambda found: f"experts.{int(found[1]) % held}", name)
            if "experts" in name and int(re.search(r"experts\.(\d+)", name)[1]) // held != rank:
                continue
            parts.append(found.get(rank, f"moeified/{policy}/{local}"))
        if name == "y":
            parts = [np.concatenate(parts)]
            assert len(parts[0]) == 2 * size
        elif name.endswith("gate.weight"):
            parts = [parts[0] + parts[1]]
        for got in parts:
            # float32 sums of 12 rows, added up in another order
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5, err_msg=name)
        assert np.abs(want).max() > 1e-3, name
