"""Merged weights equal base plus change, in every format and dtype; names that fit nothing."""

import json
import sys

import numpy as np
import pytest
import torch
from mindspore import Tensor
from safetensors.numpy import load_file, save_file
from support.hf import STACKED, Pair, hf_logits
from support.lora import MISTRAL, MIXTRAL, as_file, insert, save, tiny_pair

from mistral_ms import AutoModelForCausalLM
from mistral_ms.alignment import align
from mistral_ms.checkpoint import convert, open_checkpoint, open_merged
from mistral_ms.config import LoraConfig
from mistral_ms.errors import CheckpointError, ConfigError, MissingExtraError

IDS = np.random.default_rng(0).integers(3, 64, (2, 7)).astype(np.int32)
POSITIONS = np.tile(np.arange(7, dtype=np.int32), (2, 1))
EXPERTS = {  # whose modules only transformers 4 has
    "mixtral": LoraConfig(r=4, lora_alpha=6, target_modules=MIXTRAL, use_dora=True),
}
CASES = {
    **({} if STACKED else EXPERTS),
    "mistral": LoraConfig(r=4, target_modules=MISTRAL, use_rslora=True),
}


@pytest.fixture(scope="module", params=CASES)
def made(request, tmp_path_factory):
    """A base, an adapter of PEFT's files, and the merged matrices by Hugging Face's names."""
    root, lora = tmp_path_factory.mktemp(request.param), CASES[request.param]
    pair = tiny_pair(request.param)
    pair.hf.save_pretrained(root / "base")
    merged = {name: p.detach().clone() for name, p in pair.hf.named_parameters()}
    adapted = insert(pair.hf, lora)
    path = save(root / "adapter", lora, as_file(adapted))
    with torch.no_grad():
        for name, each in adapted.items():
            I = each.A.shape[1]  # noqa: E741
            merged[f"{name}.weight"] = each(torch.eye(I)).T
    return root, pair, path, {name: values.numpy() for name, values in merged.items()}


def logits(model):
    return model(Tensor(IDS), Tensor(POSITIONS)).asnumpy()


@pytest.mark.parametrize("middle", [None, "mistral", "mistral_ms"])
def test_merged_while_converted(made, middle, tmp_path):
    """From Hugging Face's files, from rows in Mistral's order, from stacked experts."""
    root, _, adapter, wanted = made
    start = root / "base"
    if middle is not None:
        convert(start, tmp_path / "middle", middle)
        start = tmp_path / "middle"
    convert(start, tmp_path / "merged", "hf", merge=adapter)
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert set(found) == set(wanted)
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, atol=1e-6, err_msg=name)
    if middle is None:  # into rows in Mistral's order, and back
        convert(start, tmp_path / "theirs", "mistral", merge=adapter)
        convert(tmp_path / "theirs", tmp_path / "back", "hf")
        again = load_file(tmp_path / "back" / "model.safetensors")
        for name, values in found.items():
            np.testing.assert_array_equal(again[name], values)


def test_rounded_once(made, tmp_path):
    """A base in 16 bits: the sum is formed in float32."""
    root, _, adapter, _ = made
    convert(root / "base", tmp_path / "half", "hf", "bf16")
    convert(tmp_path / "half", tmp_path / "wide", "hf", "fp32", merge=adapter)
    convert(tmp_path / "half", tmp_path / "kept", "hf", merge=adapter)
    convert(tmp_path / "wide", tmp_path / "rounded", "hf", "bf16")
    for name in ("kept", "rounded"):
        assert (tmp_path / name / "model.safetensors").stat().st_size
    kept = (tmp_path / "kept" / "model.safetensors").read_bytes()
    assert kept == (tmp_path / "rounded" / "model.safetensors").read_bytes()


def test_a_part_of_a_process(made):
    """What a rank reads of a matrix is that part of the merged one."""
    root, _, adapter, _ = made
    with open_merged(root / "base", adapter=adapter) as source:
        for name in source.names():
            whole = source.read(name)
            part = tuple(slice(n // 2, n) for n in whole.shape)
            np.testing.assert_array_equal(source.read_slice(name, part), whole[part])


def test_from_python(made):
    """Loaded with the model, and added to it later."""
    root, pair, adapter, _ = made
    wanted = hf_logits(Pair(pair.hf, pair.config), IDS, POSITIONS)
    model = AutoModelForCausalLM.from_pretrained(root / "base", adapter=adapter)
    assert np.abs(logits(model.model) - wanted).max() < 1e-5 * np.abs(wanted).max()
    later = AutoModelForCausalLM.from_pretrained(root / "base")
    later.load_adapter(adapter)
    np.testing.assert_allclose(logits(later.model), logits(model.model), atol=1e-6)


def test_alignment_asks_for_peft(made, monkeypatch):
    """Its absence is said by name."""
    root, _, adapter, _ = made
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(MissingExtraError, match=r"missing package: peft: .*mistral_ms\[peft\]"):
        align(root / "base", ids=[IDS[0].tolist()], new_tokens=0, adapter=adapter)


class TestBadFiles:
    def changed(self, made, tmp_path, change, **config):
        _, _, adapter, _ = made
        tensors = load_file(adapter / "adapter_model.safetensors")
        change(tensors)
        (tmp_path / "bad").mkdir()
        values = json.loads((adapter / "adapter_config.json").read_text()) | config
        (tmp_path / "bad" / "adapter_config.json").write_text(json.dumps(values))
        save_file(tensors, tmp_path / "bad" / "adapter_model.safetensors")
        return tmp_path / "bad"

    def refused(self, made, path, message, error=CheckpointError):
        with pytest.raises(error, match=message):
            open_merged(made[0] / "base", adapter=path)

    def test_a_name_that_fits_no_weight(self, made, tmp_path):
        def change(tensors):
            tensors["base_model.model.lm_head.lora_A.weight"] = np.zeros((4, 32), np.float32)

        path = self.changed(made, tmp_path, change)
        self.refused(made, path, "extra tensor: .*base_model.model.lm_head.lora_A.weight")

    def test_a_missing_tensor(self, made, tmp_path):
        name = "base_model.model.model.layers.0.self_attn.o_proj.lora_B.weight"
        path = self.changed(made, tmp_path, lambda tensors: tensors.pop(name))
        self.refused(made, path, f"missing tensor: .*{name}")

    def test_another_rank(self, made, tmp_path):
        path = self.changed(made, tmp_path, lambda tensors: None, r=8)
        self.refused(made, path, "wrong shape: .*lora_A")

    def test_a_name_of_peft_that_stands_for_nothing(self, made, tmp_path):
        """PEFT allows those, as long as one is right."""
        lora = json.loads((made[2] / "adapter_config.json").read_text())
        names = [*lora["target_modules"], "c_attn"]
        path = self.changed(made, tmp_path, lambda tensors: None, target_modules=names)
        open_merged(made[0] / "base", adapter=path).close()

    def test_another_method(self, made, tmp_path):
        path = self.changed(made, tmp_path, lambda tensors: None, peft_type="LOHA")
        self.refused(made, path, "peft_type: 'LOHA'", ConfigError)

    def test_no_adapter(self, made, tmp_path):
        self.refused(made, tmp_path / "nothing", "no adapter: ")
        path = self.changed(made, tmp_path, lambda tensors: None)
        (path / "adapter_model.safetensors").rename(path / "adapter_model.bin")
        self.refused(made, path, "adapter_model.bin: of adapters only safetensors")

    def test_an_adapter_beside_its_base_is_not_applied(self, made, tmp_path):
        """An adapter that nobody named changes nothing, and that is said."""
        root, _, adapter, _ = made
        convert(root / "base", tmp_path / "both", "hf")
        (tmp_path / "both" / "adapter_model.safetensors").write_bytes(
            (adapter / "adapter_model.safetensors").read_bytes()
        )
        with open_checkpoint(tmp_path / "both") as source:
            assert "not applied" in source.remark()
