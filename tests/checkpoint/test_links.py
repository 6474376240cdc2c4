"""Links: followed within the border, refused beyond it unless that is asked for."""

import hashlib
import json
import shutil
import sys

import pytest
from huggingface_hub import scan_cache_dir
from support.links import link_files

from mistral_ms.checkpoint import convert, inspect, open_checkpoint, presplit, tokenizer_files
from mistral_ms.checkpoint.layout import our_shapes
from mistral_ms.cli import main
from mistral_ms.config import InitFromConfig
from mistral_ms.errors import CheckpointError, TokenizerError
from mistral_ms.tokenizer import load_tokenizer

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 99\n"
REVISION = "c" * 40


@pytest.fixture(scope="module")
def plain(tmp_path_factory, foreign):
    """A sharded model of Hugging Face with a file of a tokenizer, all plain files."""
    path = foreign.hf(tmp_path_factory.mktemp("plain") / "m", "mistral", max_shard_size="60KB")
    (path / "tokenizer.model").write_bytes(b"pieces")
    return path


@pytest.fixture
def cached(tmp_path, plain):
    """It as a snapshot in a hub's cache; the repository's directory."""
    repository = tmp_path / "hub" / "models--me--tiny"
    snapshot = repository / "snapshots" / REVISION
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    for file in plain.iterdir():
        name = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, repository / "blobs" / name)
        (snapshot / file.name).symlink_to(f"../../blobs/{name}")
    return repository


def assert_same(path, plain, foreign, assert_same_bits, **options):
    """Converted from ``path``: the same weights and files as from plain files."""
    out = path.parent / "out"
    convert(path, out, "hf", **options)
    assert_same_bits(foreign.read(out), foreign.read(plain))
    assert (out / "tokenizer.model").read_bytes() == b"pieces"
    assert not any(file.is_symlink() for file in out.iterdir())
    shutil.rmtree(out)


class TestHub:
    def test_a_snapshot_is_read(self, cached, plain, foreign, assert_same_bits, tmp_path):
        scanned = scan_cache_dir(cached.parent)  # the hub's own word that this is its layout
        assert not scanned.warnings
        (revision,) = next(iter(scanned.repos)).revisions
        assert revision.snapshot_path == cached / "snapshots" / REVISION
        assert_same(revision.snapshot_path, plain, foreign, assert_same_bits)
        (tmp_path / "short").symlink_to(revision.snapshot_path)
        assert_same(tmp_path / "short", plain, foreign, assert_same_bits)

    def test_blobs_may_be_a_link_within_the_cache(self, cached, plain, foreign, assert_same_bits):
        (cached / "blobs").rename(cached / "store")
        (cached / "blobs").symlink_to("store")
        assert_same(cached / "snapshots" / REVISION, plain, foreign, assert_same_bits)

    def test_a_revision_may_link_to_another(self, cached, plain, foreign, assert_same_bits):
        new = cached / "snapshots" / ("d" * 40)
        new.mkdir()
        for file in plain.iterdir():
            (new / file.name).symlink_to(f"../{REVISION}/{file.name}")
        assert_same(new, plain, foreign, assert_same_bits)

    def test_blobs_elsewhere_need_the_option(self, cached, plain, foreign, assert_same_bits):
        (cached / "blobs").rename(cached.parents[1] / "disk")
        (cached / "blobs").symlink_to("../../disk")
        snapshot = cached / "snapshots" / REVISION
        said = rf": .*/disk/.*: links are followed within {cached} only: .*--follow-links"
        with pytest.raises(CheckpointError, match=rf"^file outside the checkpoint{said}"):
            open_checkpoint(snapshot)
        assert_same(snapshot, plain, foreign, assert_same_bits, follow_links=True)

    @pytest.mark.parametrize("missing", ["blobs", "snapshots"])
    def test_what_only_resembles_a_cache_has_no_wider_border(self, tmp_path, plain, missing):
        root = tmp_path / "r"
        parent = root / ("other" if missing == "snapshots" else "snapshots")
        shutil.copytree(plain, parent / "m")
        if missing != "blobs":
            (root / "blobs").mkdir()
        (parent / "m" / "tokenizer.model").rename(root / "t")
        (parent / "m" / "tokenizer.model").symlink_to("../../t")
        with pytest.raises(CheckpointError, match=r"outside the checkpoint: .*leads to .*/t: "):
            open_checkpoint(parent / "m")


NAMES = (
    "config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "model-00002-of-*.safetensors",
    "tokenizer.model",
)


class TestPlainDirectory:
    @pytest.fixture
    def copy(self, tmp_path, plain):
        return shutil.copytree(plain, tmp_path / "m")

    @pytest.mark.parametrize("pattern", NAMES)
    def test_every_file_beyond_the_border_needs_the_option(
        self, copy, plain, pattern, foreign, assert_same_bits
    ):
        (file,) = copy.glob(pattern)
        file.rename(copy.parent / "away")
        file.symlink_to(copy.parent / "away")
        message = rf"^file outside the checkpoint: .*'{file.name}' leads to .*/away: "
        for way in (
            open_checkpoint,
            lambda path: convert(path, copy.parent / "x"),
            lambda path: presplit(path, copy.parent / "x", [{}], "1"),
        ):
            with pytest.raises(CheckpointError, match=message):
                way(copy)
        assert sorted(each.name for each in copy.parent.iterdir()) == ["away", "m"]
        assert "leads to" in inspect(copy).problem
        assert inspect(copy, verify=True, follow_links=True).ok
        assert_same(copy, plain, foreign, assert_same_bits, follow_links=True)

    def test_links_that_stay_inside_need_nothing(self, copy, plain, foreign, assert_same_bits):
        (copy / "files").mkdir()
        for file in [each for each in copy.iterdir() if each.is_file()]:
            file.rename(copy / "files" / file.name)
            file.symlink_to(f"files/{file.name}")
        assert_same(copy, plain, foreign, assert_same_bits)

    def test_an_index_still_names_no_path(self, copy):
        index = copy / "model.safetensors.index.json"
        text = index.read_text().replace("model-00001", "../m/model-00001")
        index.write_text(text)
        with pytest.raises(CheckpointError, match="names a path, not a file"):
            open_checkpoint(copy, follow_links=True)

    def test_a_dangling_link_is_a_missing_file(self, copy):
        (first,) = copy.glob("model-00001-of-*")
        first.unlink()
        first.symlink_to("nowhere")
        with pytest.raises(CheckpointError, match=r"^missing file: "):
            open_checkpoint(copy, follow_links=True)

    def test_the_command(self, copy, monkeypatch, capsys):
        (copy / "tokenizer.model").rename(copy.parent / "away")
        (copy / "tokenizer.model").symlink_to("../away")

        def run(*arguments):
            monkeypatch.setattr(sys, "argv", ["run_mixtral.py", *map(str, arguments)])
            with pytest.raises(SystemExit) as info:
                main()
            captured = capsys.readouterr()
            return info.value.code or 0, " ".join((captured.out + captured.err).split())

        assert run("inspect", copy)[0] == 1
        assert run("inspect", copy, "--follow-links")[0] == 0
        code, said = run("convert", copy, copy.parent / "out")
        assert code == 2 and "file outside the checkpoint" in said
        assert run("convert", copy, copy.parent / "out", "--follow-links")[0] == 0


def test_ours_whole_and_in_parts(tmp_path, tiny_config, save_random):
    """A checkpoint of ours with its files on another disk, digests and all."""
    save_random(tmp_path / "whole", tiny_config)
    everything = {
        name: tuple(slice(0, n) for n in shape) for name, shape in our_shapes(tiny_config).items()
    }
    presplit(tmp_path / "whole", tmp_path / "parts", [everything], "1")
    for kind in ("whole", "parts"):
        moved = link_files(tmp_path / kind, tmp_path / f"{kind}-linked")
        with pytest.raises(CheckpointError, match="file outside the checkpoint"):
            open_checkpoint(moved)
        with open_checkpoint(moved, follow_links=True) as source:
            for name in source.names():
                source.read(name)
        assert inspect(moved, verify=True, follow_links=True).checksums == "verified"
        convert(moved, tmp_path / f"{kind}-out", "mindspore", follow_links=True)


def test_a_run_carries_linked_files_along_only_when_told(tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "secret").write_text("s")
    (tmp_path / "m" / "tokenizer.json").symlink_to("../secret")
    with pytest.raises(CheckpointError, match="file outside the checkpoint"):
        tokenizer_files(tmp_path / "m")
    assert list(tokenizer_files(tmp_path / "m", follow_links=True)) == ["tokenizer.json"]
    assert InitFromConfig(path=tmp_path).follow_links is False


class TestPointers:
    @pytest.mark.parametrize("kind", ["safetensors", "bin", "mistral"])
    def test_in_the_place_of_weights(self, tmp_path, foreign, kind):
        path = tmp_path / "m"
        config = foreign.kinds["mistral"][1]
        config.save_pretrained(path)
        name = {"safetensors": "model.safetensors", "bin": "pytorch_model.bin"}.get(kind)
        if name is None:
            name = "consolidated.00.pth"
            params = {"dim": 32, "n_layers": 1, "head_dim": 8, "hidden_dim": 48, "n_heads": 4,
                      "n_kv_heads": 2, "norm_eps": 1e-5, "vocab_size": 61}  # fmt: skip
            (path / "params.json").write_text(json.dumps(params))
        (path / name).write_text(POINTER)
        message = rf"Git LFS pointer: .*/{name}: .*run git lfs pull"
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)
        assert "Git LFS pointer" in inspect(path).problem

    @pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "tekken.json"])
    def test_in_the_place_of_a_tokenizer(self, tmp_path, name):
        (tmp_path / name).write_text(POINTER)
        with pytest.raises(TokenizerError, match=rf"Git LFS pointer: .*/{name}: "):
            load_tokenizer(tmp_path)


def test_an_adapter_beside_the_weights_is_said_to_be_not_applied(tmp_path, plain):
    path = shutil.copytree(plain, tmp_path / "m")
    (path / "adapter_config.json").write_text("{}")
    (path / "adapter_model.safetensors").write_bytes(b"")
    said = []
    convert(path, tmp_path / "out", say=said.append)
    note = f"not applied to the weights of {path}: the adapter adapter_model.safetensors"
    assert len(said) == 1 and said[0].endswith(f"; {note}")
    assert inspect(path).ok and inspect(path).unapplied == ("adapter_model.safetensors",)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()
