"""``moe-lab``: two presets for two steps, and what is refused before anything is trained."""

import json
import sys
from contextlib import nullcontext

import numpy as np
import pytest

from mistral_ms.cli import main
from mistral_ms.cli.moe_lab import PRESETS, known, load_lab
from mistral_ms.config import when_unknown
from mistral_ms.errors import ConfigError
from mistral_ms.shipped import import_shipped
from mistral_ms.training import evaluate, read_metrics, step

when_unknown(import_shipped)  # as the command line does
SMALL = [
    "model.hidden_size=8", "model.intermediate_size=8", "model.num_attention_heads=2",
    "model.num_key_value_heads=2", "model.num_hidden_layers=2", "training.global_batch_size=2",
]  # fmt: skip


def test_two_presets_two_steps(tmp_path, monkeypatch, capfd):
    for module in (step, evaluate):
        monkeypatch.setattr(module, "graph_mode", nullcontext)
    out, report = tmp_path / "out", tmp_path / "numbers.json"
    words = ["moe-lab", "gshard", "mixtral", *SMALL, "--steps", 2, "--output", out]
    monkeypatch.setattr(sys, "argv", ["run_mixtral.py", *map(str, words), "--json", str(report)])
    with pytest.raises(SystemExit) as info:
        main()
    assert not info.value.code
    page, said = (out / "report.html").read_text(), capfd.readouterr().out
    for number, name in enumerate(("gshard", "mixtral"), 1):
        assert f"{number}/2  {name}" in said
        assert f'<th scope="row">{name}</th>' in page
        assert "step 2 of 2" in said
    assert page.count("data:image/png;base64,") == len(list((out / "figures").glob("*.png"))) == 4
    found = {each["name"]: each for each in json.loads(report.read_text())["presets"]}
    assert found["mixtral"]["dropped_fraction"] == 0
    for name, numbers in found.items():
        records = read_metrics(out / name / "metrics.jsonl")
        assert len(records) == 2
        assert numbers["training_loss"] == records[-1].lm_loss
        assert abs(numbers["evaluated_loss"] - np.log(32000)) < 0.2
        assert numbers["active_parameters"] < numbers["parameters"]
    # the same batches, and the same weights where both models have the same
    assert read_metrics(out / "gshard" / "metrics.jsonl")[0].lm_loss == pytest.approx(
        read_metrics(out / "mixtral" / "metrics.jsonl")[0].lm_loss, abs=0.05
    )
    with pytest.raises(SystemExit) as info:
        main()
    assert info.value.code == 2
    assert "output exists" in capfd.readouterr().err


def test_decoders_are_as_deep_as_the_deepest():
    lab = load_lab(["mixtral", "gshard"], [], 8)
    assert {run.model.num_hidden_layers for run in lab.runs.values()} == {4}
    assert {run.training.warmup_steps for run in lab.runs.values()} == {2}
    assert lab.runs["mixtral"].model.sparse_layers == (0, 1, 2, 3)
    assert lab.runs["gshard"].model.sparse_layers == (1, 3)


def test_all_presets_can_be_compared():
    """But that whose texts are of domains, which the evaluation of a comparison does not know."""
    others = [name for name in known() if name != "pangu_sigma"]
    assert len(load_lab(others, [], 4).runs) == len(known()) - 1 >= 22


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "nothing to compare"),
        (["gshart"], "no such preset: PRESET: gshart: .*perhaps gshard"),
        (["switch", "switch"], "one preset twice: PRESET: switch"),
        (["none.yaml"], "none.yaml"),
        (["pangu_sigma"], r"domains: .*pangu_sigma\.yaml: model\.moe\.gate: random_routed"),
    ],
)
def test_bad_names(names, message):
    with pytest.raises(ConfigError, match=message):
        load_lab(names, [], 4)


def test_presets_that_learn_in_another_way(tmp_path):
    text = (PRESETS / "switch.yaml").read_text()
    text = text.replace("../../mistral_ms", str(PRESETS.parents[1] / "mistral_ms"))
    other = tmp_path / "other.yaml"
    other.write_text(text.replace("learning_rate: 3.0e-3", "learning_rate: 1.0e-3"))
    with pytest.raises(ConfigError, match=r"other\.yaml: training\.optimizer.*give the value"):
        load_lab(["gshard", str(other)], [], 4)
    dense = tmp_path / "dense.yaml"
    dense.write_text(text)
    with pytest.raises(ConfigError, match=r"no experts: .*dense\.yaml"):
        load_lab([str(dense)], ["model.moe=null"], 4)
