"""Saving a model that is in memory."""

import hashlib
import json

import numpy as np
import pytest
import torch

from mistral_ms.checkpoint import inspect, open_checkpoint, our_shapes, save_native, tokenizer_files
from mistral_ms.checkpoint.dtypes import itemsize
from mistral_ms.checkpoint.safetensors_file import read_header
from mistral_ms.errors import CheckpointError


@pytest.fixture
def tensors(tiny_config):
    rng = np.random.default_rng(1)
    return [
        (name, shape, "float32", rng.standard_normal(shape).astype(np.float32))
        for name, shape in our_shapes(tiny_config).items()
    ]


def test_what_is_saved_is_read_back(tmp_path, tiny_config, tensors):
    save_native(tmp_path / "x", tiny_config, tensors, max_shard_bytes=3_000)
    with open_checkpoint(tmp_path / "x") as source:
        assert (source.kind, source.config) == ("mistral_ms", tiny_config)
        for name, _, _, array in tensors:
            np.testing.assert_array_equal(source.read(name, "keep"), array)


def test_the_directory_is_as_promised(tmp_path, tiny_config, tensors):
    save_native(tmp_path / "x", tiny_config, tensors, {"state.json": b"{}"})
    files = sorted(p.name for p in (tmp_path / "x").iterdir())
    assert files == [
        "COMPLETE",
        "config.json",
        "model-00001-of-00001.safetensors",
        "model.safetensors.index.json",
        "state.json",
    ]
    listed = json.loads((tmp_path / "x" / "COMPLETE").read_text())["files"]
    assert sorted(listed) == files[1:]
    for name, record in listed.items():
        raw = (tmp_path / "x" / name).read_bytes()
        assert record == {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}


def test_values_may_be_made_when_their_turn_comes(tmp_path, tiny_config, tensors):
    alive, most = set(), []

    def lazily(name, array):
        def make():
            alive.add(name)
            most.append(name)
            return array.copy()

        return make

    lazy = [(n, s, d, lazily(n, a)) for n, s, d, a in reversed(tensors)]
    save_native(tmp_path / "x", tiny_config, lazy)
    assert most == [name for name, *_ in tensors]  # once each, in the model's order
    with open_checkpoint(tmp_path / "x") as source:
        np.testing.assert_array_equal(
            source.read("norm.weight"), dict((n, a) for n, _, _, a in tensors)["norm.weight"]
        )


@pytest.mark.parametrize(
    ("dtype", "torch_dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16)]
)
def test_float32_values_are_rounded_to_the_dtype_on_disk(
    tmp_path, tiny_config, tensors, dtype, torch_dtype
):
    save_native(tmp_path / "x", tiny_config, [(n, s, dtype, a) for n, s, _, a in tensors])
    with open_checkpoint(tmp_path / "x") as source:
        for name, _, _, array in tensors:
            assert source.dtype(name) == dtype
            expected = torch.from_numpy(array).to(torch_dtype).float().numpy()
            np.testing.assert_array_equal(source.read(name), expected)


def test_bfloat16_bits_are_stored_as_they_are(tmp_path, tiny_config, tensors):
    bits = [
        (n, s, "bfloat16", np.arange(a.size, dtype=np.uint16).reshape(s)) for n, s, _, a in tensors
    ]
    save_native(tmp_path / "x", tiny_config, bits)
    with open_checkpoint(tmp_path / "x") as source:
        for name, _, _, array in bits:
            np.testing.assert_array_equal(source.read(name, "keep"), array)


def test_arrays_that_are_not_contiguous_are_stored_in_their_own_order(
    tmp_path, tiny_config, tensors
):
    turned = [(n, s, d, np.asfortranarray(a)) for n, s, d, a in tensors]
    save_native(tmp_path / "x", tiny_config, turned)
    with open_checkpoint(tmp_path / "x") as source:
        for name, _, _, array in tensors:
            np.testing.assert_array_equal(source.read(name), array)


def test_optimizer_state_and_tokenizer_go_along(tmp_path, tiny_config, tensors):
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.write_bytes(b"pieces")
    moments = [("adam.m", (7,), "float32", np.arange(7, dtype=np.float32))]
    save_native(
        tmp_path / "x",
        tiny_config,
        tensors,
        tokenizer_files(tmp_path),
        extra_tensors={"optimizer": moments},
    )
    assert (tmp_path / "x" / "tokenizer.model").read_bytes() == b"pieces"
    assert (tmp_path / "x" / "optimizer-00001-of-00001.safetensors").exists()
    found = inspect(tmp_path / "x", verify=True)
    assert (found.ok, found.checksums) == (True, "verified")
    assert "adam.m" not in found.tensors


def change(tensors, what):
    name, shape, dtype, array = tensors[4]
    if what == "missing tensor":
        return tensors[:4] + tensors[5:]
    if what == "extra tensor":
        return [*tensors, ("layers.0.bias", (1,), dtype, np.zeros(1, np.float32))]
    if what == "tensor given twice":
        return [*tensors, tensors[4]]
    if what == "wrong shape":
        return [*tensors[:4], (name, (*shape, 1), dtype, array[..., None]), *tensors[5:]]
    if what == "unknown dtype":
        return [*tensors[:4], (name, shape, "float64", array), *tensors[5:]]
    if what == "overflow":
        return [*tensors[:4], (name, shape, "float16", array + 1e6), *tensors[5:]]
    return [*tensors[:4], (name, shape, dtype, array.astype(np.float64)), *tensors[5:]]


@pytest.mark.parametrize(
    "what",
    (
        "missing tensor",
        "extra tensor",
        "tensor given twice",
        "wrong shape",
        "unknown dtype",
        "wrong values",
        "overflow",
    ),
)
def test_tensors_must_be_exactly_the_models(tmp_path, tiny_config, tensors, what):
    name = "layers.0.bias" if what == "extra tensor" else tensors[4][0]
    with pytest.raises(CheckpointError, match=f"{what}: {name}: "):
        save_native(tmp_path / "x", tiny_config, change(tensors, what))
    assert list(tmp_path.iterdir()) == []


def test_every_tensor_is_aligned_to_its_elements(tmp_path, tiny_config, tensors):
    """Odd numbers of 16-bit values before 32-bit ones would leave those on half a word."""
    mixed = [(n, s, "bfloat16" if i % 2 else d, a) for i, (n, s, d, a) in enumerate(tensors)]
    odd = [
        ("a", (3,), "float16", np.zeros(3, np.float16)),
        ("b", (1,), "float32", np.ones(1, np.float32)),
    ]
    save_native(tmp_path / "x", tiny_config, mixed, extra_tensors={"optimizer": odd})
    for file in (tmp_path / "x").glob("*.safetensors"):
        header = read_header(file)
        for name, info in header.tensors.items():
            assert header.begins[name] % itemsize(info.dtype) == 0, name


def test_an_existing_checkpoint_is_replaced_only_when_asked(tmp_path, tiny_config, tensors):
    save_native(tmp_path / "x", tiny_config, tensors)
    with pytest.raises(CheckpointError, match="target exists"):
        save_native(tmp_path / "x", tiny_config, tensors)
    save_native(tmp_path / "x", tiny_config, tensors, overwrite=True)
