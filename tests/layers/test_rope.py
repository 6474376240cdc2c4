"""Angles bit-equal to Hugging Face's; cosines and sines the nearest floats to the true values."""

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor
from transformers import MistralConfig, MixtralConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

from mistral_ms.config import ModelConfig
from mistral_ms.layers import RotaryTable, inverse_frequencies, rope_angles

POSITIONS = 32768
SHAPES = {
    "mixtral": (1e6, 128),
    "mistral-v0.1": (1e4, 128),
    "head-dim-24": (1e6, 24),
    "head-dim-64": (1e6, 64),
    "head-dim-96": (1e6, 96),
    "head-dim-2": (1e4, 2),
    "old-base-head-dim-24": (1e4, 24),
    "old-base-head-dim-64": (1e4, 64),
    "old-base-head-dim-96": (1e4, 96),
    "base-that-is-no-float32": (189327.04, 128),
    "base-5e5": (5e5, 128),
    "base-1e8": (1e8, 128),
}


def model_config(theta, head_dim, positions=POSITIONS, scaling=None):
    return ModelConfig(
        vocab_size=8,
        hidden_size=2 * head_dim,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=scaling,
        max_position_embeddings=positions,
    )


def hf_rotary(theta, head_dim, family="mixtral"):
    """Hugging Face's own module, and the angles as its forward forms them."""
    config_class, rotary = {
        "mixtral": (MixtralConfig, MixtralRotaryEmbedding),
        "mistral": (MistralConfig, MistralRotaryEmbedding),
    }[family]
    module = rotary(
        config_class(
            hidden_size=2 * head_dim, num_attention_heads=2, head_dim=head_dim, rope_theta=theta
        )
    )
    frequencies = module.inv_freq[None, :, None].float()
    position_ids = torch.arange(POSITIONS)[None, None, :].float()
    return module, (frequencies @ position_ids).transpose(1, 2)[0].numpy()


@pytest.mark.parametrize("shape", SHAPES)
def test_angles_are_bit_equal_to_hugging_face(shape):
    theta, head_dim = SHAPES[shape]
    _, want = hf_rotary(theta, head_dim)
    got = rope_angles(inverse_frequencies(model_config(theta, head_dim), POSITIONS)[0], POSITIONS)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got.view(np.int32), want.view(np.int32))


def test_angles_are_bit_equal_to_mistrals_module_too():
    _, want = hf_rotary(1e4, 128, "mistral")
    frequencies, _ = inverse_frequencies(model_config(1e4, 128), POSITIONS)
    np.testing.assert_array_equal(rope_angles(frequencies, POSITIONS), want)


@pytest.mark.parametrize("shape", ["mixtral", "mistral-v0.1", "head-dim-24"])
def test_each_entry_is_the_float_nearest_to_the_true_value(shape):
    """The true cosine of the float32 angle, computed in float64, rounded once."""
    theta, head_dim = SHAPES[shape]
    _, angles = hf_rotary(theta, head_dim)
    table = RotaryTable(model_config(theta, head_dim), POSITIONS)
    for ours, exact in (
        (table.cos.numpy(), np.cos(angles.astype(np.float64))),
        (table.sin.numpy(), np.sin(angles.astype(np.float64))),
    ):
        assert ours.shape == (POSITIONS, head_dim // 2)
        np.testing.assert_array_equal(ours, exact.astype(np.float32))


def test_tables_are_within_one_unit_of_torchs():
    """Not bit for bit: torch evaluates cosines by MKL or SLEEF, whose last bit is not always the
    nearest one and depends on the processor; the angles are, and ours are the nearest floats."""
    module, _ = hf_rotary(1e6, 128)
    with torch.no_grad():
        cos, sin = module(torch.zeros(1), torch.arange(POSITIONS)[None])
    table = RotaryTable(model_config(1e6, 128), POSITIONS)
    for ours, theirs in ((table.cos.numpy(), cos), (table.sin.numpy(), sin)):
        theirs = theirs[0, :, :64].numpy()
        unit = np.spacing(np.maximum(np.abs(ours), np.abs(theirs)))
        assert (np.abs(ours.astype(np.float64) - theirs) <= unit).all()
        assert (ours != theirs).mean() < 0.10  # 5 % measured


def kind(name, **settings):
    return {"rope_type": name, **settings}


LLAMA3 = dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
SCALINGS = {
    "linear": kind("linear", factor=4.0),
    "linear-by-3": kind("linear", factor=3.0),
    "dynamic": kind("dynamic", factor=4.0),
    "dynamic-by-2.3": kind("dynamic", factor=2.3),
    "yarn": kind("yarn", factor=4.0, original_max_position_embeddings=8192),
    "yarn-without-an-original-length": kind("yarn", factor=16.0),
    "yarn-with-everything": kind(
        "yarn",
        factor=40.0,
        original_max_position_embeddings=4096,
        beta_fast=24.0,
        beta_slow=2.0,
        mscale=0.707,
        mscale_all_dim=1.0,
        truncate=False,
    ),
    "yarn-with-an-attention-factor": kind("yarn", factor=8.0, attention_factor=1.25),
    "yarn-with-a-steep-ramp": kind(
        "yarn", factor=8.0, beta_fast=1.0, beta_slow=1.0, original_max_position_embeddings=64
    ),
    "llama3": kind("llama3", factor=8.0, **LLAMA3),
    "llama3-by-32": kind("llama3", factor=32.0, **LLAMA3),
}


class TestScaling:
    @pytest.mark.parametrize("head_dim", [128, 64, 24])
    @pytest.mark.parametrize("theta", [1e4, 1e6])
    @pytest.mark.parametrize("name", SCALINGS)
    def test_frequencies_are_bit_equal_to_transformers(self, name, theta, head_dim):
        scaling = SCALINGS[name]
        theirs = MixtralConfig(
            hidden_size=2 * head_dim,
            num_attention_heads=2,
            head_dim=head_dim,
            rope_theta=theta,
            rope_scaling=dict(scaling),  # transformers 5 writes into it
            max_position_embeddings=8192,
        )
        compute = ROPE_INIT_FUNCTIONS[scaling["rope_type"]]
        ours = model_config(theta, head_dim, 8192, scaling)
        for length in (None, 8192, 8193, 15001, 20000):
            # the length comes from the positions, as a tensor
            seq_len = None if length is None else torch.tensor(length)
            want, factor = compute(theirs, torch.device("cpu"), seq_len=seq_len)
            got = inverse_frequencies(ours, length or 1)
            assert got[0].dtype == np.float32
            np.testing.assert_array_equal(got[0].view(np.int32), want.numpy().view(np.int32))
            assert got[1] == factor

    def test_the_attention_factor_scales_both_tables(self):
        module = MixtralRotaryEmbedding(
            MixtralConfig(
                hidden_size=32, num_attention_heads=2, head_dim=16,
                rope_scaling=dict(SCALINGS["yarn"]), max_position_embeddings=32768,
            )
        )  # fmt: skip
        cos, sin = module(torch.zeros(1), torch.arange(50)[None])
        table = RotaryTable(model_config(1e6, 16, 32768, SCALINGS["yarn"]), 50)
        # the cosines of torch are an ulp or two off the nearest float
        np.testing.assert_allclose(table.cos.numpy(), cos[0, :, :8], rtol=3e-7, atol=1e-7)
        np.testing.assert_allclose(table.sin.numpy(), sin[0, :, :8], rtol=3e-7, atol=1e-7)
        assert table.cos.numpy()[0, 0] == np.float32(0.1 * np.log(4.0) + 1)

    def test_dynamic_scaling_is_that_of_the_tables_length(self):
        config = model_config(1e4, 16, 32, SCALINGS["dynamic"])
        plain = RotaryTable(model_config(1e4, 16, 32), 32).sin.numpy()
        np.testing.assert_array_equal(RotaryTable(config, 32).sin.numpy(), plain)
        assert (RotaryTable(config, 33).sin.numpy()[1:32, 1:] < plain[1:32, 1:]).any()


def test_rows_of_positions_and_of_padding():
    table = RotaryTable(model_config(1e4, 8, 50), 50)
    positions = np.array([[3, 0, 49], [7, -1, -1]], np.int32)
    cos, sin = table(Tensor(positions))
    assert cos.shape == sin.shape == (2, 3, 1, 4)
    np.testing.assert_array_equal(cos.numpy()[0, 2, 0], table.cos.numpy()[49])
    np.testing.assert_array_equal(sin.numpy()[1, 0, 0], table.sin.numpy()[7])
    assert (cos.numpy()[1, 1:] == 1).all()
    assert (sin.numpy()[1, 1:] == 0).all()


def test_tables_are_not_parameters():
    assert not list(RotaryTable(model_config(1e4, 8, 50), 50).get_parameters())
    assert RotaryTable(model_config(1e4, 8, 50), 50).cos.dtype == ms.float32
