"""Frequencies that old checkpoints store beside the weights: skipped, and compared with the model.

The oracle is the buffer of transformers' own model.
"""

import pytest
import torch
from safetensors.torch import load_file, save_file

from mistral_ms.checkpoint import convert, inspect, open_checkpoint
from mistral_ms.errors import CheckpointError

PER_LAYER = [f"model.layers.{n}.self_attn.rotary_emb.inv_freq" for n in range(3)]


@pytest.fixture(scope="module", params=["mistral", "head_dim"])
def prepared(request, tmp_path_factory, foreign):
    """A checkpoint of transformers, and the frequencies that its model computes with."""
    path = foreign.hf(tmp_path_factory.mktemp("buffers") / "hf", request.param)
    model = foreign.model(request.param, torch.float32)
    return path, model.model.rotary_emb.inv_freq.clone()


@pytest.fixture
def with_buffers(prepared, tmp_path):
    """Saves the checkpoint again, with further tensors."""

    def save(extra):
        import shutil

        path = shutil.copytree(prepared[0], tmp_path / "old")
        state = load_file(path / "model.safetensors")
        save_file(state | extra, path / "model.safetensors", metadata={"format": "pt"})
        return path

    return save


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_known_buffers_are_skipped_and_nothing_else_changes(
    prepared, with_buffers, tmp_path, dtype
):
    extra = {name: prepared[1].clone().to(dtype) for name in PER_LAYER}
    extra["model.layers.0.self_attn.rotary_emb.cos_cached"] = torch.ones(1, 1, 64, 8)
    old = with_buffers(extra)
    result = convert(old, tmp_path / "one")
    assert sorted(result.skipped) == sorted(extra)
    assert convert(prepared[0], tmp_path / "two").skipped == ()
    files = {p.name: p.read_bytes() for p in (tmp_path / "one").iterdir()}
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "two").iterdir()}
    found = inspect(old, verify=True)
    assert found.ok and set(found.skipped) == set(extra)
    assert found.parameters == inspect(prepared[0]).parameters


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f * 1.01, "element 0 is 1.01, not 1"),
        (lambda f: f**1.05, "element 1 is"),
        (lambda f: f[:-1].clone(), "shape"),
        (lambda f: torch.full_like(f, torch.nan), "element 0 is nan"),
    ],
    ids=["scaled", "another theta", "another size", "nan"],
)
def test_frequencies_of_another_model_are_a_contradiction(prepared, with_buffers, change, message):
    old = with_buffers({PER_LAYER[1]: change(prepared[1])})
    with pytest.raises(CheckpointError, match=rf"contradiction: .*{PER_LAYER[1]}: .*{message}"):
        open_checkpoint(old)


def test_unknown_tensors_are_still_refused(with_buffers):
    with pytest.raises(CheckpointError, match=r"extra tensor: .*rotary_emb\.scale"):
        open_checkpoint(with_buffers({"model.layers.0.self_attn.rotary_emb.scale": torch.ones(1)}))


def test_mistrals_own_name(tmp_path, foreign):
    path = foreign.mistral(tmp_path / "m", "mistral", torch.float32)
    frequencies = foreign.model("mistral", torch.float32).model.rotary_emb.inv_freq
    state = load_file(path / "consolidated.safetensors")
    save_file(state | {"rope.freqs": frequencies.clone()}, path / "consolidated.safetensors")
    with open_checkpoint(path) as source:
        assert source.skipped == ("rope.freqs",)
