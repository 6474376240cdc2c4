"""``convert`` as a user types it."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from mistral_ms.checkpoint import detect, inspect, our_shapes, save_native
from mistral_ms.cli import main, output
from mistral_ms.config import ModelConfig, MoEArchitecture

ROOT = Path(__file__).parents[2]


@pytest.fixture
def ours(tmp_path):
    config = ModelConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        moe=MoEArchitecture(num_local_experts=2),
    )
    rng = np.random.default_rng(0)
    tensors = [
        (name, shape, "bfloat16", rng.standard_normal(shape).astype(np.float32))
        for name, shape in our_shapes(config).items()
    ]
    save_native(tmp_path / "ours", config, tensors, {"tokenizer.model": b"pieces"})
    return tmp_path / "ours"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a command line in this process; returns exit code, stdout and stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["run_mixtral.py", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "300")
        with pytest.raises(SystemExit) as info:
            main()
        captured = capsys.readouterr()
        return info.value.code or 0, captured.out, captured.err

    return call


def test_round_trip_through_every_format(ours, run, tmp_path):
    chain = [
        ("hf", "hf"),
        ("mistral", "mistral"),
        ("mindformers", "mindformers", "--layout", "gmm", "--container", "ckpt"),
        ("mindspore", "mistral_ms"),
    ]
    source = ours
    for to, kind, *options in chain:
        code, out, _ = run("convert", source, tmp_path / to, "--to", to, *options)
        assert (code, detect(tmp_path / to)) == (0, kind)
        assert f"-> {tmp_path / to} ({kind}, dtype keep)" in out
        assert "wrote " in out
        source = tmp_path / to
    for name in ("model-00001-of-00001.safetensors", "tokenizer.model"):
        assert (source / name).read_bytes() == (ours / name).read_bytes()


def test_quantised_experts_are_measured_and_shown(ours, run, tmp_path):
    code, out, _ = run("convert", ours, tmp_path / "q", "--quantize", "int4", "--quantize-group", 4,
                       "--json", tmp_path / "j")  # fmt: skip
    assert code == 0
    error = json.loads((tmp_path / "j").read_text())["quantization_error"]
    assert 0.05 < error["mean"] <= error["worst"] < 0.2  # a step of seven for normal numbers
    assert "int4 (experts), a float32 scale for each 4 inputs: |W - read| / |W|" in out
    assert f"{error['worst']:.3%} at worst ({error['matrix']})" in out
    code, out, _ = run("inspect", tmp_path / "q")
    assert code == 0 and "int4 (experts), a float32 scale for each 4 inputs" in out and "U8" in out
    code, out, _ = run("convert", tmp_path / "q", tmp_path / "hf")
    assert code == 0 and "are dequantised while they are read" in out
    for options, message in (
        (["--quantize-group", 4], "option alone: --quantize-group"),
        (["--quantize", "int8", "--quantize-group", 4], "group_size is of int4"),
        (["--quantize", "int8", "--to", "hf"], "no quantised experts in this format"),
    ):
        code, _, error = run("convert", ours, tmp_path / "x", *options)
        assert code == 2 and message in error and not (tmp_path / "x").exists()


def test_ignored_keys_are_said(ours, run, tmp_path):
    run("convert", ours, tmp_path / "hf", "--to", "hf")
    file = tmp_path / "hf" / "config.json"
    keys = json.loads(file.read_text())
    file.write_text(json.dumps(keys | {"use_cache": True, "id2label": {}}))
    code, out, _ = run("convert", tmp_path / "hf", tmp_path / "again")
    assert code == 0
    assert f"ignored in the configuration of {tmp_path / 'hf'}" in out
    assert "without effect on the model: id2label, use_cache\n" in out


def test_the_default_target_is_hf_from_ours_and_ours_from_the_rest(ours, run, tmp_path):
    run("convert", ours, tmp_path / "one")
    run("convert", tmp_path / "one", tmp_path / "two")
    assert [detect(tmp_path / name) for name in ("one", "two")] == ["hf", "mistral_ms"]


def test_json_holds_exactly_the_promised_keys(ours, run, tmp_path):
    code, _, _ = run("convert", ours, tmp_path / "hf", "--dtype", "fp32", "--json", tmp_path / "j")
    result = json.loads((tmp_path / "j").read_text())
    assert code == 0
    assert list(result) == [
        "source_kind",
        "target_kind",
        "tensors",
        "bytes",
        "seconds",
        "peak_rss_bytes",
        "skipped",
        "quantization_error",
    ]
    assert (result["source_kind"], result["target_kind"]) == ("mistral_ms", "hf")
    assert result["bytes"] == 4 * inspect(ours).parameters


def test_an_existing_target_is_exit_code_2_and_overwrite_replaces_it(ours, run, tmp_path):
    run("convert", ours, tmp_path / "x")
    code, _, err = run("convert", ours, tmp_path / "x", "--to", "mistral")
    assert (code, detect(tmp_path / "x")) == (2, "hf")
    assert "error: target exists: " in err
    assert run("convert", ours, tmp_path / "x", "--to", "mistral", "--overwrite")[0] == 0
    assert detect(tmp_path / "x") == "mistral"


def test_from_chooses_between_two_formats(ours, run, tmp_path):
    run("convert", ours, tmp_path / "both", "--to", "hf")
    run("convert", ours, tmp_path / "m", "--to", "mistral")
    for file in (tmp_path / "m").iterdir():
        (tmp_path / "both" / file.name).write_bytes(file.read_bytes())
    code, _, err = run("convert", tmp_path / "both", tmp_path / "x")
    assert (code, "two formats in one directory" in err) == (2, True)
    code, out, _ = run("convert", tmp_path / "both", tmp_path / "x", "--from", "mistral")
    assert (code, "(mistral) -> " in out) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "gguf"], "--to"),
        (["--dtype", "int8"], "--dtype"),
        (["--run", "x"], "cannot read: x"),
        (["--run", "x", "--layout", "gmm"], "no choice of layout: --layout: gmm"),
        (["--container", "ckpt"], "no choice of container: container: 'ckpt'"),
    ],
)
def test_unknown_options_and_values_are_exit_code_2(ours, run, tmp_path, arguments, message):
    code, _, err = run("convert", ours, tmp_path / "x", *arguments)
    assert (code, message in err) == (2, True)
    assert not (tmp_path / "x").exists()


def test_a_source_that_is_not_there_is_one_line_on_stderr(run, tmp_path):
    code, out, err = run("convert", tmp_path / "nowhere", tmp_path / "x")
    assert (code, out) == (2, "")
    assert err.startswith("error: no such directory: ")
    assert "Traceback" not in err


def test_the_script_itself_runs_without_mindspore_or_torch(ours, tmp_path):
    """Seconds matter when one only wants to look: neither is imported for safetensors files."""
    script = (
        "import sys; sys.argv[0] = 'run_mixtral.py'\n"
        "from mistral_ms.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "print(sorted(m for m in ('torch', 'mindspore', 'transformers') if m in sys.modules))\n"
    )
    command = [sys.executable, "-c", script, "convert", str(ours), str(tmp_path / "hf")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert detect(tmp_path / "hf") == "hf"


def test_progress_in_a_log_is_lines_with_rate_and_time_left(monkeypatch, capsys):
    now = iter([0.0, 1.0, 10.0, 12.0, 20.5])
    monkeypatch.setattr(output, "time", SimpleNamespace(monotonic=lambda: next(now)))
    with output.byte_progress(Console(width=200), "converting") as progress:
        for done in (1, 20, 24, 41):
            progress(done * 10_000_000, 1_000_000_000)
    assert capsys.readouterr().out.splitlines() == [
        "converting: 200 MB of 1 GB, 20 MB/s, 40 s left",
        "converting: 410 MB of 1 GB, 20 MB/s, 30 s left",
    ]


def test_progress_on_a_terminal_is_a_bar(capsys):
    console = Console(force_terminal=True, width=120, color_system=None)
    with output.byte_progress(console, "converting") as progress:
        progress(500_000_000, 1_000_000_000)
    out = capsys.readouterr().out
    assert "converting" in out
    assert "0.5/1.0 GB" in out


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (93_400_000_000, "93.4 GB"), (5e12, "5 TB")],
)
def test_sizes(nbytes, text):
    assert output.size_text(nbytes) == text


def test_a_json_file_that_cannot_be_written_is_exit_code_2(ours, run, tmp_path):
    code, _, err = run("convert", ours, tmp_path / "x", "--json", tmp_path / "no" / "file")
    assert (code, "error: cannot write: --json " in err) == (2, True)


def test_upcycling(run, tmp_path):
    config = ModelConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    rng = np.random.default_rng(0)
    tensors = [
        (name, shape, "float32", rng.standard_normal(shape).astype(np.float32))
        for name, shape in our_shapes(config).items()
    ]
    save_native(tmp_path / "dense", config, tensors)
    dense, sparse = tmp_path / "dense", tmp_path / "sparse"
    code, _, _ = run("convert", dense, sparse, "--to", "mindspore", "--upcycle-experts", "3")
    found = inspect(sparse).config.moe
    assert (code, found.num_local_experts, found.num_experts_per_tok) == (0, 3, 2)
    for options, message in (
        (("--upcycle-experts", "2", "--upcycle-top-k", "3"), "must not exceed"),
        (("--upcycle-top-k", "3"), "option alone: --upcycle-top-k"),
        (("--upcycle-experts", "2", "--run", "x.yaml"), "two options that exclude each other"),
    ):
        code, _, err = run("convert", dense, tmp_path / "no", *options)
        assert code == 2
        assert message in err
