"""The commands as users call them, in processes of their own."""

import json
from pathlib import Path

import pytest
import torch
from support import commands
from support.hf import save_with_tokenizer
from support.links import link_files

from mistral_ms.checkpoint import convert
from mistral_ms.tokenizer import packaged_tokenizer


def run(*args, stdin=""):
    return commands.run(*args, cwd=Path.cwd(), stdin=stdin, COLUMNS="120")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("hf")
    return path, save_with_tokenizer(path)


def test_generate_streams_and_writes_json(model, tmp_path):
    path, pair = model
    out = run(
        "generate", path, "--prompt", "The harbour", "--prompt", "Eight",
        "--max-new-tokens", 6, "--json", tmp_path / "o.json",
    )  # fmt: skip
    assert out.returncode == 0, out.stderr
    result = json.loads((tmp_path / "o.json").read_text())
    assert result["prefill_tokens_per_s"] > 0 and result["decode_tokens_per_s"] > 0
    tokenizer = packaged_tokenizer()
    pair.hf.config.output_router_logits = False
    for shown in result["outputs"]:
        ids = tokenizer.encode(shown["prompt"])
        expected = pair.hf.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)
        assert shown["token_ids"] == expected[0, len(ids) :].tolist()
        assert len(shown["logprobs"]) == len(shown["token_ids"])
        assert shown["prompt"] + shown["text"] in out.stdout


@pytest.fixture(scope="module")
def linked(model, tmp_path_factory):
    """The same as links to its files, which lie elsewhere."""
    return link_files(model[0], tmp_path_factory.mktemp("links") / "linked")


def test_links_to_elsewhere_need_the_option(linked):
    out = run("generate", linked, "--prompt", "x")
    assert out.returncode == 2
    assert "file outside the checkpoint" in out.stderr


def test_chat_loop_remembers_resets_and_ends(linked):
    out = run("generate", linked, "--follow-links", "--interactive", "--max-new-tokens", 3,
              "--chat-template", "mistral",
              stdin="Hello\n/reset\nAgain\n/exit\n")  # fmt: skip
    assert out.returncode == 0, out.stderr
    assert "(forgotten)" in out.stdout
    assert out.stdout.count("> ") == 4


def damaged_record(path, ours):
    """A checkpoint of ours that differs from its digests and in nothing else."""
    convert(path, ours)
    manifest = json.loads((ours / "COMPLETE").read_text())
    for record in manifest["files"].values():
        record["sha256"] = "0" * 64
    (ours / "COMPLETE").write_text(json.dumps(manifest))
    return ours


def test_align_says_aligned_and_then_where_not(model, linked, tmp_path):
    path, pair = model
    damaged = damaged_record(path, tmp_path / "ours")
    good = run("align", linked, damaged, "--follow-links", "--no-verify", "--max-new-tokens", 4,
               "--execution", "graph", "--json", tmp_path / "a.json")  # fmt: skip
    assert good.returncode == 0, good.stdout + good.stderr
    assert "aligned" in good.stdout
    keys = {"max_abs_diff", "mean_abs_diff", "top1_agreement", "routing_agreement",
            "greedy_match", "tokens"}  # fmt: skip
    assert set(json.loads((tmp_path / "a.json").read_text())) == keys
    with torch.no_grad():
        pair.hf.model.layers[1].post_attention_layernorm.weight[0] += 0.5
    pair.hf.save_pretrained(tmp_path / "bad")
    bad = run("align", path, tmp_path / "bad", "--max-new-tokens", 0)
    assert bad.returncode == 1
    assert "first part at: layer 1 feed-forward" in bad.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("generate", "nowhere", "--prompt", "x"), "nowhere"),
        (("generate", "nowhere"), "give --prompt"),
        (("generate", "nowhere", "--interactive", "--json", "f"), "--json goes with --prompt"),
        (("generate", "nowhere", "--prompt", "x", "--execution", "own"), "explicit"),
        (("align", "nowhere"), "nowhere"),
        (("no-such-command",), "No such command"),
    ],
)
def test_bad_input_exits_with_2(args, message):
    out = run(*args)
    assert out.returncode == 2
    assert message in out.stderr
    assert "Traceback" not in out.stderr
