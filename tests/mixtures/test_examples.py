"""Each example in its short form: it runs, writes its files, and its exact claims hold."""

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mistral_ms.cli import main
from mistral_ms.config import load_run_config

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


ROOT = Path(__file__).parents[2]
CELLS = [
    cell
    for cell in json.loads((ROOT / "examples" / "from_hf_to_ascend.ipynb").read_text())["cells"]
    if cell["cell_type"] == "code"
]
COMMAND = "!python run_mixtral.py "


def source(cell):
    return "".join(cell["source"])


def output(cell):
    texts = [o["text"] for o in cell["outputs"] if o["output_type"] == "stream"]
    assert len(texts) == len(cell["outputs"]), "a result, a picture or an error"
    return "".join(line for text in texts for line in text)


def test_the_notebook_was_executed():
    """From its first cell to its last, in this order; no output names a path of that machine.

    To execute it again: ``jupyter nbconvert --execute --inplace``, in an environment that has the
    package.
    """
    assert [cell["execution_count"] for cell in CELLS] == [*range(1, len(CELLS) + 1)]
    for cell in CELLS:
        assert not re.search(r"(^|[^\w.])/\w", output(cell), re.M), output(cell)


@pytest.mark.slow
def test_the_notebook(tmp_path, monkeypatch):
    """All of its code but the dry run, with fewer steps, in this process."""
    for shared in ("configs", "mistral_ms", "run_mixtral.py"):
        (tmp_path / shared).symlink_to(ROOT / shared)
    monkeypatch.chdir(tmp_path)
    for variable in ("COLUMNS", "TTY_COMPATIBLE"):  # the first cell sets them
        monkeypatch.setenv(variable, "")
    names = {}
    for cell in CELLS:
        code = source(cell).replace("max_steps=30", "max_steps=2")
        code = code.replace("--max-new-tokens 8", "--max-new-tokens 0")
        if "dryrun" in cell["metadata"].get("tags", ()):
            continue
        if not code.startswith(COMMAND):
            exec(code, names)
            continue
        words = shlex.split(code.removeprefix(COMMAND).replace("\\\n", " "))
        monkeypatch.setattr(sys, "argv", ["run_mixtral.py", *words])
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code, words
    assert names["difference"] < 2e-5 * np.abs(names["wanted"]).max()  # the promise of align
    assert np.array_equal(names["ours"], names["same"].numpy())
    # the adapter here and merged in transformers: float32 on both sides, through two layers
    ids = names["ids"]
    with torch.no_grad():
        base, merged = (float(names[n](ids, labels=ids).loss) for n in ("theirs", "merged"))
    here = float(names["tuned"](ids.numpy(), labels=ids.numpy()).loss)
    assert here == pytest.approx(merged, rel=1e-5)
    assert merged < base
    assert load_run_config(Path("runs/notebook/best.yaml")).parallel.world == 32
