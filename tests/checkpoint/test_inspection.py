"""What a directory is, sound or not."""

import json
import shutil

import pytest
import torch

from mistral_ms.checkpoint import convert, detect, inspect
from mistral_ms.errors import CheckpointError


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, foreign):
    root = tmp_path_factory.mktemp("kinds")
    foreign.hf(root / "hf", "mixtral", torch.bfloat16, max_shard_size="20KB")
    foreign.bin(root / "bin", "mixtral")
    foreign.fused(root / "fused")
    foreign.mistral(root / "mistral", "mixtral")
    foreign.dump(root / "mistral-dump")
    convert(root / "hf", root / "mistral_ms")
    return root


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("hf", "8 safetensors files, one tensor per expert"),
        ("bin", "1 pickle file, one tensor per expert"),
        ("fused", "1 safetensors file, experts stacked, gate and up projection fused"),
        ("mistral", "1 safetensors file, one tensor per expert"),
        ("mistral-dump", "3 pickle files, experts stacked along the rows, w2 transposed"),
        ("mistral_ms", "1 safetensors file, experts stacked"),
    ],
)
def test_a_sound_checkpoint(checkpoints, foreign, name, layout):
    kind = "hf" if name in ("bin", "fused") else name
    assert detect(checkpoints / name) == kind
    found = inspect(checkpoints / name)
    size = sum(p.numel() for p in foreign.model("mixtral", torch.float32).parameters())
    assert (found.ok, found.problem, found.kind) == (True, None, kind)
    assert (found.parameters, found.dtypes) == (size, {"BF16": 2 * size})
    assert found.layout == layout
    assert found.config.moe.num_local_experts == 4
    data = found.as_dict(with_tensors=True)
    assert json.loads(json.dumps(data)) == data
    assert len(data["tensor_list"]) == data["tensors"] == len(found.tensors)


def test_checksums_of_ours(checkpoints, tmp_path):
    ours = shutil.copytree(checkpoints / "mistral_ms", tmp_path / "ours")
    assert inspect(ours).checksums == "not verified"
    calls = []
    found = inspect(ours, verify=True, progress=lambda *call: calls.append(call))
    assert (found.ok, found.checksums) == (True, "verified")
    assert (
        calls[-1][0]
        == calls[-1][1]
        == sum(p.stat().st_size for p in ours.iterdir() if p.name != "COMPLETE")
    )

    shard = ours / "model-00001-of-00001.safetensors"
    raw = bytearray(shard.read_bytes())
    raw[-1] ^= 1
    shard.write_bytes(raw)
    assert inspect(ours).ok  # sizes alone cannot tell
    found = inspect(ours, verify=True)
    assert not found.ok
    assert found.checksums == f"differ: {shard.name}"
    assert "wrong checksum" in found.problem


def test_foreign_formats_record_no_checksums(checkpoints):
    assert inspect(checkpoints / "hf", verify=True).checksums == "none recorded"


def test_damage_is_a_finding_and_the_rest_is_still_told(checkpoints, tmp_path):
    hf = shutil.copytree(checkpoints / "hf", tmp_path / "hf")
    next(hf.glob("model-00001*")).unlink()
    found = inspect(hf)
    assert (found.ok, found.kind, found.complete) == (False, "hf", "no")
    assert found.problem.startswith("missing file: ")
    assert found.config.num_hidden_layers == 3
    (hf / "config.json").write_text("{}")
    found = inspect(hf)
    assert found.config is None
    assert "unsupported architecture" in found.problem


def test_several_formats_and_none(checkpoints, tmp_path):
    both = shutil.copytree(checkpoints / "hf", tmp_path / "both")
    for file in (checkpoints / "mistral").iterdir():
        shutil.copy(file, both)
    assert "two formats" in inspect(both).problem
    assert inspect(both, kind="mistral").ok
    (tmp_path / "empty").mkdir()
    assert inspect(tmp_path / "empty").kind is None
    assert "not a checkpoint" in inspect(tmp_path / "empty").problem


def test_a_path_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        inspect(tmp_path / "nowhere")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["hf", "bin", "mistral_ms"])
def test_numbers_that_are_not_finite_are_counted_per_tensor(tmp_path, foreign, kind, dtype):
    """The counts are torch's; NaNs of any sign and payload count."""
    from safetensors.torch import load_file, save_file

    path = foreign.hf(tmp_path / "hf", "mistral", dtype)
    state = load_file(path / "model.safetensors")
    norm, head = state["model.norm.weight"], state["lm_head.weight"]
    norm[3], norm[5], norm[7] = torch.nan, -torch.nan, -torch.inf
    head[0, 0] = torch.inf
    head.view(torch.int32 if dtype == torch.float32 else torch.int16)[2, 2] = -1  # a NaN
    save_file(state, path / "model.safetensors", metadata={"format": "pt"})
    if kind == "bin":
        (path / "model.safetensors").unlink()
        torch.save(state, path / "pytorch_model.bin")
    elif kind == "mistral_ms":
        convert(path, tmp_path / "ours")
        path = tmp_path / "ours"
    assert inspect(path).ok
    found = inspect(path, verify=True)
    prefix = "" if kind == "mistral_ms" else "model."
    expected = {
        name: (int(t.isnan().sum()), int(t.isinf().sum()))
        for name, t in ((f"{prefix}norm.weight", norm), ("lm_head.weight", head))
    }
    assert dict(found.not_finite) == expected
    assert "numbers that are not finite: " in found.problem
    assert found.checksums == ("verified" if kind == "mistral_ms" else "none recorded")
    assert found.as_dict()["not_finite"]["lm_head.weight"] == {"nan": 1, "inf": 1}
