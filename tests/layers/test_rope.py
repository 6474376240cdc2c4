"""Angles bit-equal to Hugging Face's; cosines and sines the nearest floats to the true values."""

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor
from transformers import MistralConfig, MixtralConfig
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

from mistral_ms.config import ModelConfig
from mistral_ms.layers import RotaryTable, rope_angles

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


def model_config(theta, head_dim, positions=POSITIONS):
    return ModelConfig(
        vocab_size=8,
        hidden_size=2 * head_dim,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=head_dim,
        rope_theta=theta,
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
    places = torch.arange(POSITIONS)[None, None, :].float()
    return module, (frequencies @ places).transpose(1, 2)[0].numpy()


@pytest.mark.parametrize("shape", SHAPES)
def test_angles_are_bit_equal_to_hugging_face(shape):
    theta, head_dim = SHAPES[shape]
    _, want = hf_rotary(theta, head_dim)
    got = rope_angles(theta, head_dim, POSITIONS)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got.view(np.int32), want.view(np.int32))


def test_angles_are_bit_equal_to_mistrals_module_too():
    _, want = hf_rotary(1e4, 128, "mistral")
    np.testing.assert_array_equal(rope_angles(1e4, 128, POSITIONS), want)


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
