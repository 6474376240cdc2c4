"""``data`` as a user types it."""

import json
import sys

import pytest

from mistral_ms.cli import main
from mistral_ms.datasets import read_info, verify
from mistral_ms.tokenizer import copy_files, packaged_tokenizer


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs a command line in this process; returns exit code, stdout and stderr."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["run_mixtral.py", "data", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "300")
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit) as info:
            main()
        captured = capsys.readouterr()
        return info.value.code or 0, captured.out, captured.err

    return call


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    copy_files(packaged_tokenizer("v3"), path)
    return path


@pytest.fixture
def corpus(tmp_path):
    (tmp_path / "a.txt").write_text("one line\n\nanother line\n")
    answered = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    lines = ['{"text": "jsonl"}', json.dumps({"messages": answered}), "{", '{"text": 5}', "{"]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    return tmp_path / "a.txt", tmp_path / "b.jsonl"


def test_every_option(run, corpus, checkpoint, tmp_path):
    code, out, err = run(
        *corpus, "--tokenizer", checkpoint, "--seq-length", 3, "--output", "o", "--json", "r.json",
        "--boundaries", "attention", "--split-lines", "--no-bos", "--no-eos", "--skip-bad",
        "--drop-last",
    )  # fmt: skip
    assert (code, err) == (0, "")
    info = verify(tmp_path / "o")
    assert info.config.model_dump() == {
        "seq_length": 3,
        "boundaries": "attention",
        "add_bos": False,
        "add_eos": False,
        "split_lines": True,
        "skip_bad": True,
        "drop_last": True,
        "format": None,
        "chat_template": None,
    }
    counts = info.counts
    assert counts.documents == 4  # two lines, a text, a conversation
    assert counts.skipped == {"not JSON": 2, "wrong type": 1}
    assert f"4 documents, {counts.tokens} tokens -> {counts.sequences} sequences of 3 in o\n" in out
    assert f"last sequence: {counts.dropped} tokens dropped" in out
    assert f"skipped 2 documents, not JSON; the first: {corpus[1]}, line 3\n" in out
    assert "skipped 1 documents, wrong type" in out
    result = json.loads((tmp_path / "r.json").read_text())
    assert result.pop("seconds") > 0
    assert result == {
        "output": "o",
        **counts.model_dump(),
        "seq_length": 3,
        "boundaries": "attention",
        "vocab_size": 32768,
        "tokenizer_sha256": info.vocabulary.sha256,
        "files": 3,
        "bytes": sum(file.size for file in info.files),
    }


def test_defaults_and_overwriting(run, corpus, checkpoint, tmp_path):
    model = next(p for p in checkpoint.iterdir() if p.name.startswith("tokenizer.model"))
    line = (corpus[0], "--tokenizer", model, "--seq-length", 64, "--output", "o")
    code, out, _ = run(*line)
    info = read_info(tmp_path / "o")
    assert (code, info.config.boundaries, info.counts.sequences) == (0, "loss", 1)
    assert f"last sequence: {info.counts.padded} places padded" in out
    code, _, err = run(*line)
    assert code == 2
    assert "error: target exists: o: nothing is overwritten unasked: pass --overwrite" in err
    assert run(*line, "--overwrite")[0] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": "b.jsonl"}, "error: not JSON: b.jsonl, line 3: "),
        ({"inputs": "none.txt"}, "error: cannot read: none.txt: No such file or directory"),
        ({"tokenizer": "."}, "error: no tokenizer: .: needs one of tokenizer.model"),
        ({"seq_length": 0}, "error: invalid configuration: data: seq_length: 0: Input should be"),
        ({"output": "a.txt"}, "error: target exists: a.txt"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(changes, message, run, corpus, checkpoint, tmp_path):
    before = sorted(p.name for p in tmp_path.iterdir())
    values = {"inputs": "a.txt", "tokenizer": checkpoint, "seq_length": 4, "output": "o"} | changes
    code, _, err = run(
        values["inputs"], "--tokenizer", values["tokenizer"],
        "--seq-length", values["seq_length"], "--output", values["output"],
    )  # fmt: skip
    assert code == 2
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == before
