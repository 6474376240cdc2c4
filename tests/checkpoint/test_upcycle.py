"""A sparse model made of a dense one computes the same, until it is trained."""

import mindspore as ms
import numpy as np
import pytest
import torch
from mindspore import Tensor
from transformers import AutoModelForCausalLM

from mistral_ms.checkpoint import convert, open_checkpoint
from mistral_ms.checkpoint.load import load_weights
from mistral_ms.config import DROPLESS, MoEArchitecture
from mistral_ms.errors import ConfigError
from mistral_ms.models import CausalLM

EXPERTS = {"num_local_experts": 4}
IDS = np.random.default_rng(0).integers(3, 60, (2, 7))
# Weights of a token's experts add up to 1 within float32's rounding, once in each layer.
RELATIVE = 5e-6


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A Mistral as transformers writes it, with its logits; float32, biased by nothing."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("dense") / "hf"
    config = MistralConfig(
        vocab_size=60, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=4, sliding_window=None,
        initializer_range=0.3, attn_implementation="eager",
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    model.save_pretrained(path)
    return path, model(torch.tensor(IDS)).logits.detach().numpy()


def ours(path):
    with open_checkpoint(path) as source:
        model = CausalLM(source.config, DROPLESS)
        load_weights(source, model.weights())
    places = np.tile(np.arange(IDS.shape[1], dtype=np.int32), (2, 1))
    return model, model(Tensor(IDS, ms.int32), Tensor(places)).asnumpy()


CASES = {
    "Mixtral": {},
    "three of four, a dense layer first": {
        "num_experts_per_tok": 3, "sparse_layers": {"first_k_dense_replace": 1},
    },
    "DeepSeek's gate": {"gate": "sigmoid_top_k"},
    "a dense expert beside": {
        "n_shared_experts": 1, "shared_expert_gate": "softmax_pair",
    },
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_dense_model(dense, tmp_path, case):
    path, want = dense
    moe = MoEArchitecture(**EXPERTS | CASES[case])
    convert(path, tmp_path / "sparse", upcycle=moe)
    model, got = ours(tmp_path / "sparse")
    assert model.config.moe == moe
    np.testing.assert_allclose(got, want, atol=RELATIVE * np.abs(want).max())
    routers = [w.asnumpy() for name, w in model.weights().items() if name.endswith("router.weight")]
    assert routers and all(np.abs(router).max() > 0 for router in routers)
    w1 = model.weights()["layers.1.moe.experts.w1"].asnumpy()
    assert (w1 == w1[:1]).all() and np.abs(w1).max() > 0


def test_transformers_runs_it_as_mixtral(dense, tmp_path):
    path, want = dense
    convert(path, tmp_path / "hf", "hf", upcycle=MoEArchitecture(**EXPERTS))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    assert type(model).__name__ == "MixtralForCausalLM"
    got = model(torch.tensor(IDS)).logits.detach().numpy()
    np.testing.assert_allclose(got, want, atol=RELATIVE * np.abs(want).max())


def test_a_checkpoint_of_ours_in_half_precision_and_another_seed(dense, tmp_path):
    path, _ = dense
    convert(path, tmp_path / "ours")
    routers = []
    for seed in (0, 1):
        target = tmp_path / f"half-{seed}"
        moe = MoEArchitecture(**EXPERTS, gate="sigmoid_top_k")
        convert(tmp_path / "ours", target, "mindspore", "fp16", upcycle=moe, seed=seed)
        with open_checkpoint(target) as source:
            assert source.config.torch_dtype == "float16"
            routers.append(source.read("layers.0.moe.router.weight", "float16"))
            assert not source.read("layers.0.moe.router.e_score_correction_bias", "float16").any()
    assert (routers[0] != routers[1]).any()


@pytest.mark.parametrize(
    ("moe", "message"),
    [
        ({"norm_topk_prob": False}, r"moe\.norm_topk_prob: False: .* must add up to 1"),
        (
            {"gate": {"name": "sigmoid_top_k", "routed_scaling_factor": 2.5}},
            r"routed_scaling_factor: 2\.5: .* must add up to 1",
        ),
        (
            {"gate": {"name": "gshard_top_2", "eval_second_policy": "none"}},
            r"eval_second_policy: none: .* less than 1",
        ),
        ({"moe_intermediate_size": 12}, r"moe_intermediate_size: 12: .* of width 24"),
        ({"n_shared_experts": 1}, r"shared_expert_gate: none: the shares of chosen and shared"),
        ({"n_shared_experts": 2, "shared_expert_gate": "softmax_pair"}, r"48: .* of width 24"),
        ({"extra_feed_forward": "after"}, r"extra_feed_forward: after: .* no such feed-forward"),
    ],
    ids=["raw", "scaled", "alone", "fine-grained", "added", "wide", "behind"],
)
def test_what_would_be_another_model_is_refused(dense, tmp_path, moe, message):
    with pytest.raises(ConfigError, match=f"another model than the dense one: .*{message}"):
        convert(dense[0], tmp_path / "no", upcycle=MoEArchitecture(**EXPERTS | moe))
    assert not (tmp_path / "no").exists()


def test_a_sparse_model_is_refused(dense, tmp_path):
    moe = MoEArchitecture(**EXPERTS)
    convert(dense[0], tmp_path / "sparse", upcycle=moe)
    with pytest.raises(ConfigError, match=r"sparse already: model\.moe: 4 experts"):
        convert(tmp_path / "sparse", tmp_path / "no", "mindspore", upcycle=moe)
