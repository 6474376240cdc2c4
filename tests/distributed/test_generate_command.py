"""``generate`` by the launcher, ``align`` by msrun: one voice, Hugging Face's tokens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed.harness import run_job
from support.hf import save_with_tokenizer
from support.ports import free_port

from mistral_ms.tokenizer import packaged_tokenizer

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "msrun_generate.sh"
NEW = 6


def together(root, *arguments):
    """A job of two processes; what it said."""
    command = [
        str(SCRIPT), "--workers", "2", "--port", str(free_port()), "--join-limit", "60",
        "--log-dir", str(root / "logs"), *map(str, arguments),
    ]  # fmt: skip
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    return subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf")
    return path, save_with_tokenizer(path)


def test_generate_with_experts_and_data_divided(model, tmp_path):
    """An uneven number of prompts. With stages: generating.py."""
    path, pair = model
    done = together(
        tmp_path, "--dp", 2, "--ep", 2, "--", path, "--prompt", "The harbour",
        "--prompt", "Eight workshops share", "--prompt", "Which", "--max-new-tokens", NEW,
        "--json", "out.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    outputs = json.loads((tmp_path / "out.json").read_text())["outputs"]
    assert len(outputs) == 3
    tokenizer = packaged_tokenizer()
    pair.hf.config.output_router_logits = False
    for shown in outputs:
        ids = tokenizer.encode(shown["prompt"])
        expected = pair.hf.generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False)
        assert shown["token_ids"] == expected[0, len(ids) :].tolist()
        assert done.stdout.count(shown["prompt"] + shown["text"]) == 1


def align(root, workers, *arguments):
    """A job that compares; its launcher is shown above and in tests/launch."""
    command = (str(ROOT / "run_mixtral.py"), "align", *map(str, arguments))
    return run_job(workers, root, "align", *command, "--max-new-tokens", "0", timeout=300)


def test_align_with_matrices_divided(model, tmp_path):
    job = align(tmp_path, 2, model[0], "--mp", 2, "--json", "a.json")
    assert job.code == 0, job.said
    assert job.said.splitlines().count("aligned") == 1
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["routing_agreement"] == found["top1_agreement"] == 1
    assert 0 < found["max_abs_diff"] < 1e-4


def test_the_first_rank_tells_of_a_defect_in_the_second_stage(model, tmp_path, monkeypatch):
    # so long msrun's scheduler waits for the rank that is ended when the other one has failed
    monkeypatch.setenv("MS_NODE_TIMEOUT", "15")
    path, pair = model
    with torch.no_grad():
        saved = pair.hf.model.layers[1].post_attention_layernorm.weight.clone()
        pair.hf.model.layers[1].post_attention_layernorm.weight[0] += 0.5
        pair.hf.save_pretrained(tmp_path / "bad")
        pair.hf.model.layers[1].post_attention_layernorm.weight.copy_(saved)
    job = align(tmp_path, 2, path, tmp_path / "bad", "--pp", 2)
    assert job.ending == "exit code 1", job.said
    assert "first part at: layer 1 feed-forward" in job.said
