"""Our steps around models that are not ours: they are registered under MindFormers' own names."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from support.mindformers_cpu import run_on_cpu

SIZES = dict(
    batch_size=2, seq_length=8, hidden_size=16, num_layers=1, num_heads=2, n_kv_heads=1,
    vocab_size=32, intermediate_size=24, pad_token_id=-1, use_flash_attention=False,
    fused_rms_norm=False, compute_dtype="float32", rotary_dtype="float32",
    softmax_compute_type="float32", param_init_type="float32",
)  # fmt: skip
RATE, STEPS = 1e-2, 2


@pytest.fixture(scope="module")
def mf():
    pytest.importorskip("mindformers.core", reason="MindFormers is not installed")
    import mindformers

    from mistral_ms.mindformers import registration  # noqa: F401  (registers)

    return mindformers


def trained(mf, step_class):
    """Losses, norms, and weights of MindFormers' own Llama after two steps."""
    from mindformers.core.lr import CosineWithWarmUpLR
    from mindformers.core.optim import AdamW
    from mindformers.models.llama import LlamaConfig, LlamaForCausalLM

    ms.set_seed(1)
    model = run_on_cpu(LlamaForCausalLM(LlamaConfig(**SIZES)))
    rate = CosineWithWarmUpLR(learning_rate=RATE, warmup_steps=0, total_steps=10)
    optimizer = AdamW(model.trainable_params(), learning_rate=rate)
    step = step_class(model, optimizer, use_clip_grad=True, scale_sense=Tensor(1024.0, ms.float32))
    step.set_train()
    ids = np.random.default_rng(0).integers(0, 32, (STEPS, 2, 9)).astype(np.int32)
    found = []
    for batch in ids:
        loss, overflow, _, _, norm = step(Tensor(batch))
        assert not overflow.asnumpy()
        found += [loss.asnumpy().item(), norm.asnumpy().item()]
    return found, [each.asnumpy() for each in model.trainable_params()], step


def test_their_own_llama_is_trained_by_their_own_step(mf):
    """To the bit, but for the way to look for overflows on a CPU, which theirs has not."""
    from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
    from mindformers.wrapper import MFTrainOneStepCell

    class Plain(MFTrainOneStepCell):
        def start_overflow_check(self, pre_cond, compute_input):
            return 0, compute_input

        def get_overflow_status(self, status, compute_output):
            return Tensor(False)

    expected, weights, _ = trained(mf, Plain)
    registered = MindFormerRegister.get_cls(MindFormerModuleType.WRAPPER, "MFTrainOneStepCell")
    found, again, step = trained(mf, registered)
    assert type(step).__name__ == "MoETrainOneStepCell"
    assert step.losses() is None
    assert found == expected
    assert expected[0] != expected[2]
    assert all(np.array_equal(one, two) for one, two in zip(weights, again, strict=True))
