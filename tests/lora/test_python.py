"""Adapters from Python: a Trainer changes them alone, generation uses them, they are saved."""

import numpy as np
import pytest
from mindspore import Tensor
from support.lora import tiny_pair

from mistral_ms import AutoModelForCausalLM, Trainer, TrainingArguments
from mistral_ms.checkpoint import inspect
from mistral_ms.errors import CheckpointError, ConfigError

LORA = {"r": 4, "lora_alpha": 16, "target_modules": "all-linear", "use_dora": True}
IDS = np.random.default_rng(0).integers(3, 64, (2, 7)).astype(np.int32)
POSITIONS = np.tile(np.arange(7, dtype=np.int32), (2, 1))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("base") / "hf"
    tiny_pair("mixtral").hf.save_pretrained(path)
    return path


def logits(model):
    return model.model(Tensor(IDS), Tensor(POSITIONS)).asnumpy()


def test_fresh_adapters_change_nothing(base):
    plain = AutoModelForCausalLM.from_pretrained(base)
    adapted = AutoModelForCausalLM.from_pretrained(base, lora=LORA)
    np.testing.assert_allclose(logits(adapted), logits(plain), atol=1e-5)
    assert {each.name for each in adapted.parameters()} == set(adapted.model.stored_weights())
    with pytest.raises(ConfigError, match=r"lora: rank"):
        AutoModelForCausalLM.from_pretrained(base, lora={**LORA, "rank": 4})


@pytest.mark.slow
def test_train_generate_save(base, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base, lora=LORA)
    frozen = {
        name: each.asnumpy().copy()
        for name, each in model.model.weights().items()
        if name not in model.model.stored_weights()
    }
    rows = [{"input_ids": row.tolist()} for row in IDS]
    args = TrainingArguments(
        tmp_path / "run", max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2,
        eval_steps=1, load_best_model_at_end=True, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = Trainer(model, args, rows, rows)
    trainer.train()
    assert trainer.state.evaluations[-1].loss < trainer.state.evaluations[0].loss
    for name, values in frozen.items():
        np.testing.assert_array_equal(model.model.weights()[name].asnumpy(), values)

    model.save_pretrained(tmp_path / "peft", format="peft")
    model.save_pretrained(tmp_path / "ours")
    assert inspect(tmp_path / "peft").kind == "peft"
    with pytest.raises(CheckpointError, match="adapters alone are written as mistral_ms or peft"):
        model.save_pretrained(tmp_path / "hf", format="hf")
    tokens = model.generate(IDS, max_new_tokens=3, compiled=False)
    for path in ("peft", "ours"):
        merged = AutoModelForCausalLM.from_pretrained(base, adapter=tmp_path / path)
        np.testing.assert_allclose(logits(merged), logits(model), atol=1e-5)
        np.testing.assert_array_equal(
            merged.generate(IDS, max_new_tokens=3, compiled=False), tokens
        )
