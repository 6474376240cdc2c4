"""The acceptance script: agrees on the twin, notices wrong results, knows the bytes."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from kernels.operators.routes import route
from kernels.support import twin

SCRIPT = Path(__file__).parents[2] / "scripts" / "kernels_acceptance.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("kernels_acceptance", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def on_twin(script, monkeypatch):
    """The script with the library that these tests have built already."""
    from mistral_ms.ops.custom import library

    monkeypatch.setattr(library, "_chosen", [])
    monkeypatch.setattr(script, "build_twin", lambda: twin.build().path)
    return script


def test_agrees_on_the_twin_and_says_that_no_npu_was_there(on_twin, tmp_path, capsys):
    written = tmp_path / "results.json"
    assert on_twin.main(["--json", str(written)]) == 0
    text = capsys.readouterr().out
    assert text.startswith("No NPU here: results are compared on the CPU twin, nothing is timed.")
    assert "DIFFERS" not in text
    assert "agree on the CPU twin; no NPU has run them" in text
    results = json.loads(written.read_text())
    assert results["device"] == "cpu twin"
    assert results["timings"] == []
    assert len(results["comparisons"]) == 75
    assert all(one["agrees"] for one in results["comparisons"])


def test_a_wrong_result_is_told_and_fails(on_twin, monkeypatch, capsys):
    class Wrong(on_twin.custom.Unpermute):
        def construct(self, y_EC_H, weights_TK, *table):
            return super().construct(y_EC_H, weights_TK * 1.001, *table)

    monkeypatch.setattr(on_twin.custom, "Unpermute", Wrong)
    assert on_twin.main([]) == 1
    text = capsys.readouterr().out
    assert "DIFFERS  combine " in text
    assert "DIFFERS  dispatch " not in text


def test_nan_does_not_pass_for_agreement(script):
    assert not script.Check("x", "float32", float("nan"), 1.0).agrees


def test_its_bytes_are_those_that_the_twin_counts(script):
    """With every choice kept, as the script assumes; capacity is read twice by design."""
    T, K, E, H = 120, 2, 8, 256
    r = route(0, T, K, E, T)
    s = script.Sizes(T, H, E, K, r.capacity)
    least = script.least_bytes(s, row_bytes=4 * H)
    x = np.zeros((T, H), np.float32)
    rows = np.zeros((E, r.capacity, H), np.float32)
    scales = np.zeros((T, K), np.float32)
    places = {"expanded_row_idx": r.places.rows_Q}
    tables = {"slot_src": r.places.sources_S} | places
    logits = np.zeros((T, E), np.float32)
    sizes = {"expert_num": E, "expert_capacity": r.capacity}
    calls = {
        "dispatch": ({"x": x} | tables, sizes | {"k": K}),
        "dispatch_grad": ({"d_expanded_x": rows} | places, {"k": K}),
        "combine": ({"expanded_x": rows} | places | {"scales": scales}, {}),
        "combine_grad": ({"dy": x, "expanded_x": rows} | tables | {"scales": scales}, {}),
        "gating_top_k": ({"x": logits}, {"k": K}),
        "gating_top_k_grad": (
            {"x": logits, "expert_idx": np.zeros((T, K), np.int32), "dy": scales,
             "d_softmax_out": logits}, {"k": K},
        ),
    }  # fmt: skip
    for name, (inputs, attrs) in calls.items():
        counters = twin.run(f"moe_{name}", inputs, attrs, blocks=3).counters
        assert counters["read_bytes"] + counters["write_bytes"] == least[name], name
    chosen = {"expert_idx": np.zeros((T, K), np.int32)}
    counters = twin.run("moe_expert_capacity", chosen, sizes, blocks=1).counters
    moved = counters["read_bytes"] + counters["write_bytes"]
    assert moved - least["expert_capacity"] == 2 * E * 4  # its own counters, out and back


def test_the_readme_states_these_bytes(script):
    text = (SCRIPT.parents[1] / "ascend_kernels" / "README.md").read_text()
    least = script.least_bytes(script.Sizes(8192, 4096, 8, 2, 2253), row_bytes=2 * 4096)
    rows = {
        "MoeGatingTopK": "gating_top_k",
        "MoeGatingTopKGrad": "gating_top_k_grad",
        "MoeDispatch with expanded_row_idx": "dispatch",
        "MoeDispatchGrad": "dispatch_grad",
        "MoeCombine": "combine",
        "MoeCombineGrad": "combine_grad",
    }
    for title, name in rows.items():
        line = next(line for line in text.splitlines() if line.startswith(f"| {title} | "))
        megabytes, memory = line.split("|")[2], line.split("|")[4]
        digits = 2 if least[name] < 1e6 else 1
        assert megabytes.strip() == f"{least[name] / 1e6:.{digits}f} MB"
        seconds = least[name] / script.BANDWIDTH
        digits = 1 if seconds < 1e-6 else 0
        assert memory.strip() == f"{seconds * 1e6:.{digits}f} us"
