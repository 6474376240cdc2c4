"""The auto-parallel graph inside MindFormers' steps, compiled for ranks of Ascend."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from mindspore import Tensor
from support.mindformers_target import LAYERS, LAYOUTS, WIDE, E, H

from mistral_ms.parallel.dryrun.ir import read
from mistral_ms.parallel.dryrun.process import Compiler, Request
from mistral_ms.parallel.dryrun.standins import find_runtime, why_impossible

C, HALF = 7, 2  # ceil(1.1 * 2 * S / E)
MICRO = LAYOUTS["pipeline"]["micro_batch_num"]


@pytest.fixture(scope="module")
def graphs(tmp_path_factory):
    """The compiled graphs: of rank 1 of two, and of rank 2 of four, in the last stage."""
    pytest.importorskip("mindformers", reason="MindFormers is not installed")
    if reason := why_impossible():
        pytest.skip(reason)
    root = Path(__file__).parents[2]
    path = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    environ = {k: v for k, v in os.environ.items() if k != "ASCEND_HOME_PATH"}
    environ |= {"PYTHONPATH": path, "MISTRAL_MS_CACHE": str(tmp_path_factory.mktemp("cache"))}
    found, logs = {}, tmp_path_factory.mktemp("logs")
    with Compiler(find_runtime(environ), environ) as compiler:
        for layout, rank, world in (("expert", 1, 2), ("pipeline", 2, 4)):
            request = Request(rank, world, target=f"support.mindformers_target:{layout}")
            with compiler.compiled(request, logs, 300) as compiled:
                text = compiled.graph.read_text(errors="replace")
                found[layout] = read(text, rank, world, compiled.groups)
    return found


def exchanges(graph) -> Counter:
    found = Counter()
    for each in graph.communication:
        if each.operator == "AlltoAll":
            found[str(each.phase), each.ranks, each.nbytes] += each.times
    return found


def test_two_exchanges_forward_and_two_backward_per_layer(graphs):
    layers, size = LAYERS["expert"], E * C * H * HALF
    assert exchanges(graphs["expert"]) == {
        ("forward", (0, 1), size): 2 * layers,
        ("backward", (0, 1), size): 2 * layers,
    }


def test_each_micro_batch_of_a_stage_has_its_own(graphs):
    layers, size = 1, E * C * H * HALF
    assert exchanges(graphs["pipeline"]) == {
        ("forward", (2, 3), size): 2 * layers * MICRO,
        ("backward", (2, 3), size): 2 * layers * MICRO,
    }
    neighbours = Counter()
    for each in graphs["pipeline"].communication:
        if each.operator in ("Send", "Receive"):
            neighbours[each.operator, str(each.phase), each.peer] += each.times
    assert neighbours == {("Receive", "forward", 0): MICRO, ("Send", "backward", 0): MICRO}


def test_the_norm_is_of_all_stages(graphs):
    """One sum of one number over the world, at the end of each step."""
    for layout, world in (("expert", 2), ("pipeline", 4)):
        ranks = tuple(range(world))
        sums = [
            each
            for each in graphs[layout].communication
            if each.operator == "AllReduce" and each.ranks == ranks and each.nbytes == 4
        ]
        assert sums, layout


def test_a_rank_holds_its_experts(graphs):
    held = graphs["expert"].parameters["layers.0.moe.experts.w1"]
    assert held.shape == (E // 2 * H, WIDE)


def test_inputs_are_those_of_the_whole_batch():
    """Against loops; padding at the end, its id inside, and labels that do not count."""
    pytest.importorskip("mindformers", reason="MindFormers is not installed")
    from mistral_ms.mindformers.graph import WholeBatch

    ids = np.array([[5, 6, 0, 7, 8], [9, 4, 3, 0, 0], [3, 3, 3, 3, 3]], np.int32)
    labels = ids.copy()
    labels[2, :3] = -100
    inputs = Tensor(np.float32(1024.0)), Tensor(ids), Tensor(labels)
    tokens, targets, positions, segments, scales, random = (
        each.asnumpy() for each in WholeBatch(4, 0, -100)(*inputs)
    )
    assert np.array_equal(tokens, ids[:, :-1])
    counted = present = 0
    for row in range(3):
        length = 1 + max(i for i in range(4) if ids[row, i])
        for i in range(4):
            expected = labels[row, i + 1] if ids[row, i] else -100
            assert targets[row, i] == expected
            assert positions[row, i] == (i if i < length else -1)
            counted += expected != -100
            present += i < length
    assert np.allclose(scales, [[1 / counted, 1 / present, 1024.0]] * 3, rtol=1e-6)
    assert not segments.any() and not random.any()
    assert random.shape == scales.shape == (3, 3)
