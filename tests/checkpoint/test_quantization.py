"""Experts in int8 and int4 in our own format, read back by everybody else as weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from mistral_ms.checkpoint import convert, inspect, open_checkpoint, our_shapes, save_native
from mistral_ms.config.quantization import Quantization
from mistral_ms.errors import CheckpointError, ConfigError

INT8 = Quantization(weights="int8")
INT4 = Quantization(weights="int4", group_size=16)
EXPERT = "layers.1.moe.experts.w2"


@pytest.fixture
def plain(foreign, tmp_path):
    """A sparse model of Hugging Face's in bfloat16, and what we read of it."""
    path = foreign.hf(tmp_path / "hf", "mixtral", torch.bfloat16)
    with open_checkpoint(path) as source:
        return path, {name: source.read(name) for name in source.names()}


def oracle(weight, quantization):
    """Codes and the numbers that they stand for, group by group."""
    largest, group = (127, weight.shape[-1]) if quantization is INT8 else (7, 16)
    codes, read = np.zeros(weight.shape, int), np.zeros_like(weight)
    for e, o in np.ndindex(*weight.shape[:2]):
        for first in range(0, weight.shape[2], group):
            each = weight[e, o, first : first + group]
            scale = np.float32(np.abs(each).max() / np.float32(largest))
            for i, value in enumerate(each):
                codes[e, o, first + i] = round(float(np.float32(value / scale)))
                read[e, o, first + i] = np.float32(codes[e, o, first + i]) * scale
    return codes, read


def unpacked(stored):
    """The codes in bytes of our files."""
    if stored.dtype == np.int8:
        return stored.astype(int)
    out = np.zeros((*stored.shape[:2], 2 * stored.shape[2]), int)
    for e, o, i in np.ndindex(*out.shape):
        out[e, o, i] = (int(stored[e, o, i // 2]) >> (4 * (i % 2)) & 15) - 8
    return out


@pytest.mark.parametrize("quantization", [INT8, INT4], ids=["int8", "int4"])
def test_codes_are_as_the_format_says_and_everybody_reads_their_values(
    plain, tmp_path, quantization
):
    path, weights = plain
    result = convert(path, tmp_path / "q", quantize=quantization)
    assert result.target_kind == "mistral_ms"
    raw = {}
    for file in (tmp_path / "q").glob("*.safetensors"):
        raw |= load_file(file)
    errors = {}
    with open_checkpoint(tmp_path / "q") as source:
        assert source.quantization == quantization
        for name, weight in weights.items():
            if ".experts." not in name:
                np.testing.assert_array_equal(source.read(name), weight)
                assert source.dtype(name) == "bfloat16"
                continue
            codes, wanted = oracle(weight, quantization)
            np.testing.assert_array_equal(unpacked(raw[name]), codes)
            assert raw[f"{name}_scales"].dtype == np.float32
            np.testing.assert_array_equal(source.read(name), wanted)
            corner = (slice(1, 3), slice(2, 5), slice(3, 9))
            np.testing.assert_array_equal(source.read_slice(name, corner), wanted[corner])
            for e in range(len(weight)):
                missed = np.linalg.norm(weight[e] - wanted[e])
                errors[f"{name}, expert {e}"] = missed / np.linalg.norm(weight[e])
    found = result.quantization_error
    assert found.mean == pytest.approx(np.mean(list(errors.values())), rel=1e-6)
    assert found.worst == pytest.approx(max(errors.values()), rel=1e-6)
    assert errors[found.matrix] == max(errors.values())
    seen = inspect(tmp_path / "q", verify=True)
    assert seen.ok and seen.checksums == "verified"
    assert str(quantization) in seen.quantization
    assert seen.parameters == sum(weight.size for weight in weights.values())
    assert seen.dtypes["I8" if quantization is INT8 else "U8"] == sum(
        weight.size // (1 if quantization is INT8 else 2)
        for name, weight in weights.items()
        if ".experts." in name
    )


def test_an_export_has_the_dtype_of_the_configuration(plain, tmp_path):
    path, _ = plain
    convert(path, tmp_path / "q", quantize=INT4)
    said = []
    convert(tmp_path / "q", tmp_path / "back", say=said.append)
    assert any("int4" in line and "dequantised" in line for line in said)
    assert any("dtype bf16" in line for line in said)
    convert(tmp_path / "q", tmp_path / "wide", dtype="fp32")
    with (
        open_checkpoint(tmp_path / "q") as q,
        open_checkpoint(tmp_path / "back") as back,
        open_checkpoint(tmp_path / "wide") as wide,
    ):
        assert back.dtype(EXPERT) == "bfloat16"
        for name in q.names():
            np.testing.assert_array_equal(back.read(name, "keep"), q.read(name, "bfloat16"))
            np.testing.assert_array_equal(wide.read(name), q.read(name))


def test_what_cannot_be_quantised_is_said(plain, foreign, tmp_path):
    path, _ = plain
    with pytest.raises(CheckpointError, match=r"impossible quantisation: .*w1: 32 inputs.*divide"):
        convert(path, tmp_path / "q", quantize=Quantization(weights="int4", group_size=24))
    with pytest.raises(CheckpointError, match=r"no quantised experts.*'hf'.*our own format alone"):
        convert(path, tmp_path / "q", "hf", quantize=INT8)
    dense = foreign.hf(tmp_path / "dense", "mistral", torch.bfloat16)
    with pytest.raises(CheckpointError, match="no experts"):
        convert(dense, tmp_path / "q", quantize=INT8)
    assert not (tmp_path / "q").exists()
    for values in ({"weights": "int8", "group_size": 32}, {"weights": "int4", "group_size": 3}):
        with pytest.raises(ValueError, match="group_size"):
            Quantization(**values)


def edit(path, change):
    """Changes the configuration of a checkpoint of ours, whose manifest is then wrong."""
    file = path / "config.json"
    values = json.loads(file.read_text())
    change(values["mistral_ms"])
    file.write_text(json.dumps(values))
    manifest = json.loads((path / "COMPLETE").read_text())
    manifest["files"]["config.json"]["size"] = file.stat().st_size
    (path / "COMPLETE").write_text(json.dumps(manifest))


def test_files_that_contradict_the_configuration_are_refused(plain, tmp_path):
    path, _ = plain
    convert(path, tmp_path / "q", quantize=INT4)
    cases = (
        (lambda ours: ours["quantization"].update(group_size=32), r"wrong shape: .*w1_scales"),
        (lambda ours: ours.update(quantization={"weights": "int8"}), r"wrong shape: .*w1.*U8"),
        (lambda ours: ours.update(quantization={"weights": "int2"}), r"quantization.*weights"),
        (lambda ours: ours.pop("quantization"), r"quantised weights: .*U8"),
    )
    for change, message in cases:
        edit(tmp_path / "q", change)
        with pytest.raises((CheckpointError, ConfigError), match=message):
            open_checkpoint(tmp_path / "q", verify=False)


def test_a_number_that_is_not_finite_is_not_quantised(tiny_config, tmp_path):
    arrays = {name: np.zeros(shape, np.float32) for name, shape in our_shapes(tiny_config).items()}
    arrays["layers.0.moe.experts.w3"][1, 2, 3] = np.nan
    save_native(
        tmp_path / "n", tiny_config, [(n, a.shape, "float32", a) for n, a in arrays.items()]
    )
    with pytest.raises(CheckpointError, match=r"not finite: .*layers\.0\.moe\.experts\.w3"):
        convert(tmp_path / "n", tmp_path / "q", quantize=INT8)
    assert not (tmp_path / "q").exists()
