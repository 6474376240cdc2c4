"""The demo as a user runs it, shortened; its export in transformers."""

import base64
import io
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from mindspore import Tensor

from mistral_ms.checkpoint import detect, open_checkpoint
from mistral_ms.checkpoint.load import load_weights
from mistral_ms.data import demo_text
from mistral_ms.models import CausalLM
from mistral_ms.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
STEPS = 30
TOLERANCE = 2e-5
"""Of the largest logit: what alignment promises in float32."""


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """One run in a process of its own, from a directory of its own."""
    root = tmp_path_factory.mktemp("demo")
    command = [sys.executable, str(ROOT / "run_mixtral.py"), "demo", "--steps", str(STEPS)]
    done = subprocess.run(
        [*command, "--output", "out", "--json", "result.json"],
        cwd=root,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return SimpleNamespace(
        root=root,
        out=root / "out",
        stdout=done.stdout,
        stderr=done.stderr,
        result=json.loads((root / "result.json").read_text()),
    )


def test_leaves_nothing_behind_but_its_directory(demo):
    assert {path.name for path in demo.root.iterdir()} == {"out", "result.json"}
    assert {path.name for path in demo.out.iterdir()} - {"backend.log"} == {
        "report.html",
        "metrics.jsonl",
        "figures",
        "checkpoint",
        "hf",
        "returned",
    }


def test_tells_what_it_does_and_nothing_else(demo):
    assert demo.stderr == ""
    for said in ("training 10.6 million", f"step {STEPS} of {STEPS}", "saving", "exporting"):
        assert said in demo.stdout
    assert "WARNING" not in demo.stdout
    assert "FAILED" not in demo.stdout
    assert len(demo.stdout.splitlines()) < 60


def test_the_result_holds_summary_and_checks(demo):
    result = demo.result
    assert (result["steps"], result["world_size"], result["passed"]) == (STEPS, 1, True)
    assert abs(result["first_lm_loss"] - math.log(32000)) < 0.1
    # 30 steps learn which tokens are frequent: the entropy of single tokens is near 6
    assert result["final_lm_loss"] < 7.5
    assert result["tokens_per_s"] > 0
    assert len(result["checks"]) == 4
    assert all(check["passed"] for check in result["checks"])
    assert result["text_tokens"] > 3000
    assert (
        len(result["token_ids"]) + len(load_tokenizer(demo.out / "hf").encode(result["prompt"]))
        == 64
    )


def test_one_record_a_step(demo):
    records = [json.loads(line) for line in (demo.out / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert records[0]["lm_loss"] == demo.result["first_lm_loss"]
    assert records[-1]["lm_loss"] == demo.result["final_lm_loss"]
    for record in records:
        assert np.shape(record["expert_load"]) == (2, 8)
        assert np.allclose(np.sum(record["expert_load"], -1), 1, atol=1e-5)
        assert 0 <= record["dropped_fraction"] < 1
        # an expert has ceil(1.1 * 2 * 512 / 8) = 141 slots; what it is asked beyond is dropped.
        # Of 3921 predicted tokens 17 are in the last sequence, so a batch has 512 or 465.
        load = np.array(record["expert_load"])
        dropped = [np.maximum(0, load - 141 / (2 * n)).sum(-1).mean() for n in (512, 465)]
        assert min(abs(record["dropped_fraction"] - d) for d in dropped) < 1e-4


def test_the_page_shows_pictures_checks_and_text(demo):
    from matplotlib.image import imread

    page = (demo.out / "report.html").read_text()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 3
    for picture in pictures:
        image = imread(io.BytesIO(base64.b64decode(picture)))
        assert image.shape[1] >= 1000
        assert image.std() > 0.01
    files = {path.name: path.read_bytes() for path in (demo.out / "figures").iterdir()}
    assert set(files) == {"loss.png", "expert_load.png", "dropped.png"}
    assert sorted(files.values()) == sorted(map(base64.b64decode, pictures))
    assert page.count('class="passed"') == 4
    assert 'class="failed"' not in page
    assert demo.result["prompt"] in page
    assert "http" not in page, "the page must not need the network"


def test_three_checkpoints_of_the_kinds_they_should_be(demo):
    kinds = {name: detect(demo.out / name) for name in ("checkpoint", "hf", "returned")}
    assert kinds == {"checkpoint": "mistral_ms", "hf": "hf", "returned": "mistral_ms"}


@pytest.fixture(scope="module")
def ids(demo):
    """The beginning of the text."""
    return load_tokenizer(demo.out / "checkpoint").encode(demo_text())[:96]


class TestInTransformers:
    def test_the_export_computes_our_logits(self, demo, ids):
        import torch
        from transformers import AutoModelForCausalLM

        hf = AutoModelForCausalLM.from_pretrained(demo.out / "hf", dtype=torch.float32)
        with torch.no_grad():
            want = hf(torch.tensor([ids])).logits.numpy()
        with open_checkpoint(demo.out / "checkpoint") as source:
            model = CausalLM(source.config)
            load_weights(source, model.weights())
        positions = np.arange(len(ids), dtype=np.int32)
        got = model(Tensor(np.array([ids], np.int32)), Tensor(positions[None])).asnumpy()
        assert np.abs(want).max() > 5, "a trained model has opinions"
        assert np.abs(got - want).max() <= TOLERANCE * np.abs(want).max()

    def test_its_tokenizer_reads_the_text_as_ours_does(self, demo, ids):
        from transformers import AutoTokenizer

        theirs = AutoTokenizer.from_pretrained(demo.out / "hf")
        assert theirs(demo_text())["input_ids"][:96] == ids
