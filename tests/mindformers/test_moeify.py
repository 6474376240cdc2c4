"""``moeify`` on MindFormers' own Llama."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from support.mindformers_cpu import run_on_cpu

from mistral_ms.mixtures.moeify import moeify


@pytest.fixture
def llama():
    """Two layers on the CPU, in PyNative."""
    pytest.importorskip("mindformers.core", reason="MindFormers is not installed")
    from mindformers.models.llama import LlamaConfig, LlamaForCausalLM

    types = ("compute_dtype", "param_init_type", "layernorm_compute_type")
    config = LlamaConfig(
        batch_size=1, seq_length=8, hidden_size=16, num_layers=2, num_heads=2, n_kv_heads=1,
        intermediate_size=24, vocab_size=11, use_flash_attention=False, fused_rms_norm=False,
        pad_token_id=-1, checkpoint_name_or_path="",
        **dict.fromkeys((*types, "softmax_compute_type", "rotary_dtype"), "float32"),
    )  # fmt: skip
    before = ms.get_context("mode")
    ms.set_context(mode=ms.PYNATIVE_MODE)
    yield run_on_cpu(LlamaForCausalLM(config))
    ms.set_context(mode=before)


def test_their_feed_forwards_become_mixtures(llama):
    """Copies change nothing, whatever the gate chooses; in training the chosen experts have
    gradients.
    """
    ids = Tensor(np.random.default_rng(0).integers(0, 11, (1, 8)).astype(np.int32))
    llama.set_train(False)
    before = llama(ids)[0].asnumpy()
    layers = moeify(llama, 3, layers="*.feed_forward")
    assert list(layers) == ["model.layers.0.feed_forward", "model.layers.1.feed_forward"]
    kinds = {type(each).__name__ for layer in layers.values() for each in layer.experts}
    assert kinds == {"LlamaFeedForward"}
    # the weights of two equal experts add up to 1 but for rounding
    np.testing.assert_allclose(llama(ids)[0].asnumpy(), before, rtol=0, atol=1e-6)
    assert np.abs(before).max() > 0.01

    llama.set_train()
    longer = Tensor(np.random.default_rng(1).integers(0, 11, (1, 9)).astype(np.int32))
    trained = [p for layer in layers.values() for p in layer.trainable_params()]
    loss, gradients = ms.value_and_grad(llama, None, trained)(longer)
    assert np.isfinite(float(loss if isinstance(loss, Tensor) else loss[0]))
    counts = {name: layer.update_gate() for name, layer in layers.items()}
    assert all(counts[name].sum() == 16 for name in layers)  # two choices of 8 tokens
    for parameter, gradient in zip(trained, gradients, strict=True):
        layer = next(name for name in layers if parameter.name.startswith(name))
        inner = parameter.name[len(layer) + 1 :]
        expert = int(inner.split(".")[1]) if inner.startswith("experts.") else None
        moved = bool(np.abs(gradient.asnumpy()).max() > 0)
        if expert is not None:
            assert moved == (counts[layer][expert] > 0), parameter.name
