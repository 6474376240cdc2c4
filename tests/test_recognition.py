"""What is given for a checkpoint and is none: each kind is named, and what to do is said."""

import json
import re

import pytest
import yaml
from huggingface_hub import snapshot_download

from mistral_ms.checkpoint import detect, inspect, open_checkpoint
from mistral_ms.config import load_run_config
from mistral_ms.errors import CheckpointError, ConfigError, DataError
from mistral_ms.reading import open_regular
from mistral_ms.recognition import explain

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    "size 4943162336\n"
)
MERGE = r"give the base model and --adapter .*: convert BASE NEW --merge "


def refuse(path, message, inspected=True):
    """Every way to a checkpoint's model ends with the same words; inspect reports them."""
    for way in (detect, open_checkpoint, lambda p: detect(p, "hf")):
        with pytest.raises(CheckpointError, match=message):
            way(path)
    if path.is_dir() and inspected:
        assert re.search(message, inspect(path).problem)
    run = path.parent / "run.yaml"
    training = {"seq_length": 8, "global_batch_size": 1, "steps": 1, "lr": 0.1}
    run.write_text(yaml.safe_dump({"training": training}))
    with pytest.raises(ConfigError, match=message):
        load_run_config(run, [f"init_from={path}"])


def snapshot(hub, revision, name="mistralai/Mistral-7B-v0.1", main=True):
    """A revision in a hub's cache, as huggingface_hub lays it out; two files."""
    repository = hub / f"models--{name.replace('/', '--')}"
    folder = repository / "snapshots" / revision
    for directory in (folder, repository / "blobs", repository / "refs"):
        directory.mkdir(parents=True, exist_ok=True)
    for file in ("config.json", "model.safetensors"):
        blob = f"{revision[:8]}{file}"
        (repository / "blobs" / blob).write_text("{}")
        (folder / file).symlink_to(f"../../blobs/{blob}")
    if main:
        (repository / "refs" / "main").write_text(revision)
    return folder


class TestHub:
    def test_the_revision_that_is_advised_is_the_one_that_the_hub_would_take(self, tmp_path):
        snapshot(tmp_path / "hub", "1" * 40)
        new = snapshot(tmp_path / "hub", "0" * 40)
        snapshot(tmp_path / "hub", "2" * 40, main=False)
        theirs = snapshot_download(
            "mistralai/Mistral-7B-v0.1", cache_dir=tmp_path / "hub", local_files_only=True
        )
        assert theirs == str(new)
        message = f"^the cache of a model, not a checkpoint: .*: give {theirs}, the revision main$"
        refuse(new.parents[1], message)
        refuse(new.parent, message)
        refuse(tmp_path / "hub", f"^the cache of a hub, .*: models--mistralai.*: give {theirs}, ")
        (new.parents[1] / "refs" / "main").unlink()
        listed = f"give {new.parent} with one of {'0' * 40}, {'1' * 40}, {'2' * 40}$"
        refuse(new.parents[1], listed)

    def test_several_models(self, tmp_path):
        for number in range(6):
            snapshot(tmp_path / "hub", "a" * 40, f"me/m{number}")
        refuse(tmp_path / "hub", r"models--me--m0, .*m3 and 2 more: .*: give that directory of one")
        one = tmp_path / "hub" / "models--me--m1"
        refuse(one, f"the cache of a model, .*: give {one}/snapshots/{'a' * 40}$")
        for file in (one / "snapshots" / ("a" * 40)).iterdir():
            file.unlink()
        (one / "snapshots" / ("a" * 40)).rmdir()
        refuse(one, "download the model again: no revision is there$")

    def test_a_reference_leads_nowhere_else(self, tmp_path):
        """``refs/main`` is data of others: only a revision that is there is advised."""
        snapshot(tmp_path, "a" * 40)
        folder = snapshot(tmp_path, "b" * 40)
        (folder.parents[1] / "refs" / "main").write_text("../../..")
        assert "with one of" in str(explain(folder.parents[1], CheckpointError))


class TestAdapters:
    def test_of_peft(self, tmp_path):
        path = tmp_path / "adapter"
        path.mkdir()
        values = {"peft_type": "LORA", "base_model_name_or_path": "mistralai/Mistral-7B-v0.1"}
        (path / "adapter_config.json").write_text(json.dumps(values))
        (path / "adapter_model.safetensors").write_text("")
        said = r"^an adapter \(PEFT\), not a whole model: .*adapter: LORA of mistralai/Mistral-7B"
        refuse(path, f"{said}.*{MERGE}", inspected=False)
        for damaged in ("{", '{"peft_type": 1, "base_model_name_or_path": []}'):
            (path / "adapter_config.json").write_text(damaged)
            message = rf"^an adapter \(PEFT\), not a whole model: .*adapter: an adapter.*{MERGE}"
            refuse(path, message, inspected=False)
            assert "adapter_config.json" in inspect(path).problem
        (path / "adapter_config.json").unlink()
        refuse(path, MERGE)

    def test_of_mistral_finetune(self, tmp_path):
        (tmp_path / "lora").mkdir()
        (tmp_path / "lora" / "lora.safetensors").write_text("")
        refuse(tmp_path / "lora", r"an adapter \(mistral-finetune\).*save_adapters: False")


class TestOtherFormats:
    @pytest.mark.parametrize("name", ["m.Q4_K_M.gguf", "no-ending"])
    def test_gguf_file(self, tmp_path, name):
        (tmp_path / name).write_bytes(b"GGUF\x03\0\0\0")
        refuse(tmp_path / name, rf"^GGUF, not .*/{name}: {name}: .*: use the Hugging Face or")

    def test_directory_with_gguf(self, tmp_path):
        (tmp_path / "m").mkdir()
        for number in range(3):
            (tmp_path / "m" / f"m{number}.gguf").write_bytes(b"GGUF")
        refuse(tmp_path / "m", r"^GGUF, not a .*/m: m0\.gguf and 2 more: llama\.cpp's format")

    @pytest.mark.parametrize("end", ["ckpt", "safetensors"])
    def test_what_mindformers_leaves_of_each_rank(self, tmp_path, end):
        ranks = [tmp_path / "m" / f"rank_{number}" for number in range(2)]
        for rank in ranks:
            rank.mkdir(parents=True)
            (rank / f"mixtral-1_2.{end}").write_bytes(b"\n")
        said = r"^the parts of many ranks, not a checkpoint: .*/m: 2 directories rank_N: "
        refuse(tmp_path / "m", rf"{said}.*convert with --strategy DIRECTORY")
        (ranks[1] / f"mixtral-1_2.{end}").unlink()
        ranks[1].rmdir()
        refuse(tmp_path / "m", rf"^the directory of a rank, .*: give {ranks[0]}, if")

    @pytest.mark.parametrize("head", [b"PK\x03\x04", b"\x80\x02}q"])
    def test_torchs_ckpt(self, tmp_path, head):
        (tmp_path / "w.ckpt").write_bytes(head)
        refuse(tmp_path / "w.ckpt", r"^a \.ckpt file of torch, ")

    @pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "x.pth"])
    def test_one_file_of_weights(self, tmp_path, name):
        (tmp_path / name).write_bytes(b"12345678")
        refuse(tmp_path / name, f"^a file of weights, not a checkpoint: .*: give {tmp_path}$")

    def test_a_training(self, tmp_path):
        for step in (999, 100000000, 5):
            (tmp_path / "run" / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
        message = r"^the directory of a training, .*3 checkpoints: .*: give .*/step-100000000$"
        refuse(tmp_path / "run", message)
        refuse(tmp_path / "run" / "checkpoints", message)

    def test_what_is_not_recognised_keeps_its_own_message(self, tmp_path):
        (tmp_path / "m").mkdir()
        (tmp_path / "m" / "README.md").write_text("x")
        (tmp_path / "snapshots").mkdir()  # of something else
        assert explain(tmp_path, CheckpointError) is None
        assert explain(tmp_path / "nowhere", CheckpointError) is None
        with pytest.raises(CheckpointError, match=r"^not a checkpoint: .*no weight files"):
            detect(tmp_path / "m")
        with pytest.raises(CheckpointError, match=r"^not a directory: "):
            detect(tmp_path / "m" / "README.md")
        with pytest.raises(CheckpointError, match=r"^no such directory: "):
            detect(tmp_path / "nowhere")


def test_git_lfs_pointer(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text(POINTER)
    message = rf"^Git LFS pointer: {path}: {len(POINTER)} bytes in the place .*git lfs pull"
    for fault in (CheckpointError, DataError):
        with pytest.raises(fault, match=message):
            open_regular(path, fault)
    path.write_text(POINTER + "x" * 1024)  # too long for one: a text about Git
    open_regular(path, DataError).close()
    path.write_text(POINTER[:20])
    open_regular(path, DataError).close()
