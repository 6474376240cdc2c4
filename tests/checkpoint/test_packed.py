"""AWQ and GPTQ in four bits, packed here number by number as the formats' descriptions say."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from mistral_ms.checkpoint import convert, inspect, open_checkpoint
from mistral_ms.errors import CheckpointError

GROUP = 16
AWQ = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "sym": False, "desc_act": True}
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the n-th four bits of an int32 belong to this output of it


def into_ints(numbers, order):
    """Eight numbers of each row in an int32, the first one in the lowest bits."""
    out = np.zeros((len(numbers), numbers.shape[1] // 8), np.uint32)
    for r, c in np.ndindex(*out.shape):
        for place, number in enumerate(order):
            out[r, c] |= np.uint32(int(numbers[r, 8 * c + number]) << (4 * place))
    return out.view(np.int32)


def packed(rng, name, shape, method, offset, group):
    """Tensors of one matrix [outputs, inputs], and the matrix."""
    outputs, inputs = shape
    groups = inputs // group
    owner = np.arange(inputs) // group
    if method == "gptq":  # as with desc_act: inputs in any order
        owner = rng.permutation(owner)
    codes, zeros = rng.integers(0, 16, (inputs, outputs)), rng.integers(0, 16, (groups, outputs))
    scales = rng.uniform(0.01, 0.02, (groups, outputs)).astype(np.float16)
    matrix = np.zeros(shape, np.float32)
    for o, i in np.ndindex(*shape):
        g = owner[i]
        matrix[o, i] = np.float32(int(codes[i, o]) - int(zeros[g, o])) * np.float32(scales[g, o])
    tensors = {f"{name}.scales": scales}
    if method == "awq":
        tensors[f"{name}.qweight"] = into_ints(codes, AWQ_ORDER)
        tensors[f"{name}.qzeros"] = into_ints(zeros, AWQ_ORDER)
    else:
        tensors[f"{name}.qweight"] = into_ints(codes.T, range(8)).T.copy()
        tensors[f"{name}.qzeros"] = into_ints((zeros - offset) % 16, range(8))
        tensors[f"{name}.g_idx"] = owner.astype(np.int32)
        tensors[f"{name}.bias"] = np.zeros(outputs, np.float16)  # of early versions
    return tensors, matrix


@pytest.fixture
def save(foreign, tmp_path):
    """Packs all matrices of a sparse model but gates and head; their values by name."""

    def make(config, offset=0, group=GROUP):
        path = foreign.hf(tmp_path / "packed", "mixtral", torch.float16)
        rng, tensors, matrices = np.random.default_rng(0), {}, {}
        for name, value in load_file(path / "model.safetensors").items():
            if ".self_attn." not in name and ".experts." not in name:
                tensors[name] = value
                continue
            size = value.shape[1] if group == -1 else group
            parts, matrices[name] = packed(
                rng, name.removesuffix(".weight"), value.shape, config["quant_method"], offset, size
            )
            tensors |= parts
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        edit(path, quantization_config=config)
        return path, tensors, matrices

    return make


def edit(path, **keys):
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(values | keys))


@pytest.mark.parametrize(
    ("config", "offset", "group"),
    [
        (AWQ, 0, GROUP),
        (AWQ | {"group_size": -1}, 0, -1),
        (GPTQ, 1, GROUP),
        (GPTQ | {"checkpoint_format": "gptq_v2"}, 0, GROUP),
    ],
    ids=["awq", "awq-one-group", "gptq", "gptq_v2"],
)
def test_every_number_is_the_formats(save, tmp_path, config, offset, group):
    path, tensors, matrices = save(config, offset, group)
    with open_checkpoint(path) as source:
        assert "dequantised while they are read" in source.remark()
    said = []
    convert(path, tmp_path / "hf", "hf", "fp32", say=said.append)
    assert config["quant_method"].upper() in said[0]
    found = {}
    for file in (tmp_path / "hf").glob("*.safetensors"):
        found |= load_file(file)
    for name, matrix in matrices.items():
        np.testing.assert_array_equal(found.pop(name), matrix)
    for name, value in found.items():  # what was not packed
        np.testing.assert_array_equal(value, tensors[name].astype(np.float32))
    assert "quantization_config" not in json.loads((tmp_path / "hf" / "config.json").read_text())
    seen = inspect(path, verify=True)
    assert seen.ok and config["quant_method"].upper() in seen.quantization and "I32" in seen.dtypes


def test_kept_dtype_is_that_of_the_configuration(save, tmp_path):
    path, _, matrices = save(AWQ)
    convert(path, tmp_path / "ours")
    with open_checkpoint(tmp_path / "ours") as source:
        name = "layers.0.attention.q_proj.weight"
        assert source.dtype(name) == "float16"
        wanted = matrices["model.layers.0.self_attn.q_proj.weight"].astype(np.float16)
        np.testing.assert_array_equal(source.read(name, "keep"), wanted)


def test_what_is_not_understood_is_refused_by_name(save):
    path, tensors, _ = save(GPTQ, 1)
    for keys, message in (
        ({"bits": 8}, r"quantised weights: .*bits: 8: of gptq it must be 4"),
        ({"checkpoint_format": "marlin"}, r"checkpoint_format: marlin"),
        ({"dynamic": {"-:.*gate.*": {}}}, r"dynamic"),
        ({"group_size": 0}, r"group_size: 0"),
        ({"group_size": 32}, r"wrong shape: .*qzeros"),
        ({"quant_method": "bitsandbytes"}, r"quant_method: bitsandbytes: known are awq and gptq"),
        ({"rotation": "hadamard"}, r"rotation"),
        ({"sym": True}, r"contradiction: .*qzeros: zero point \d+: with sym all are 8"),
    ):
        edit(path, quantization_config=GPTQ | keys)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)
    for keys, message in (
        ({"version": "gemv"}, r"version: gemv: of awq it must be gemm"),
        ({"zero_point": False}, r"zero_point"),
        ({"backend": "llm-awq"}, r"backend"),
    ):
        edit(path, quantization_config=AWQ | keys)
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)
    edit(path, quantization_config=GPTQ)
    name = "model.layers.0.self_attn.k_proj"
    for change, message in (
        ({f"{name}.g_idx": np.full(32, 2, np.int32)}, r"no such group: .*g_idx: 2 to 2: there are"),
        ({f"{name}.bias": np.ones(16, np.float16)}, r"extra tensor: .*k_proj\.bias"),
        ({f"{name}.scales": np.ones((2, 8), np.float16)}, r"wrong shape: .*k_proj\.scales"),
        ({f"{name}.qweight": np.ones((4, 16), np.int64)}, r"wrong dtype: .*k_proj\.qweight"),
    ):
        save_file(tensors | change, path / "model.safetensors", {"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(path)
