"""Reading single tensors under our names, straight from any format."""

import numpy as np
import pytest
import torch

from mistral_ms.checkpoint import convert, our_shapes, stream
from mistral_ms.checkpoint import open_checkpoint as open_
from mistral_ms.errors import CheckpointError


@pytest.fixture(scope="module", params=["hf", "fused", "mistral", "dump", "ours"])
def opened(request, tmp_path_factory, foreign):
    """The same bfloat16 Mixtral in five formats, with the tensors that ours must hold."""
    root = tmp_path_factory.mktemp("formats")
    hf = foreign.hf(root / "hf", "mixtral", torch.bfloat16)
    path = root / request.param
    if request.param == "ours":
        convert(hf, path)
    elif request.param == "fused":
        foreign.fused(path)
    elif request.param == "mistral":
        foreign.mistral(path, "mixtral")
    elif request.param == "dump":
        foreign.dump(path)
    convert(hf, root / "expected")
    with open_(path) as source:
        yield source, foreign.read(root / "expected")


def test_every_tensor_is_there_in_every_dtype(opened):
    source, expected = opened
    assert sorted(source.names()) == sorted(expected)
    assert {name: source.shape(name) for name in source.names()} == our_shapes(source.config)
    for name, tensor in expected.items():
        assert source.dtype(name) == "bfloat16"
        np.testing.assert_array_equal(source.read(name), tensor.float().numpy())
        np.testing.assert_array_equal(source.read(name, "float16"), tensor.half().numpy())
        bits = source.read(name, "keep")
        np.testing.assert_array_equal(bits.view(np.int16), tensor.view(torch.int16).numpy())
        np.testing.assert_array_equal(source.read(name, "bfloat16"), bits)


@pytest.mark.parametrize("chunk_bytes", [64, 1000, 8 << 20])
def test_rows_are_what_slicing_gives_whatever_the_chunk_size(opened, monkeypatch, chunk_bytes):
    source, expected = opened
    monkeypatch.setattr(stream, "CHUNK_BYTES", chunk_bytes)
    for name in (
        "layers.1.moe.experts.w1",
        "layers.1.moe.experts.w2",
        "layers.0.moe.router.weight",
    ):
        for rows in [(0, 1), (1, 3), (2, 4), (0, 4), (2, 2)]:
            whole = expected[name].float().numpy()
            np.testing.assert_array_equal(source.read(name, rows=rows), whole[slice(*rows)])
    for name in ("layers.2.attention.q_proj.weight", "layers.2.attention.k_proj.weight"):
        for rows in [(0, 8), (8, 16), (3, 13), (15, 16)]:  # whole heads and parts of heads
            whole = expected[name].float().numpy()
            np.testing.assert_array_equal(source.read(name, rows=rows), whole[slice(*rows)])


def test_a_rank_that_reads_its_experts_touches_no_others(opened, monkeypatch):
    source, _ = opened
    touched = []
    pickled = source.kind == "mistral-dump"  # whose reading in order goes through flat
    method = "flat" if pickled else "read_into"
    real = getattr(source.store, method)

    def count(name, start, last):
        touched.append(last - start if pickled else last.size)
        return real(name, start, last)

    monkeypatch.setattr(source.store, method, count)
    source.read("layers.0.moe.experts.w1", rows=(2, 3))
    assert sum(touched) == 48 * 32


def test_what_is_read_is_the_callers_own(opened):
    source, _ = opened
    first = source.read("norm.weight", "keep")
    first[...] = 0
    assert source.read("norm.weight", "keep").any()


def test_pieces_say_where_a_tensor_comes_from(opened):
    source, _ = opened
    pieces = source.pieces("layers.1.moe.experts.w3")
    assert sum(piece.block.size for piece in pieces) == 4 * 48 * 32
    assert {piece.source for piece in pieces} <= set(source.tensors)


@pytest.mark.parametrize("rows", [(0, 5), (-1, 2), (3, 2)])
def test_rows_that_are_not_there(opened, rows):
    with pytest.raises(CheckpointError, match=r"no such rows: .*experts\.w1: .*it has 4"):
        opened[0].read("layers.0.moe.experts.w1", rows=rows)


def test_wrong_questions(opened):
    with pytest.raises(CheckpointError, match=r"no such tensor: .*layers\.9"):
        opened[0].read("layers.9.moe.experts.w1")
    with pytest.raises(CheckpointError, match="unknown dtype: dtype: 'int8'"):
        opened[0].read("norm.weight", "int8")


def test_overflow_names_the_tensor(tmp_path, tiny_config, save_random):
    arrays = save_random(tmp_path / "ours", tiny_config)
    from mistral_ms.checkpoint import save_native

    arrays["layers.1.moe.experts.w2"][2, 0, 0] = 70000.0
    arrays["layers.1.moe.experts.w2"][1, 0, 0] = np.inf  # was infinite before: not an overflow
    tensors = [(n, a.shape, "float32", a) for n, a in arrays.items()]
    save_native(tmp_path / "large", tiny_config, tensors)
    message = r"overflow: .*layers\.1\.moe\.experts\.w2.*: 1 values up to 70000: must fit float16"
    with (
        open_(tmp_path / "large") as source,
        pytest.raises(CheckpointError, match=message),
    ):
        source.read("layers.1.moe.experts.w2", "float16")
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "large", tmp_path / "out", dtype="fp16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["large", "ours"]


def test_experts_of_different_dtypes_need_a_choice(tmp_path, foreign):
    from safetensors.torch import load_file, save_file

    hf = foreign.hf(tmp_path / "hf", "mixtral", torch.bfloat16)
    state = load_file(hf / "model.safetensors")
    name = "model.layers.0.block_sparse_moe.experts.2.w1.weight"
    state[name] = state[name].float()
    save_file(state, hf / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"mixed dtypes: layers\.0\.moe\.experts\.w1: .*--dtype"
    ):
        convert(hf, tmp_path / "out")
    assert convert(hf, tmp_path / "out", dtype="fp32").tensors > 0
    with open_(hf) as source:
        stacked = source.read("layers.0.moe.experts.w1")
        np.testing.assert_array_equal(stacked[2], state[name].numpy())
