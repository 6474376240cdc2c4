"""Mistral's own formats: the RoPE permutation, the first dump, and every way round."""

import json

import numpy as np
import pytest
import torch

from mistral_ms.checkpoint import convert, open_checkpoint

KINDS = ["mixtral", "mistral", "head_dim", "multi_query"]


def state_of(path):
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("kind", KINDS)
def test_mistral_to_hf_undoes_the_permutation(tmp_path, foreign, assert_same_bits, kind):
    mistral = foreign.mistral(tmp_path / "mistral", kind)
    result = convert(mistral, tmp_path / "hf", "hf")
    assert (result.source_kind, result.target_kind) == ("mistral", "hf")
    expected = foreign.hf(tmp_path / "expected", kind, torch.bfloat16)
    assert_same_bits(foreign.read(expected), foreign.read(tmp_path / "hf"))


@pytest.mark.parametrize("kind", KINDS)
def test_mistral_to_ours_to_mistral_is_bit_identical(tmp_path, foreign, assert_same_bits, kind):
    mistral = foreign.mistral(tmp_path / "mistral", kind, torch.float32)
    convert(mistral, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", "mistral")
    assert_same_bits(foreign.read(mistral), foreign.read(tmp_path / "back"))
    params = json.loads((mistral / "params.json").read_text())
    written = json.loads((tmp_path / "back" / "params.json").read_text())
    assert {key: written[key] for key in params} == params


@pytest.mark.parametrize("kind", KINDS)
def test_hf_to_mistral_to_hf_is_bit_identical(tmp_path, foreign, assert_same_bits, kind):
    hf = foreign.hf(tmp_path / "hf", kind, torch.bfloat16)
    convert(hf, tmp_path / "mistral", "mistral")
    expected = foreign.mistral(tmp_path / "expected", kind)
    assert_same_bits(foreign.read(expected), foreign.read(tmp_path / "mistral"))
    convert(tmp_path / "mistral", tmp_path / "back", "hf")
    assert_same_bits(foreign.read(hf), foreign.read(tmp_path / "back"))


def test_consolidated_pth_holds_the_same_as_safetensors(tmp_path, foreign, assert_same_bits):
    pickled = foreign.mistral(tmp_path / "pth", "mixtral", pickle=True)
    convert(pickled, tmp_path / "out", "mistral")
    assert_same_bits(state_of(pickled / "consolidated.00.pth"), foreign.read(tmp_path / "out"))


@pytest.mark.parametrize("hf_params", [False, True])
def test_the_first_dump_is_taken_apart(tmp_path, foreign, assert_same_bits, hf_params):
    dump = foreign.dump(tmp_path / "dump", hf_params=hf_params)
    result = convert(dump, tmp_path / "ours")
    assert result.source_kind == "mistral-dump"
    convert(tmp_path / "ours", tmp_path / "back", "hf")
    hf = foreign.hf(tmp_path / "hf", "mixtral", torch.bfloat16)
    assert_same_bits(foreign.read(hf), foreign.read(tmp_path / "back"))


def test_the_dtype_that_params_json_does_not_say_is_taken_from_the_files(tmp_path, foreign):
    mistral = foreign.mistral(tmp_path / "mistral", "mistral", torch.float16)
    with open_checkpoint(mistral) as source:
        assert source.config.torch_dtype == "float16"


@pytest.mark.parametrize(("heads", "dim"), [(4, 8), (1, 6), (3, 2)])
def test_attention_scores_do_not_change_with_the_layout(foreign, heads, dim):
    """Rotating neighbours of Mistral's rows is rotating halves of HF's rows.

    Scores of two positions, once as mistral-inference computes them (complex numbers), once as
    transformers does (rotate_half).
    """
    rng = np.random.default_rng(heads)
    w_q, w_k = rng.standard_normal((2, heads * dim, 5))
    x = rng.standard_normal((2, 5))
    angles = 3.0 * 10.0 ** (-np.arange(0, dim, 2) / dim)

    def hf(weight, row, position):
        y = (weight @ row).reshape(heads, dim)
        cos, sin = (np.tile(f(angles * position), 2) for f in (np.cos, np.sin))
        half = np.concatenate([-y[:, dim // 2 :], y[:, : dim // 2]], axis=1)
        return y * cos + half * sin

    def mistral(weight, row, position):
        y = (weight @ row).reshape(heads, dim // 2, 2)
        turned = (y[..., 0] + 1j * y[..., 1]) * np.exp(1j * angles * position)
        return np.stack([turned.real, turned.imag], axis=-1).reshape(heads, dim)

    permuted = [foreign.pairs_from_halves(torch.from_numpy(w), heads).numpy() for w in (w_q, w_k)]
    expected = (hf(w_q, x[0], 7) * hf(w_k, x[1], 2)).sum(axis=1)
    got = (mistral(permuted[0], x[0], 7) * mistral(permuted[1], x[1], 2)).sum(axis=1)
    # Both sum a few dozen products of numbers near 1 in float64, in another order: rounding is
    # some 1e-15, a row in the wrong place is an error near 1. Scores may cancel, hence atol too.
    np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)
