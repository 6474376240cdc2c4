"""Hugging Face in and out: stacked as an oracle stacks, bit-identical back, loadable there."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mistral_ms.checkpoint import ConvertResult, convert, open_checkpoint
from mistral_ms.errors import ConfigError

KINDS = ["mixtral", "mistral", "head_dim", "tied", "multi_query"]


def numpy(tensor):
    return tensor.view(torch.int16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_hf_to_ours_to_hf_is_bit_identical(tmp_path, foreign, assert_same_bits, kind, dtype):
    hf = foreign.hf(tmp_path / "hf", kind, dtype, max_shard_size="20KB")
    there = convert(hf, tmp_path / "ours", max_shard_bytes=30_000)
    back = convert(tmp_path / "ours", tmp_path / "back", max_shard_bytes=15_000)
    assert (there.source_kind, there.target_kind) == ("hf", "mistral_ms")
    assert (back.source_kind, back.target_kind) == ("mistral_ms", "hf")
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 1
    assert_same_bits(foreign.read(hf), foreign.read(tmp_path / "back"))


def test_our_tensors_are_those_of_hf_with_experts_stacked(tmp_path, foreign):
    hf = foreign.hf(tmp_path / "hf", "mixtral")
    convert(hf, tmp_path / "ours")
    theirs, ours = foreign.read(hf), foreign.read(tmp_path / "ours")
    for layer in range(3):
        moe = f"model.layers.{layer}.block_sparse_moe"
        for w in ("w1", "w2", "w3"):
            stacked = np.stack([theirs[f"{moe}.experts.{e}.{w}.weight"].numpy() for e in range(4)])
            np.testing.assert_array_equal(ours[f"layers.{layer}.moe.experts.{w}"], stacked)
        assert torch.equal(ours[f"layers.{layer}.moe.router.weight"], theirs[f"{moe}.gate.weight"])
    q = "layers.1.{}.q_proj.weight"
    assert torch.equal(ours[q.format("attention")], theirs["model." + q.format("self_attn")])
    assert torch.equal(ours["lm_head.weight"], theirs["lm_head.weight"])


def test_dense_projections_get_the_right_names(tmp_path, foreign):
    hf = foreign.hf(tmp_path / "hf", "mistral")
    convert(hf, tmp_path / "ours")
    theirs, ours = foreign.read(hf), foreign.read(tmp_path / "ours")
    for ours_name, name in {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}.items():
        left = ours[f"layers.2.feed_forward.{ours_name}.weight"]
        assert torch.equal(left, theirs[f"model.layers.2.mlp.{name}.weight"])


@pytest.mark.parametrize("kind", KINDS)
def test_what_we_write_gives_identical_logits_in_transformers(tmp_path, foreign, kind):
    hf = foreign.hf(tmp_path / "hf", kind)
    convert(hf, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", "hf")
    tokens = torch.arange(24).reshape(2, 12)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(hf)(tokens).logits
        got = AutoModelForCausalLM.from_pretrained(tmp_path / "back")(tokens).logits
    assert torch.equal(expected, got)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("kind", ["mixtral", "tied"])
def test_pickles_hold_the_same_as_safetensors(
    tmp_path, foreign, assert_same_bits, kind, shards, legacy
):
    pickled = foreign.bin(tmp_path / "bin", kind, shards, legacy)
    convert(pickled, tmp_path / "out", "hf")
    hf = foreign.hf(tmp_path / "hf", kind, torch.bfloat16)
    assert_same_bits(foreign.read(hf), foreign.read(tmp_path / "out"))


def test_a_tensor_pickled_as_a_transposed_view_is_read_in_its_own_order(
    tmp_path, foreign, assert_same_bits
):
    pickled = foreign.bin(tmp_path / "bin", "mistral")
    state = torch.load(pickled / "pytorch_model.bin", weights_only=True)
    name = "model.layers.0.mlp.up_proj.weight"
    turned = state | {name: state[name].T.contiguous().T}
    assert not turned[name].is_contiguous()
    torch.save(turned, pickled / "pytorch_model.bin")
    convert(pickled, tmp_path / "out", "hf")
    assert_same_bits(foreign.read(tmp_path / "out"), state)


def test_fused_experts_of_transformers_5_are_taken_apart(tmp_path, foreign, assert_same_bits):
    fused = foreign.fused(tmp_path / "fused")
    convert(fused, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    hf = foreign.hf(tmp_path / "hf", "mixtral", torch.bfloat16)
    assert_same_bits(foreign.read(hf), foreign.read(tmp_path / "back"))


@pytest.mark.parametrize("option", ["fp32", "fp16", "bf16"])
def test_casting_rounds_every_tensor_as_torch_does(tmp_path, foreign, assert_same_bits, option):
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[option]
    source = torch.bfloat16 if option == "fp32" else torch.float32
    hf = foreign.hf(tmp_path / "hf", "mixtral", source)
    convert(hf, tmp_path / "ours", dtype=option)
    convert(tmp_path / "ours", tmp_path / "back")
    expected = {name: tensor.to(dtype) for name, tensor in foreign.read(hf).items()}
    assert_same_bits(expected, foreign.read(tmp_path / "back"))
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["torch_dtype"] == str(dtype).removeprefix("torch.")


def test_the_result_counts_what_was_written(tmp_path, foreign):
    hf = foreign.hf(tmp_path / "hf", "mixtral")
    calls = []
    result = convert(hf, tmp_path / "ours", progress=lambda *call: calls.append(call))
    tensors = foreign.read(tmp_path / "ours")
    nbytes = sum(t.numel() * 4 for t in tensors.values())
    assert isinstance(result, ConvertResult)
    assert (result.tensors, result.bytes) == (len(tensors), nbytes)
    assert result.seconds > 0
    # A loose bound against a wrong unit: a process that imported torch holds far more than 10 MB,
    # and the same number in kilobytes would be far less.
    assert result.peak_rss_bytes > 10_000_000
    assert calls[-1] == (nbytes, nbytes)
    assert calls == sorted(calls)


def test_side_files_travel_and_others_do_not(tmp_path, foreign):
    hf = foreign.hf(tmp_path / "hf", "mistral")
    names = ["tokenizer.model", "tokenizer.model.v3", "tokenizer.json", "tokenizer_config.json"]
    names += ["special_tokens_map.json", "tekken.json", "chat_template.jinja"]
    for name in names:
        (hf / name).write_text(f"content of {name}")
    (hf / "README.md").write_text("not part of a checkpoint")
    convert(hf, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    for name in [*names, "generation_config.json"]:
        assert (tmp_path / "back" / name).read_bytes() == (hf / name).read_bytes()
    assert not (tmp_path / "ours" / "README.md").exists()


def test_a_single_shard_is_called_as_transformers_calls_it(tmp_path, foreign):
    hf = foreign.hf(tmp_path / "hf", "mistral")
    convert(hf, tmp_path / "again", "hf")
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
    ]


def test_the_index_names_every_tensor_once_in_the_shard_that_holds_it(tmp_path, foreign):
    hf = foreign.hf(tmp_path / "hf", "mixtral")
    convert(hf, tmp_path / "out", "hf", max_shard_bytes=20_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(foreign.read(hf))
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in foreign.read(hf).values())
    largest = max(p.stat().st_size for p in (tmp_path / "out").glob("model-*.safetensors"))
    assert largest < 20_000 + 5_000  # the header comes on top; no tensor here exceeds the limit


@pytest.mark.parametrize("to", ["hf", "mistral"])
@pytest.mark.parametrize("change", [{"norm_topk_prob": False}, {"sparse_layers": (0, 2)}])
def test_a_model_that_a_format_cannot_express_is_refused_before_anything_is_written(
    tmp_path, tiny_config, save_random, change, to
):
    moe = tiny_config.moe.model_copy(update=change)
    save_random(tmp_path / "ours", tiny_config.model_copy(update={"moe": moe}))
    with pytest.raises(ConfigError, match="not expressible"):
        convert(tmp_path / "ours", tmp_path / "out", to)
    assert [p.name for p in tmp_path.iterdir()] == ["ours"]


def test_a_sparse_pattern_survives_our_own_format(
    tmp_path, foreign, assert_same_bits, tiny_config, save_random
):
    moe = tiny_config.moe.model_copy(update={"sparse_layers": "every_other"})
    config = tiny_config.model_copy(update={"moe": moe})
    save_random(tmp_path / "ours", config)
    convert(tmp_path / "ours", tmp_path / "again", "mindspore")
    assert_same_bits(foreign.read(tmp_path / "ours"), foreign.read(tmp_path / "again"))
    with open_checkpoint(tmp_path / "again") as source:
        assert source.config == config
