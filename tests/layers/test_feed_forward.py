"""The dense feed-forward against Hugging Face's."""

import numpy as np
import torch
from mindspore import Tensor
from transformers import MistralConfig
from transformers.models.mistral.modeling_mistral import MistralMLP

from mistral_ms.config import DROPLESS, ModelConfig
from mistral_ms.models import LayerFactory


def test_equals_hugging_face():
    torch.manual_seed(0)
    theirs = MistralMLP(MistralConfig(hidden_size=16, intermediate_size=40))
    config = ModelConfig(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=40,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    ours = LayerFactory(config, DROPLESS).feed_forward()
    for cell, module in (
        (ours.w1, theirs.gate_proj),
        (ours.w3, theirs.up_proj),
        (ours.w2, theirs.down_proj),
    ):
        assert cell.weight.shape == tuple(module.weight.shape)
        cell.weight.set_data(Tensor(module.weight.detach().numpy()))
    x = np.random.default_rng(0).normal(0, 3, (9, 16)).astype(np.float32)
    with torch.no_grad():
        want = theirs(torch.tensor(x)).numpy()
    # MindSpore's exponential is good to 6e-6; the rest is float32 rounding
    np.testing.assert_allclose(ours(Tensor(x)).numpy(), want, atol=1e-5 * np.abs(want).max())
