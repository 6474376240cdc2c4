"""A dataset is whole or absent, the same every time, and readable by MindSpore's own pipeline."""

import errno
import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from mistral_ms.config import DataConfig
from mistral_ms.config.token_counts import read_token_counts
from mistral_ms.datasets import (
    build,
    build_dataset,
    check_fit,
    directory,
    mindrecord,
    read_info,
    verify,
)
from mistral_ms.errors import DataError

GOOD = ({"text": "The harbour wakes."}, {"text": "Eight experts, two awake."})


def content(path):
    """Every byte below a directory, hidden siblings included."""
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.fixture
def make(tokenizer, tmp_path):
    def call(*inputs, output="out", overwrite=False, progress=None, **config):
        return build_dataset(
            inputs,
            tokenizer,
            DataConfig(**{"seq_length": 4, **config}),
            tmp_path / output,
            overwrite=overwrite,
            progress=progress,
        )

    return call


def test_mind_dataset_reads_what_was_packed(dataset, expected):
    from mindspore.dataset import MindDataset

    path = str(dataset / "sequences-00000.mindrecord")
    rows = list(MindDataset(path, shuffle=False).create_dict_iterator(1, output_numpy=True))
    for name, values in zip(("ids", "labels", "positions"), expected, strict=True):
        assert np.array_equal([row[name] for row in rows], values)
    assert [int(row["sequence"]) for row in rows] == list(range(len(rows)))
    assert np.array_equal(
        [row["segments"] for row in rows], np.where(expected[2] < 0, np.int32(-1), 0)
    )


def test_the_description_tells_all(make, jsonl, tokenizer, tmp_path):
    from hashlib import sha256

    result = make(jsonl(*GOOD, b"{", {"text": 1}, {"text": 2}), skip_bad=True)
    info = read_info(tmp_path / "out")
    assert info == result.info == verify(tmp_path / "out")
    lengths = [len(tokenizer.encode(each["text"])) + 1 for each in GOOD]
    sequences = -(-(sum(lengths) - 1) // 4)
    assert info.counts.model_dump() == {
        "documents": 2,
        "tokens": sum(lengths),
        "sequences": sequences,
        "predicted": sum(lengths) - 2,
        "padded": sequences * 4 - (sum(lengths) - 1),
        "dropped": 0,
        "silent_sequences": 0,
        "skipped": {"not JSON": 1, "wrong type": 2},
        "largest_id": max(max(tokenizer.encode(each["text"])) for each in GOOD),
    }
    assert info.vocabulary.vocab_size == 32000
    for file in info.files:
        data = (tmp_path / "out" / file.name).read_bytes()
        assert (file.size, file.sha256) == (len(data), sha256(data).hexdigest())
    occurs = Counter(t for each in GOOD for t in (*tokenizer.encode(each["text"]), 2))
    assert read_token_counts(tmp_path / "out" / "token_counts.json", 32000) == occurs
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "dataset.json",
        *(file.name for file in info.files),
    }


def test_attention_keeps_segments_and_positions(make, jsonl, tmp_path):
    make(jsonl(*GOOD), boundaries="attention", seq_length=64)
    info = read_info(tmp_path / "out")
    sequence = mindrecord.SequenceReader(tmp_path / "out", info.files, 64)[0]
    first = int(np.count_nonzero(sequence.segments_S == 0))
    second = int(np.count_nonzero(sequence.segments_S == 1))
    assert sequence.ids_S[[0, first]].tolist() == [1, 1]
    assert sequence.positions_S[: first + second].tolist() == [*range(first), *range(second)]
    assert sequence.labels_S[first - 1] == -100
    assert first + second == info.counts.tokens - 1


def test_the_same_bytes_every_time(make, jsonl, tmp_path):
    source = jsonl(*GOOD)
    make(source, output="a")
    make(source, output="b")
    assert content(tmp_path / "a") == content(tmp_path / "b")


def test_files_are_begun_when_one_is_full(tmp_path, make, jsonl, monkeypatch):
    monkeypatch.setattr(mindrecord, "FILE_SEQUENCES", 3)
    info = make(jsonl({"text": "a b c d e f g h i j k l m n"}), seq_length=2).info
    assert [file.sequences for file in info.files] == [3, 0, 3, 0, 2, 0, 0]
    reader = mindrecord.SequenceReader(tmp_path / "out", info.files, 2)
    stream = [1, *(int(i) for n in range(8) for i in reader[n].labels_S if i != -100)]
    ids = [int(i) for n in range(8) for i in reader[n].ids_S]
    assert stream[:-1] == ids[: len(stream) - 1]
    with pytest.raises(IndexError):
        reader[8]


def test_progress_ends_at_the_total(make, jsonl, tmp_path):
    text = tmp_path / "a.txt"
    text.write_text("one\ntwo\n")
    source, calls = jsonl(*GOOD), []
    make(source, text, progress=lambda *numbers: calls.append(numbers))
    total = source.stat().st_size + text.stat().st_size
    assert calls[-1] == (total, total)


@pytest.mark.parametrize(
    "boom", [RuntimeError("MindRecord"), KeyboardInterrupt(), OSError(28, "x")]
)
@pytest.mark.parametrize("where", ["write_raw_data", "commit"])
def test_a_failure_while_writing_changes_nothing(boom, where, make, jsonl, tmp_path, monkeypatch):
    from mindspore.mindrecord import FileWriter

    source = jsonl(*GOOD)
    make(source)
    before = content(tmp_path)

    def fail(*_):
        raise boom

    monkeypatch.setattr(FileWriter, where, fail)
    error = KeyboardInterrupt if isinstance(boom, KeyboardInterrupt) else DataError
    for output in ("out", "new/deep/out"):
        with pytest.raises(
            error, match=None if error is KeyboardInterrupt else "nothing was chang"
        ):
            make(source, output=output, overwrite=True)
        assert content(tmp_path) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out"]


@pytest.mark.parametrize("where", ["file_digest", "seal"])
def test_a_failure_after_writing_changes_nothing(where, make, jsonl, tmp_path, monkeypatch):
    source = jsonl(*GOOD)
    make(source)
    before = content(tmp_path)

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(build, where, fail)
    with pytest.raises(DataError, match=r"disk full: .*out: No space left.*: nothing was changed"):
        make(source, overwrite=True)
    assert content(tmp_path) == before


def test_the_old_dataset_comes_back_when_the_new_one_cannot_be_put_in_its_place(
    make, jsonl, tmp_path, monkeypatch
):
    source = jsonl(*GOOD)
    make(source)
    before, rename = content(tmp_path), Path.rename

    def fail(self, target):
        if ".partial-" in self.name:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(DataError, match=r"cannot write: .*out: Input/output error"):
        make(source, overwrite=True, seq_length=3)
    assert content(tmp_path) == before


def test_mindrecord_leaving_out_windows_is_noticed(make, jsonl, monkeypatch):
    from mindspore.mindrecord import FileWriter

    write = FileWriter.write_raw_data
    monkeypatch.setattr(FileWriter, "write_raw_data", lambda self, rows: write(self, rows[1:]))
    with pytest.raises(DataError, match=r"cannot write: .*: \d+ sequences arrived of \d+"):
        make(jsonl(*GOOD))


KILLED = """
import os, signal, sys
from pathlib import Path
from mistral_ms.config import DataConfig
from mistral_ms.datasets import build, build_dataset
from mistral_ms.tokenizer import packaged_tokenizer
build.file_digest = lambda path: os.kill(os.getpid(), signal.SIGKILL)
build_dataset([Path(sys.argv[1])], packaged_tokenizer(), DataConfig(seq_length=4),
              Path(sys.argv[2]), overwrite=True)
"""


def test_a_killed_writer_leaves_the_old_dataset(make, jsonl, tmp_path):
    source = jsonl(*GOOD)
    make(source)
    before = content(tmp_path / "out")
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "out")]
    assert subprocess.run(command, check=False).returncode == -signal.SIGKILL
    assert content(tmp_path / "out") == before
    (left,) = (p for p in tmp_path.iterdir() if p.name.startswith(".out.partial-"))
    with pytest.raises(DataError, match=r"incomplete dataset: .*dataset.json"):
        read_info(left)
    make(source, overwrite=True, seq_length=3)
    assert read_info(tmp_path / "out").config.seq_length == 3


FULL = """
import resource, signal, sys
from pathlib import Path
from mistral_ms.config import DataConfig
from mistral_ms.datasets import build_dataset
from mistral_ms.errors import DataError
from mistral_ms.tokenizer import packaged_tokenizer
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
try:
    build_dataset([Path(sys.argv[1])], packaged_tokenizer(), DataConfig(seq_length=4),
                  Path(sys.argv[2]))
except DataError as error:
    print(error)
"""


def test_a_file_that_cannot_grow_is_a_clear_error(jsonl, tmp_path):
    """The system refuses bytes beyond a limit as it does on a full disk."""
    source = jsonl(*GOOD)
    command = [sys.executable, "-c", FULL, str(source), str(tmp_path / "out")]
    shown = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert shown.startswith("cannot write: ")
    assert "nothing was changed" in shown
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.parametrize(
    ("free", "message"),
    [
        (1_000_000, "[ERROR] Failed to seekp file.\nmore"),
        (9_437_184, "No free disk to be used while writing mindrecord files"),  # as measured
    ],
)
def test_a_full_disk_is_named(free, message, make, jsonl, monkeypatch, tmp_path):
    from mindspore.mindrecord import FileWriter

    def fail(*_):
        raise RuntimeError(message)

    usage = type("Usage", (), {"free": free})
    monkeypatch.setattr(mindrecord.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(FileWriter, "write_raw_data", fail)
    reason = message.removeprefix("[ERROR] ").partition("\n")[0]
    expected = rf"disk full: {tmp_path}: {free / 1e6:.1f} MB free, {reason}: nothing was changed"
    with pytest.raises(DataError, match=expected):
        make(jsonl(*GOOD))


def test_existing_targets(make, jsonl, tmp_path):
    source = jsonl(*GOOD)
    make(source)
    with pytest.raises(DataError, match=r"target exists: .*out: .*--overwrite"):
        make(source)
    make(source, overwrite=True, seq_length=5)
    assert verify(tmp_path / "out").config.seq_length == 5
    (tmp_path / "out" / "notes.md").touch()
    with pytest.raises(DataError, match=r"target is not a dataset: .*out: holds notes.md"):
        make(source, overwrite=True)
    with pytest.raises(DataError, match=r"target is not a dataset: .*in.jsonl: a file"):
        make(source, output="in.jsonl", overwrite=True)


def test_a_link_stays_and_what_it_leads_to_is_replaced(make, jsonl, tmp_path):
    source = jsonl(*GOOD)
    make(source, output="real")
    (tmp_path / "out").symlink_to(tmp_path / "real")
    make(source, overwrite=True, seq_length=7)
    assert (tmp_path / "out").is_symlink()
    assert read_info(tmp_path / "real").config.seq_length == 7


def test_a_place_that_cannot_be_written(make, jsonl, tmp_path):
    with pytest.raises(DataError, match=r"cannot write: .*in.jsonl/out: .*: nothing was changed"):
        make(jsonl(*GOOD), output="in.jsonl/out")


@pytest.mark.parametrize(
    ("records", "config", "message"),
    [
        ([b""], {}, r"nothing to learn: 0 documents, 0 tokens: at least one token"),
        ([b"{"], {"skip_bad": True}, r"0 tokens, 1 skipped \(not JSON 1\)"),
        (GOOD[:1], {"drop_last": True, "seq_length": 99}, "not dropped takes 100 tokens"),
    ],
)
def test_nothing_to_learn(records, config, message, make, jsonl, tmp_path):
    with pytest.raises(DataError, match=message):
        make(jsonl(*records), **config)
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_bad_line_leaves_nothing_behind(make, jsonl, tmp_path):
    with pytest.raises(DataError, match=r"not JSON: .*in.jsonl, line 3"):
        make(jsonl(*GOOD, b"{"))
    assert [p.name for p in tmp_path.iterdir()] == ["in.jsonl"]


def test_permissions_follow_the_umask(make, jsonl, tmp_path):
    make(jsonl(*GOOD))
    mode = 0o666 & ~directory._umask()
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()} == {mode}
    assert json.loads((tmp_path / "out" / "dataset.json").read_text())["format"] == 1


def test_a_conversation_that_the_format_refuses_is_a_bad_document(make, jsonl, tmp_path):
    ask, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    path = jsonl({"messages": [ask, ask, answer]}, {"messages": [ask, answer]})
    with pytest.raises(DataError, match=r"line 1: message 1: role 'user'.*take turns.*--skip-bad"):
        make(path)
    result = make(path, skip_bad=True)
    assert result.info.counts.skipped == {"invalid conversation": 1}
    assert result.info.counts.documents == 1


def test_an_added_token_beyond_the_model_matters_only_where_it_occurs(tmp_path, jsonl):
    from support.configs import model as make_model
    from support.tokenizers import SIZE, token, write

    from mistral_ms.tokenizer import check_vocabulary, load_tokenizer

    model = make_model(vocab_size=SIZE)
    added = {str(SIZE): token("[PAD]"), str(SIZE + 1): token("<tool>", special=False)}
    tokenizer = load_tokenizer(write(tmp_path / "m", {"added_tokens_decoder": added}))
    assert tokenizer.vocab_size == SIZE + 2
    check_vocabulary(tokenizer, model)
    for name, text in (("good", "a [PAD] b"), ("bad", "a <tool> b")):
        config = DataConfig(seq_length=4)
        info = build_dataset([jsonl({"text": text})], tokenizer, config, tmp_path / name).info
        if name == "good":
            assert info.counts.largest_id < SIZE
            check_fit(tmp_path / name, info, model, tokenizer)
        else:
            assert info.counts.largest_id == SIZE + 1
            with pytest.raises(DataError, match=rf"{SIZE + 2} ids.*vocab_size {SIZE}"):
                check_fit(tmp_path / name, info, model, tokenizer)


def test_no_bos_where_the_tokenizer_says_so(tmp_path, jsonl):
    from support.tokenizers import write

    from mistral_ms.tokenizer import load_tokenizer

    for name, said in (("no", False), ("yes", True)):
        tokenizer = load_tokenizer(write(tmp_path / name, {"add_bos_token": said}))
        text = "The tide turns."
        path = jsonl({"text": text})
        info = build_dataset(
            [path], tokenizer, DataConfig(seq_length=4), tmp_path / f"o{name}"
        ).info
        assert info.config.add_bos is said
        assert info.counts.tokens == len(tokenizer.encode(text, bos=said)) + 1


def test_another_end_token_in_the_model_is_said(tmp_path, jsonl):
    from support.tokenizers import write

    from mistral_ms.tokenizer import load_tokenizer

    path = write(tmp_path / "m", generation_config={"eos_token_id": 1})
    result = build_dataset(
        [jsonl({"text": "a"})], load_tokenizer(path), DataConfig(seq_length=4), tmp_path / "o"
    )
    assert result.notes == (
        "the tokenizer ends texts with 2 ('</s>'), the model's settings with 1 ('<s>')",
    )
