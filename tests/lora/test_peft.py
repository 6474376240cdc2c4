"""The peft library itself, where it is installed: its files, logits, trainings, merged models.

Beside transformers 4 or 5, whichever is installed: with 5 it adapts stacked experts, not with DoRA.
"""

import copy

import numpy as np
import pytest
import torch
from mindspore import Tensor
from safetensors.numpy import load_file
from support.hf import STACKED, hf_logits
from support.lora import (
    MISTRAL,
    MIXTRAL,
    adapted_model,
    as_peft,
    our_training,
    tiny_pair,
    torch_training,
    training_config,
)

from mistral_ms.alignment import align
from mistral_ms.checkpoint import convert
from mistral_ms.checkpoint.adapters import open_adapter, write_peft

peft = pytest.importorskip("peft", reason="the peft library is not installed")

GATE_UP, DOWN, GATE = "mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.gate.weight"
MIXTRAL_4 = {
    "mixtral-dora": ("mixtral", dict(r=4, target_modules=list(MIXTRAL), use_dora=True)),
    "mixtral-experts": ("mixtral", dict(r=2, target_modules=r".*experts\.\d+\.w[13]")),
}
MIXTRAL_5 = {
    "mixtral-stacked": (
        "mixtral",
        dict(
            r=4, target_modules=["v_proj"], target_parameters=[GATE_UP, DOWN, GATE], use_rslora=True
        ),
    ),
    "mixtral-gate-up": ("mixtral", dict(r=2, target_modules=[], target_parameters=[GATE_UP])),
    "mixtral-down": (
        "mixtral",
        dict(r=4, target_modules=["q_proj", "o_proj"], target_parameters=["0." + DOWN, GATE]),
    ),
}
ALIGNED, TRAINED = ("mixtral-stacked", "mixtral-down") if STACKED else ("mixtral-dora",) * 2
"""To train an adapter of gate_up_proj here is another training: w1 and w3 share no A."""
CASES = {
    "mixtral-lora": ("mixtral", dict(r=4, lora_alpha=6, target_modules=list(MIXTRAL))),
    **(MIXTRAL_5 if STACKED else MIXTRAL_4),
    "mistral-rslora": ("mistral", dict(r=4, target_modules=list(MISTRAL), use_rslora=True)),
    "mistral-all-linear": ("mistral", dict(r=4, target_modules="all-linear", use_dora=True)),
}
IDS = np.random.default_rng(0).integers(3, 64, (2, 7)).astype(np.int32)
POSITIONS = np.array([[*range(7)], [*range(5), -1, -1]], np.int32)


def made(case, tmp_path):
    """A model of PEFT with adapters that are not zero, saved; and the base."""
    kind, settings = CASES[case]
    pair = tiny_pair(kind)
    bare = copy.deepcopy(pair)
    torch.manual_seed(1)
    model = peft.get_peft_model(pair.hf, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, each in model.named_parameters():
            if "lora_B" in name:
                each.copy_(0.2 * torch.randn_like(each))
            elif "magnitude" in name:
                each.mul_(1 + 0.1 * torch.randn_like(each))
    model.save_pretrained(tmp_path / "adapter")
    return bare, model, tmp_path / "adapter"


def logits_of(model, bare):
    return hf_logits(type(bare)(model, bare.config), IDS, POSITIONS)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_files(case, tmp_path):
    """PEFT's file here, and ours in PEFT, give its logits; the merged model does, too."""
    bare, model, path = made(case, tmp_path)
    wanted = logits_of(model.eval(), bare)
    real, largest = POSITIONS >= 0, np.abs(wanted).max()
    ours = adapted_model(bare, path)
    logits = ours(Tensor(IDS), Tensor(POSITIONS)).asnumpy()
    assert np.abs(logits - wanted)[real].max() < 1e-5 * largest

    written = as_peft(ours, tmp_path)
    if STACKED:
        with open_adapter(tmp_path / "ours", bare.config) as source:
            write_peft(source, tmp_path / "fused", None, fused=True)
        again = peft.PeftModel.from_pretrained(copy.deepcopy(bare.hf), tmp_path / "fused").eval()
        assert np.abs(logits_of(again, bare) - wanted)[real].max() < 1e-5 * largest
    if case not in MIXTRAL_5:  # of these PEFT does not understand version 4's names
        again = peft.PeftModel.from_pretrained(copy.deepcopy(bare.hf), tmp_path / "peft").eval()
        found = logits_of(again, bare)
        if STACKED and case == "mixtral-lora":  # w1 and w3 become one adapter of twice the rank
            assert np.abs(found - wanted)[real].max() < 1e-5 * largest
        else:
            theirs = load_file(path / "adapter_model.safetensors")
            assert set(written) == set(theirs)
            for name, values in theirs.items():
                np.testing.assert_array_equal(written[name], values)
            np.testing.assert_array_equal(found, wanted)

    bare.hf.save_pretrained(tmp_path / "base")
    convert(tmp_path / "base", tmp_path / "merged", "hf", merge=path)
    found = load_file(tmp_path / "merged" / "model.safetensors")
    model.merge_and_unload().save_pretrained(tmp_path / "reference")
    reference = load_file(tmp_path / "reference" / "model.safetensors")
    assert set(found) == set(reference)
    for name, values in reference.items():
        # products in another order, in float32
        np.testing.assert_allclose(found[name], values, atol=1e-6, err_msg=name)


@pytest.mark.slow
@pytest.mark.usefixtures("strict_graphs")
@pytest.mark.parametrize("case", [TRAINED, "mistral-rslora"])
def test_training(case, tmp_path):
    """Losses, gradient norms and adapters of 20 steps under torch's AdamW."""
    bare, model, path = made(case, tmp_path)
    ours, config = adapted_model(bare, path), training_config()
    results = our_training(ours, config)
    wanted = list(torch_training(model.eval(), config))  # no dropout anywhere
    np.testing.assert_allclose([r.loss for r in results], [w[0] for w in wanted], rtol=1e-5)
    np.testing.assert_allclose([r.grad_norm for r in results], [w[1] for w in wanted], rtol=1e-4)
    model.save_pretrained(tmp_path / "trained")
    reference = load_file(tmp_path / "trained" / "adapter_model.safetensors")
    if TRAINED == "mixtral-down":  # as ours are named
        with open_adapter(tmp_path / "trained", bare.config) as source:
            reference = {name: source.read(name) for name in source.names()}
        found = {name: each.asnumpy() for name, each in ours.stored_weights().items()}
    else:
        found = as_peft(ours, tmp_path)
    assert set(found) == set(reference)
    for name, values in reference.items():
        np.testing.assert_allclose(found[name], values, atol=1e-5, err_msg=name)
    assert results[-1].lm_loss < results[0].lm_loss - 0.1


@pytest.mark.slow
@pytest.mark.parametrize("form", ["peft", "ours"])
def test_align(form, tmp_path):
    """The command's comparison, PEFT on Hugging Face's side; and it fails where they differ."""
    bare, _, path = made(ALIGNED, tmp_path)
    bare.hf.save_pretrained(tmp_path / "base")
    if form == "ours":
        as_peft(adapted_model(bare, path), tmp_path)
        path = tmp_path / "ours"
    ids = [row.tolist() for row in IDS]
    said = []
    result = align(tmp_path / "base", ids=ids, new_tokens=3, adapter=path, say=said.append)
    assert not result.failures
    assert f"adapter on both sides: {path}" in said
    convert(tmp_path / "base", tmp_path / "merged", "hf", merge=path)
    apart = align(tmp_path / "base", tmp_path / "merged", ids=ids, new_tokens=0)
    assert apart.failures, "the adapter must matter"
