"""``inspect`` as a user types it."""

import json
import sys

import numpy as np
import pytest

from mistral_ms.checkpoint import convert, our_shapes, save_native
from mistral_ms.cli import main
from mistral_ms.config import ModelConfig, MoEArchitecture


@pytest.fixture
def ours(tmp_path):
    config = ModelConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=6,
        moe=MoEArchitecture(num_local_experts=3, sparse_layers=(1, 3)),
    )
    zeros = [(n, s, "float16", np.zeros(s, np.float16)) for n, s in our_shapes(config).items()]
    save_native(tmp_path / "ours", config, zeros, {"tokenizer.model": b"pieces"})
    return tmp_path / "ours"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command line in this process; returns exit code, stdout and stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["run_mixtral.py", "inspect", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "300")
        with pytest.raises(SystemExit) as info:
            main()
        captured = capsys.readouterr()
        return info.value.code or 0, captured.out, captured.err

    return call


def test_a_sound_checkpoint(ours, run):
    code, out, _ = run(ours)
    assert code == 0
    for words in (
        "mistral_ms",
        "4 layers, hidden 8, intermediate 12, heads 2/1, head_dim 4, vocabulary 11",
        "3 experts, top 2, sparse layers [1, 3], window 6",
        "F16",
        "COMPLETE lists 4 files",
        "not verified",
        "tokenizer.model",
    ):
        assert words in out
    assert out.splitlines()[-1] == "sound"


def test_tensors_are_listed_on_request(ours, run):
    line = "layers.1.moe.experts.w1  [3, 12, 8]  F16  model-00001-of-00001.safetensors"
    assert line not in run(ours)[1].splitlines()
    assert line in run(ours, "--tensors")[1].splitlines()


def test_verify_finds_a_flipped_bit(ours, run, tmp_path):
    assert "verified" in run(ours, "--verify")[1]
    shard = ours / "model-00001-of-00001.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    code, out, _ = run(ours, "--verify", "--json", tmp_path / "j")
    assert (code, "problem: wrong checksum: " in out) == (1, True)
    assert json.loads((tmp_path / "j").read_text())["ok"] is False


def test_damage_is_exit_code_1_and_said(ours, run):
    (ours / "COMPLETE").unlink()
    code, out, _ = run(ours)
    assert (code, "problem: incomplete checkpoint: " in out) == (1, True)
    assert "mistral_ms" in out


def test_json_tells_it_all(ours, run, tmp_path):
    run(ours, "--json", tmp_path / "j", "--tensors")
    data = json.loads((tmp_path / "j").read_text())
    assert (data["kind"], data["ok"], data["problem"]) == ("mistral_ms", True, None)
    assert data["config"]["num_hidden_layers"] == 4
    assert data["bytes"] == 2 * data["parameters"] == data["dtypes"]["F16"]
    assert len(data["tensor_list"]) == data["tensors"]


def test_from_chooses_a_format(ours, run, tmp_path):
    config = ModelConfig(
        vocab_size=3,
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    zeros = [(n, s, "float32", np.zeros(s, np.float32)) for n, s in our_shapes(config).items()]
    save_native(tmp_path / "dense", config, zeros)
    convert(tmp_path / "dense", tmp_path / "both", "hf")
    convert(tmp_path / "dense", tmp_path / "m", "mistral")
    for file in (tmp_path / "m").iterdir():
        (tmp_path / "both" / file.name).write_bytes(file.read_bytes())
    code, out, _ = run(tmp_path / "both")
    assert (code, "two formats in one directory" in out) == (1, True)
    code, out, _ = run(tmp_path / "both", "--from", "mistral")
    assert (code, "Mistral (dense)" in out) == (0, True)


def test_a_path_that_is_not_there_is_exit_code_2(run, tmp_path):
    code, _, err = run(tmp_path / "nowhere")
    assert (code, err.startswith("error: no such directory: ")) == (2, True)
