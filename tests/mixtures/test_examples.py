"""Each example in its short form: it runs, writes its files, and its exact claims hold."""

import importlib
import json

import pytest

CLAIMS = {
    "adaptive_mixture": lambda n: all(0 <= n[k]["accuracy"][0] <= 1 for k in n),
    "multi_gate_mixture": lambda n: len(set(n["parameters"].values())) == 3,
    "random_routed_experts": lambda n: n["largest difference, others scrambled"] == 0.0,
    "gates": lambda n: sum(isinstance(found, dict) for found in n.values()) == 3,
    "lstm_mixture": lambda n: sum("largest load over the mean" in str(n[k]) for k in n) == 3,
    "own_gate": lambda n: n["by angle"] != n["Mixtral's"],
    # rounding of float32: the weights 1/2 and 1/2 of two equal experts add up to their result
    "upcycling": lambda n: (
        n["largest difference before the first step, of the largest logit"] < 1e-5
    ),
    "lifelong_experts": lambda n: (
        n["largest change of a frozen expert"] == 0.0 and n["stages known"]["forgetting"][0] == 0.0
    ),
}


SLOW = (
    "random_routed_experts", "lifelong_experts", "lstm_mixture", "gates", "own_gate", "upcycling",
)  # fmt: skip
"""They take some seconds of processor time."""


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in CLAIMS]
)
def test_an_example(name, tmp_path):
    example = importlib.import_module(f"examples.{name}")
    numbers = example.main(tmp_path, short=True)
    assert CLAIMS[name](numbers), numbers
    assert json.loads((tmp_path / f"{name}.json").read_text()) == numbers
    assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
