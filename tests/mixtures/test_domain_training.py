"""Random routed experts as a run: domains of files, a table that stays, a domain evaluated."""

import json
import shutil
import sys
from contextlib import nullcontext

import numpy as np
import pytest
from mindspore import Tensor
from support.models import fill

from mistral_ms.checkpoint import open_checkpoint
from mistral_ms.cli import main
from mistral_ms.config import IGNORE_INDEX, load_run_config
from mistral_ms.errors import ConfigError
from mistral_ms.mixtures.domains import DomainLM, extract_domain
from mistral_ms.training import TrainingRun, evaluate, read_metrics
from mistral_ms.training import run as training_run
from mistral_ms.training import step as training_step

TEXTS = (
    "The town by the river has two bridges and a market on Mondays. " * 6,
    "def add(a, b): return a + b\nfor i in range(9): print(add(i, i))\n" * 5,
    "import sys\nwhile True: sys.stdout.write('x')\n" * 4,
)
DOMAINS = (1, 0, 0)
TABLE = "layers.0.moe.router.expert_of_token"


@pytest.fixture
def run_file(tmp_path, monkeypatch):
    """Two domains of two experts, texts of both in the same batches."""
    monkeypatch.setattr(training_step, "graph_mode", nullcontext)
    monkeypatch.setattr(evaluate, "graph_mode", nullcontext)
    monkeypatch.setattr(training_run, "write_figures", lambda *_: None)  # they take seconds
    names = [f"text-{number}.txt" for number in range(len(TEXTS))]
    for name, text in zip(names, TEXTS, strict=True):
        (tmp_path / name).write_text(text)
    values = {
        "model": {
            "vocab_size": 32000, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16,
            "initializer_range": 0.3, "torch_dtype": "float32",
            "moe": {
                "num_local_experts": 4, "num_experts_per_tok": 1, "norm_topk_prob": False,
                "gate": {"name": "random_routed", "domains": 2},
            },
        },
        "data": {"inputs": names, "domains": DOMAINS, "tokenizer": "packaged-v1"},
        "routing": {"policy": "dropless"},
        "training": {
            "max_steps": 4, "seq_length": 16, "global_batch_size": 4,
            "gradient_accumulation_steps": 2, "optimizer": {"learning_rate": 0.05},
        },
        "checkpoint": {"save_steps": 2},
    }  # fmt: skip
    path = tmp_path / "domains.yaml"
    path.write_text(json.dumps(values))
    return path


def read(path):
    with open_checkpoint(path) as source:
        return source.config, {name: source.read(name) for name in source.names()}


def loss(config, weights, batch, domains_B):
    """Of a model that is told the domains by another way, the mean by NumPy."""
    model = fill(DomainLM(config), weights)
    logits = model(*(Tensor(x) for x in (batch.ids_BS, batch.positions_BS, domains_B))).asnumpy()
    logs = logits.astype(float) - np.log(np.exp(logits.astype(float)).sum(-1, keepdims=True))
    counted = batch.labels_BS != IGNORE_INDEX
    chosen = np.take_along_axis(logs, np.where(counted, batch.labels_BS, 0)[..., None], -1)[..., 0]
    return -(chosen * counted).sum() / counted.sum()


def test_trains_resumes_extracts_evaluates(run_file, tmp_path, monkeypatch, capsys):
    run = load_run_config(run_file)
    started = TrainingRun(run, tmp_path / "run", resume=False, say=str)
    drawn = {name: weight.asnumpy().copy() for name, weight in started.update.held().items()}
    data = started.data
    started.execute()
    assert [path.name for path in sorted((tmp_path / "run" / "dataset").iterdir())] == [
        "domain-0", "domain-1",
    ]  # fmt: skip
    first = data.batch(0)
    assert {0, 1} == {int(d) for step in range(3) for d in data.batch(step).domains_B}
    want = loss(run.model, drawn, first, first.domains_B)
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert records[0].lm_loss == pytest.approx(want, rel=1e-5)
    assert abs(loss(run.model, drawn, first, 1 - first.domains_B) - want) > 1e-3

    last = tmp_path / "run" / "checkpoints" / "step-00000004"
    config, weights = read(last)
    np.testing.assert_array_equal(weights[TABLE], drawn[TABLE])
    for row in weights[TABLE]:
        np.testing.assert_array_equal(np.bincount(row.astype(int)), [16000, 16000])
    assert (weights[TABLE][0] != weights[TABLE][1]).any()
    changed = weights["layers.0.moe.experts.w1"] != drawn["layers.0.moe.experts.w1"]
    assert changed.any((1, 2)).all()

    shutil.copytree(tmp_path / "run", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000004")
    kept = load_run_config(tmp_path / "again" / "run.yaml")
    TrainingRun(kept, tmp_path / "again", resume=True, say=str).execute()
    _, resumed = read(tmp_path / "again" / "checkpoints" / "step-00000004")
    assert {n: v.tobytes() for n, v in resumed.items()} == {
        n: v.tobytes() for n, v in weights.items()
    }

    with open_checkpoint(last) as source:
        assert extract_domain(source, tmp_path / "one", 1).experts == 2
    place, report = tmp_path / "run" / "dataset" / "domain-1", tmp_path / "report.json"
    words = ["evaluate", tmp_path / "one", "--data", place, "--json", report]
    monkeypatch.setattr(sys, "argv", ["run_mixtral.py", *map(str, words)])
    with pytest.raises(SystemExit) as info:
        main()
    assert not info.value.code, capsys.readouterr().err
    own = [n for n in range(data.sequences) if data.read(np.array([n])).domains_B[0] == 1]
    rows = data.read(np.array(own, np.int32))
    found = json.loads(report.read_text())["loss"]
    assert found == pytest.approx(loss(config, weights, rows, rows.domains_B), rel=1e-5)
    words[1] = last
    monkeypatch.setattr(sys, "argv", ["run_mixtral.py", *map(str, words)])
    with pytest.raises(SystemExit) as info:
        main()
    assert info.value.code == 2
    said = capsys.readouterr().err
    assert "unknown domains" in said
    assert "construct" not in said, "nothing had been compiled"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.domains=[0, 1]", r"data\.domains has 2 numbers: one for each of data\.inputs .3."),
        ("data.domains=[0, 1, 2]", r"data\.domains \[0, 1, 2\]: the gate .* knows 0 to 1"),
        ("data.domains=[]", r"routes by 2 domains: data\.domains says"),
        ("model.moe.gate=hash_top_1", "the gate .* knows none"),
        (
            "evaluation={inputs: [x.txt], eval_steps: 1}",
            "evaluation is of models that know no domains",
        ),
    ],
)
def test_what_a_run_file_may_not_say(run_file, change, message):
    with pytest.raises(ConfigError, match=message):
        load_run_config(run_file, [change])
