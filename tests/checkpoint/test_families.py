"""Qwen2-MoE, Qwen3-MoE, OLMoE and Dots1 from Hugging Face's files: logits, and every bit back."""

import json

import mindspore as ms
import numpy as np
import pytest
import torch
import transformers
from mindspore import Tensor
from safetensors.torch import load_file
from support.hf import STACKED
from transformers import AutoModelForCausalLM

from mistral_ms.checkpoint import convert, open_checkpoint
from mistral_ms.checkpoint.load import load_weights
from mistral_ms.config import DROPLESS, from_hf, to_hf, to_mistral, to_native
from mistral_ms.config.computation import computation
from mistral_ms.errors import CheckpointError, ConfigError
from mistral_ms.layers import CacheSpec
from mistral_ms.models import CausalLM

SIZES = dict(
    vocab_size=60, hidden_size=16, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, num_experts_per_tok=2, initializer_range=0.3,
    attn_implementation="eager", use_cache=False,
)  # fmt: skip
FAMILIES = {
    "qwen3_moe": (
        "Qwen3Moe",
        dict(
            head_dim=8, intermediate_size=24, moe_intermediate_size=10, num_experts=6,
            mlp_only_layers=[1], norm_topk_prob=True,
        ),
    ),
    "qwen3_moe, raw weights, a window, every other layer": (
        "Qwen3Moe",
        dict(
            head_dim=4, intermediate_size=24, moe_intermediate_size=10, num_experts=6,
            decoder_sparse_step=2, use_sliding_window=True, sliding_window=4,
            tie_word_embeddings=True,
        ),
    ),
    "qwen2_moe": (
        "Qwen2Moe",
        dict(
            intermediate_size=24, moe_intermediate_size=10, num_experts=6,
            shared_expert_intermediate_size=14, mlp_only_layers=[0],
        ),
    ),
    "qwen2_moe, without biases, every other layer": (
        "Qwen2Moe",
        dict(
            intermediate_size=24, moe_intermediate_size=10, num_experts=6, qkv_bias=False,
            shared_expert_intermediate_size=10, norm_topk_prob=True, decoder_sparse_step=2,
        ),
    ),
    "olmoe": ("Olmoe", dict(intermediate_size=12, num_experts=6)),
    "dots1": (
        "Dots1",
        dict(
            intermediate_size=24, moe_intermediate_size=10, n_routed_experts=8, n_shared_experts=2,
            first_k_dense_replace=1, n_group=4, topk_group=2, routed_scaling_factor=2.5,
            norm_topk_prob=True,
        ),
    ),
    "dots1, a window in the last layer": (
        "Dots1",
        dict(
            intermediate_size=24, moe_intermediate_size=10, n_routed_experts=4, n_shared_experts=1,
            first_k_dense_replace=2, max_window_layers=2, sliding_window=4,
        ),
    ),
}  # fmt: skip
IDS = np.random.default_rng(0).integers(3, 60, (2, 9))
# float32 sums in another order, and MindSpore's exponential, through three layers
RELATIVE = 2e-5


@pytest.fixture(scope="module", params=FAMILIES)
def published(request, tmp_path_factory):
    """A small model as transformers writes it, and its logits."""
    name, values = FAMILIES[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES | values)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    if STACKED:  # experts that are fused want rows of 16 bytes
        model.set_experts_implementation("eager")
    with torch.no_grad():
        for path, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "norm" in path:
                tensor.add_(0.1 * torch.randn_like(tensor))  # norms that are not all ones
            if path.endswith("proj.bias"):
                tensor.normal_(0, 0.3)  # which are zero at first
            if path.endswith("gate.weight"):
                tensor.normal_(0, 0.3)  # which its class leaves to whoever trains it
            if path.endswith("correction_bias"):
                tensor.normal_(0, 0.02)
    directory = tmp_path_factory.mktemp("family") / "hf"
    model.save_pretrained(directory)
    return directory, model(torch.tensor(IDS)).logits.detach().numpy()


def test_logits(published):
    directory, want = published
    with open_checkpoint(directory) as source:
        model = CausalLM(source.config, DROPLESS)
        load_weights(source, model.weights())
    places = np.tile(np.arange(IDS.shape[1], dtype=np.int32), (2, 1))
    got = model(Tensor(IDS, ms.int32), Tensor(places)).asnumpy()
    np.testing.assert_allclose(got, want, atol=RELATIVE * np.abs(want).max())


def test_generation_with_a_cache_gives_the_same_logits(published):
    """Five tokens, then one after the other."""
    directory, want = published
    with open_checkpoint(directory) as source:
        model = CausalLM(source.config, DROPLESS, cache=CacheSpec(2, 9))
        load_weights(source, model.weights())
    found, ids = [], Tensor(IDS, ms.int32)
    for first, last in ((0, 5), (5, 6), (6, 7), (7, 8), (8, 9)):
        places = np.tile(np.arange(first, last, dtype=np.int32), (2, 1))
        found.append(model(ids[:, first:last], Tensor(places)).asnumpy())
    np.testing.assert_allclose(np.concatenate(found, 1), want, atol=RELATIVE * np.abs(want).max())


def test_the_way_back_is_bit_for_bit_and_transformers_reads_it(published, tmp_path):
    directory, want = published
    convert(directory, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "hf", "hf")
    one, two = (load_file(path / "model.safetensors") for path in (directory, tmp_path / "hf"))
    assert set(one) == set(two)
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", attn_implementation="eager")
    if STACKED:
        model.set_experts_implementation("eager")
    got = model(torch.tensor(IDS)).logits.detach().numpy()
    # where a matrix lies in memory may decide the order of sums
    np.testing.assert_allclose(got, want, atol=1e-6 * np.abs(want).max())


def keys_of(published):
    return json.loads((published[0] / "config.json").read_text())


def test_configurations_go_there_and_back(published):
    config, _ = from_hf(keys_of(published))
    family = keys_of(published)["model_type"]
    assert (config.qk_norm in ("head", "full")) == (family != "qwen2_moe")
    again, _ = from_hf(to_hf(config))
    assert computation(again) == computation(config)
    again, _ = from_hf(json.loads(json.dumps(to_native(config))))
    assert computation(again) == computation(config)
    with pytest.raises(ConfigError, match=r"not expressible in Mistral's format: "):
        to_mistral(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [("attention_bias", True), ("rope_interleaved", True), ("clip_qkv", 8.0), ("n_heads", 4)],
)
def test_what_would_compute_something_else_is_refused(published, key, value):
    with pytest.raises(ConfigError, match=f"unsupported (value|key): config.json: {key}"):
        from_hf(keys_of(published) | {key: value})


def test_how_fast_the_bias_moved_is_no_part_of_the_model():
    """Which Hugging Face's configuration does not say."""
    name, values = FAMILIES["dots1"]
    config, _ = from_hf(getattr(transformers, f"{name}Config")(**SIZES | values).to_dict())
    gate = config.moe.gate.model_copy(update={"bias_update_rate": 0.5})
    moved = config.model_copy(update={"moe": config.moe.model_copy(update={"gate": gate})})
    assert to_hf(moved) == to_hf(config)


def test_windows_of_qwen2_moe_are_refused():
    """With eager attention all layers have it, with flash attention the last ones alone."""
    name, values = FAMILIES["qwen2_moe"]
    keys = getattr(transformers, f"{name}Config")(**SIZES | values).to_dict()
    config, _ = from_hf(keys)
    with pytest.raises(ConfigError, match="max_window_layers: 28"):
        from_hf(keys | {"use_sliding_window": True, "sliding_window": 4})
    del keys["max_window_layers"]
    with pytest.raises(ConfigError, match="max_window_layers: 28"):
        from_hf(keys | {"use_sliding_window": True, "sliding_window": 4})
    with pytest.raises(ConfigError, match="not expressible in Hugging Face's format"):
        to_hf(config.model_copy(update={"sliding_window": 4}))


def test_what_no_family_has():
    name, values = FAMILIES["dots1"]
    config, _ = from_hf(getattr(transformers, f"{name}Config")(**SIZES | values).to_dict())
    moe = config.moe.model_copy(update={"sparse_layers": (0, 2)})
    with pytest.raises(ConfigError, match="not expressible in Hugging Face's format"):
        to_hf(config.model_copy(update={"moe": moe}))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("deepseek_v2", "multi-head latent attention"),
        ("deepseek_v3", "multi-head latent attention"),
    ],
)
def test_families_whose_attention_is_another_one(kind, reason, tmp_path):
    with pytest.raises(ConfigError, match=f"unsupported architecture: .*{kind}.*{reason}"):
        from_hf({"model_type": kind})
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(tmp_path)
