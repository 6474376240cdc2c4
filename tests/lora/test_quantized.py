"""Adapters beside experts that stay quantised, against those beside the dequantised weights."""

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from support.hf import make_pair
from support.lora import training_config

from mistral_ms.checkpoint import convert, open_checkpoint
from mistral_ms.checkpoint.load import kept_quantization, load_weights
from mistral_ms.config import DROPLESS, LoraConfig, RoutingConfig
from mistral_ms.config.quantization import Quantization
from mistral_ms.models.quantized import quantized_model
from mistral_ms.models.shared import share_parameters
from mistral_ms.training import make_objective

LORA = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "gate", "w1", "w2", "w3"])
HOW = {
    "int8": Quantization(weights="int8"),
    "int4": Quantization(weights="int4", group_size=16),
}
ROUTINGS = [DROPLESS, RoutingConfig(policy="capacity", capacity_factor=1.1)]


@pytest.fixture(scope="module", params=sorted(HOW))
def saved(request, tmp_path_factory):
    """A quantised checkpoint of two blocks."""
    root = tmp_path_factory.mktemp(request.param)
    pair = make_pair(
        "mixtral", vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=4,
        num_local_experts=4,
    )  # fmt: skip
    pair.hf.save_pretrained(root / "hf")
    convert(root / "hf", root / "q", quantize=HOW[request.param])
    return root / "q"


def model_of(path, routing, kept, lora=LORA):
    """With adapters whose B is not zero."""
    with open_checkpoint(path) as source:
        how = kept_quantization(source, "float32", lora=lora) if kept else None
        assert (how is not None) == kept
        config = source.config.model_copy(update={"lora": lora})
        model = quantized_model(config, routing, how, positions=64)
        adapters = model.stored_weights()
        load_weights(source, {n: p for n, p in model.weights().items() if n not in adapters})
    draw = np.random.default_rng(5)
    for parameter in adapters.values():
        values = 0.2 * draw.standard_normal(parameter.shape)
        parameter.set_data(Tensor(values.astype(np.float32)))
    return model


def gradients(model, mode):
    """Loss and gradients of the adapters, of one batch."""
    objective = make_objective(model, training_config())
    trained = model.stored_weights()
    ids = np.random.default_rng(6).integers(3, 64, (2, 12)).astype(np.int32)
    labels = np.roll(ids, -1, axis=1)
    places = np.tile(np.arange(12, dtype=np.int32), (2, 1))
    before = ms.get_context("mode")
    ms.set_context(mode=mode)
    try:
        compute = ms.value_and_grad(objective, None, list(trained.values()), has_aux=True)
        (loss, _), found = compute(*map(Tensor, (ids, labels, places)))
    finally:
        ms.set_context(mode=before)
    return loss.asnumpy(), {n: g.asnumpy() for n, g in zip(trained, found, strict=True)}


@pytest.mark.parametrize("routing", ROUTINGS, ids=["dropless", "capacity"])
def test_gradients_are_those_beside_the_dequantised_weights(saved, routing):
    """Of w1 and w3, which have the same shape, each its own."""
    # one case compiled: a graph takes seconds
    compiled = "int4" in str(saved) and routing is ROUTINGS[1]
    mode = ms.GRAPH_MODE if compiled else ms.PYNATIVE_MODE
    loss, found = gradients(model_of(saved, routing, True), mode)
    wanted_loss, wanted = gradients(model_of(saved, routing, False), ms.PYNATIVE_MODE)
    # the order of float32 sums, in which the scale is taken after or before
    np.testing.assert_allclose(loss, wanted_loss, rtol=1e-5)
    assert set(found) == set(wanted) and len(found) == 20
    for name, values in wanted.items():
        assert np.abs(values).max() > 0, name
        np.testing.assert_allclose(
            found[name], values, rtol=0, atol=2e-5 * np.abs(values).max(), err_msg=name
        )


def test_a_second_model_shares_codes_and_adapters(saved):
    """As held-out data are evaluated on while the first is trained."""
    model = model_of(saved, DROPLESS, True)
    shared = share_parameters(model, DROPLESS, positions=64)
    ids = Tensor(np.arange(3, 15, dtype=np.int32).reshape(1, 12))
    places = Tensor(np.arange(12, dtype=np.int32).reshape(1, 12))
    np.testing.assert_array_equal(shared(ids, places).asnumpy(), model(ids, places).asnumpy())
    held, own = shared.weights(), model.weights()
    assert {name for name in own if own[name] is held[name]} == set(own)


def test_lengths_of_rows_need_weights(saved):
    """Decomposed adapters of experts; those of attention alone do not."""
    with open_checkpoint(saved) as source:
        for names, stays in ((["w2"], False), (["q_proj"], True)):
            lora = LoraConfig(target_modules=names, use_dora=True)
            assert (kept_quantization(source, "float32", lora=lora) is not None) == stays
