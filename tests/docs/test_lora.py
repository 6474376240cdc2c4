"""The commands of docs/lora.md, one after the other, as a reader would type them."""

import re
import shlex
from pathlib import Path

import pytest
from support.commands import run
from support.hf import make_pair

import mistral_ms
from mistral_ms.checkpoint import inspect
from mistral_ms.tokenizer import copy_files, packaged_tokenizer

ROOT = Path(mistral_ms.__file__).parents[1]
PAGE = (ROOT / "docs" / "lora.md").read_text()
SHORTER = {
    "train": "training.max_steps=2 training.seq_length=8 training.global_batch_size=4",
    "generate": "--max-new-tokens 2 --pynative",
}
"""What is added, for a test to end in seconds."""


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.M | re.S)


@pytest.mark.slow
def test_the_page_runs(tmp_path, monkeypatch):
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_local_experts=4)
    pair = make_pair("mixtral", vocab_size=32000, **sizes)
    pair.hf.save_pretrained(tmp_path / "demo" / "hf")
    copy_files(packaged_tokenizer(), tmp_path / "demo" / "hf")
    monkeypatch.chdir(tmp_path)
    said = {}
    for line in blocks("bash")[0].splitlines():
        _, _, command, *arguments = shlex.split(line.replace(" configs/", f" {ROOT}/configs/"))
        done = run(command, *arguments, *SHORTER.get(command, "").split(), cwd=tmp_path)
        assert done.returncode == 0, (line, done.stderr)
        said[command] = done.stdout
    assert "LoRA, r 8, alpha 16, on gate, k_proj" in " ".join(said["inspect"].split())
    assert said["generate"].startswith("The sparse layer")
    assert "perplexity" in said["evaluate"]
    assert inspect(tmp_path / "merged").kind == "hf"
    names = {"AutoModelForCausalLM": mistral_ms.AutoModelForCausalLM}
    for block in blocks("python"):
        exec(block, names)
