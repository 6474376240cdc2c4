"""Adapters against Hugging Face's models in torch with the formula written out."""

import copy

import numpy as np
import pytest
from mindspore import Tensor
from support.hf import STACKED, hf_logits
from support.lora import (
    MISTRAL,
    MIXTRAL,
    adapted_model,
    as_file,
    as_peft,
    insert,
    our_training,
    save,
    tiny_pair,
    torch_training,
    training_config,
)

from mistral_ms.config import LoraConfig, RoutingConfig

LORA = LoraConfig(r=4, lora_alpha=6, target_modules=MIXTRAL)
EXPERTS = {  # whose modules only transformers 4 has
    "mixtral-lora": ("mixtral", LORA),
    "mixtral-dora": ("mixtral", LORA.model_copy(update={"use_dora": True})),
}
CASES = {
    **({} if STACKED else EXPERTS),
    "mistral-rslora": ("mistral", LoraConfig(r=4, target_modules=MISTRAL, use_rslora=True)),
    "mistral-dora": ("mistral", LoraConfig(r=2, target_modules=MISTRAL, use_dora=True)),
}
IDS = np.random.default_rng(0).integers(3, 64, (2, 7)).astype(np.int32)
POSITIONS = np.array([[*range(7)], [*range(5), -1, -1]], np.int32)


def made(case, tmp_path):
    kind, lora = CASES[case]
    pair = tiny_pair(kind)
    bare = copy.deepcopy(pair)
    adapted = insert(pair.hf, lora)
    path = save(tmp_path / "adapter", lora, as_file(adapted))
    return pair, bare, adapted, path


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("policy", ["dropless", "capacity"])
def test_logits(case, policy, tmp_path):
    """Packed and padded rows of experts; to float32 rounding of sums in another order."""
    pair, bare, _, path = made(case, tmp_path)
    routing = RoutingConfig(policy=policy, capacity_factor=4.0)  # nothing is dropped
    model = adapted_model(bare, path, routing)
    logits = model(Tensor(IDS), Tensor(POSITIONS)).asnumpy()
    wanted = hf_logits(pair, IDS, POSITIONS)
    real = POSITIONS >= 0
    assert np.abs(logits - wanted)[real].max() < 1e-5 * np.abs(wanted).max()
    without = hf_logits(bare, IDS, POSITIONS)
    assert np.abs(without - wanted)[real].max() > 0.1, "adapters must matter"


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [each for each in ("mixtral-dora", "mistral-rslora") if each in CASES]
)
@pytest.mark.usefixtures("strict_graphs")
def test_training(case, tmp_path):
    """Losses, gradient norms and adapters of 20 steps; the base does not change."""
    pair, bare, adapted, path = made(case, tmp_path)
    model, config = adapted_model(bare, path), training_config()
    before = {
        name: each.asnumpy().tobytes()
        for name, each in model.weights().items()
        if name not in model.stored_weights()
    }
    results = our_training(model, config)
    wanted = list(torch_training(pair.hf, config))
    np.testing.assert_allclose([r.loss for r in results], [w[0] for w in wanted], rtol=1e-5)
    np.testing.assert_allclose([r.grad_norm for r in results], [w[1] for w in wanted], rtol=1e-4)
    found, reference = as_peft(model, tmp_path), as_file(adapted)
    assert set(found) == set(reference)
    for name, values in reference.items():
        # of the sizes that the steps have, up to 20 * 5e-3
        np.testing.assert_allclose(found[name], values, atol=1e-5, err_msg=name)
    assert results[-1].lm_loss < results[0].lm_loss - 0.3
    assert before == {name: model.weights()[name].asnumpy().tobytes() for name in before}
