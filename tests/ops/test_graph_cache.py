"""Graphs that are kept between runs: found again, and only where they are the same."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor

from mistral_ms.cache import CACHE_VARIABLE, cache_directory
from mistral_ms.ops import graph_cache, select
from mistral_ms.ops.graph_cache import _Description

ROOT = Path(__file__).parents[2]
STEPS = Path(__file__).with_name("graph_cache_steps.py")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A cache with the operators that were compiled before."""
    path = tmp_path_factory.mktemp("cache")
    if (operators := cache_directory() / "cpu_operators").is_dir():
        shutil.copytree(operators, path / "cpu_operators")
    return path


def run(cache, seed, tmp_path, script=(STEPS,), **variables):
    kept = {k: v for k, v in os.environ.items() if k != "MS_COMPILER_CACHE_ENABLE"}
    command = [sys.executable, *script, str(seed), tmp_path / "found.json"]
    environ = {**kept, CACHE_VARIABLE: str(cache), "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((tmp_path / "found.json").read_text())


def entries(cache):
    return {path.name: sorted(path.iterdir()) for path in (cache / "graphs").glob("[0-9a-f]*")}


def rms(eps, rows):
    x = np.arange(rows * 2.0).reshape(rows, 2)
    return (x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * [1.0, 2.0]).ravel()


@pytest.mark.slow
def test_a_second_process_takes_what_the_first_compiled(cache, tmp_path):
    """Whatever its weights are; shapes, constants and flags have entries of their own."""
    first = run(cache, 0, tmp_path)
    graphs = entries(cache)
    # three norms (the fourth is the first again), a training of two graphs, prefill and decode
    assert sorted(map(len, graphs.values())) == [2] * 5 + [3]  # MindSpore's own digest is with them
    for found, (eps, rows) in zip(
        first["norm"], ((1e-5, 3), (1e-5, 3), (0.5, 3), (1e-5, 2)), strict=True
    ):
        np.testing.assert_allclose(found, rms(eps, rows), rtol=1e-5)
    np.testing.assert_allclose(first["after"], rms(0.25, 3), rtol=1e-5)
    assert first["foreign"] is None
    assert first["error"]
    assert not first["usable"]  # after an error nothing more is kept
    assert first["streams"]

    # not a file: MindSpore's own cache would look for one
    second = run(cache, 1, tmp_path, ("-c", STEPS.read_text()))
    assert entries(cache) == graphs
    compiled = run(cache, 1, tmp_path, MS_COMPILER_CACHE_ENABLE="0")
    for each in ("norm", "train", "generate"):
        assert second[each] == compiled[each]
    assert second["train"] != first["train"]
    # of the processor's time, a tenth in practice: nothing was compiled
    assert second["seconds"] < 0.5 * compiled["seconds"]


def text(*values):
    return list(_Description().parts(list(values)))


def test_values_of_parameters_do_not_matter_and_all_else_does():
    weight = Parameter(Tensor([1.0, 2.0]), name="w")
    before = text(weight)
    weight.set_data(Tensor([3.0, 4.0]))
    assert text(weight) == before
    weight.requires_grad = False
    assert text(weight) != before
    assert text(Tensor([1.0])) != text(Tensor([2.0]))
    assert text(np.float32(1)) != text(1.0)
    assert text(1) != text(True)
    one, same, other = (select.rms_norm("reference", eps) for eps in (1e-5, 1e-5, 1e-6))
    assert text(one) == text(same) != text(other)
    assert text(one, one) != text(one, same)
    same.set_train()
    assert text(one) != text(same)
    assert text(ms.float32) != text(ms.float16)


def test_functions_are_told_apart_by_what_they_hold():
    kernel = {eps: select.rms_norm("cpu", eps) for eps in (1e-5, 1e-6)}
    assert text(kernel[1e-5]) != text(kernel[1e-6])


def test_what_is_not_known_is_not_kept():
    for value in (Path("a"), lambda: 1, text, object):
        described = graph_cache._digest([], [value])
        assert (described is None) == (value is not object)


def test_what_stands_for_the_main_script_imports_nothing():
    source = Path(graph_cache._NO_SCRIPT).read_text()
    assert source
    assert "import" not in source
