"""Generation with experts that stay quantised, against transformers with dequantised weights."""

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor
from support.hf import make_pair
from support.models import fill, positions
from transformers import AutoModelForCausalLM

from mistral_ms.checkpoint import convert, open_checkpoint
from mistral_ms.checkpoint.load import kept_quantization, load_weights
from mistral_ms.config import DROPLESS, GenerationConfig, RoutingConfig
from mistral_ms.config.quantization import Quantization
from mistral_ms.errors import CheckpointError
from mistral_ms.inference import Engine
from mistral_ms.models import CausalLM
from mistral_ms.models.quantized import quantized_model

PROMPTS = [[1, 5, 9, 200, 31, 8, 8, 17, 90, 44, 3], [1, 77]]
HOW = {
    "int8": Quantization(weights="int8"),
    "int4": Quantization(weights="int4", group_size=16),
}


@pytest.fixture(scope="module", params=sorted(HOW))
def saved(request, tmp_path_factory):
    """A quantised checkpoint of ours, and transformers' model of what it stands for."""
    root = tmp_path_factory.mktemp(request.param)
    make_pair("mixtral", eos_token_id=None).hf.save_pretrained(root / "hf")
    convert(root / "hf", root / "q", quantize=HOW[request.param])
    convert(root / "q", root / "wide", dtype="fp32")
    return root / "q", AutoModelForCausalLM.from_pretrained(root / "wide")


def test_greedy_tokens_are_those_of_the_dequantised_weights(saved):
    """Prompts in chunks take the product of packed rows, tokens that of few choices."""
    path, hf = saved
    compiled = "int4" in str(path)  # int8 operator by operator: a graph takes seconds to compile
    engine = Engine.load(
        path, batch=2, max_length=48, chunk=8, with_tokenizer=False, graph=compiled
    )
    dtypes = {str(each.dtype) for each in engine.model.weights().values()}
    assert dtypes & {"Int8", "UInt8"}
    found = engine.generate(PROMPTS, GenerationConfig(max_new_tokens=12))
    for prompt, done in zip(PROMPTS, found.completions, strict=True):
        wanted = hf.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
        assert list(done.token_ids) == wanted[0, len(prompt) :].tolist()


@pytest.mark.parametrize("routing", [DROPLESS, RoutingConfig(policy="capacity", capacity_factor=1)])
def test_logits_are_those_of_the_dequantised_weights(saved, routing):
    """With slots, where matrices are dequantised, the same sums of the same numbers."""
    path, _ = saved
    ids = np.array([PROMPTS[0]], np.int32)
    inputs = Tensor(ids), Tensor(positions([ids.shape[1]], ids.shape[1]))
    with open_checkpoint(path) as source:
        kept = kept_quantization(source, "float32")
        model = quantized_model(source.config, routing, kept, positions=64)
        load_weights(source, model.weights())
        plain = CausalLM(source.config, routing, positions=64)
        fill(plain, {name: source.read(name) for name in source.names()})
    found, wanted = (each(*inputs).asnumpy() for each in (model, plain))
    # the order of float32 sums, in which the scale is taken after or before
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_where_they_cannot_stay_they_become_weights(saved):
    path, _ = saved
    with open_checkpoint(path) as source:
        assert kept_quantization(source, "float16") is None
        assert kept_quantization(source, "float32", world=2) is None
        assert kept_quantization(source, "bfloat16") == source.quantization
        model = CausalLM(source.config, positions=64)
        load_weights(source, model.weights())
    name = "layers.0.moe.experts.w1"
    with open_checkpoint(path) as source:
        np.testing.assert_array_equal(model.weights()[name].asnumpy(), source.read(name))
    quantized = quantized_model(model.config, DROPLESS, HOW["int8"], positions=64)
    assert quantized.weights()[name].dtype == ms.int8
    assert not quantized.weights()[name].requires_grad
    with (
        open_checkpoint(path.parent / "wide") as source,
        pytest.raises(CheckpointError, match="no quantised experts"),
    ):
        load_weights(source, quantized.weights())
