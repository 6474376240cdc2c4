"""The model in MindFormers' yaml files, read, written, refused."""

import pytest
from support.configs import model

from mistral_ms.config import encode_yaml, from_mindformers, read_mindformers, to_mindformers
from mistral_ms.errors import ConfigError

MODEL = {  # of pretrain_mixtral-8x7b.yaml, release 1.7
    "type": "LlamaConfig",
    "batch_size": 1,
    "seq_length": 4096,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_layers": 32,
    "num_heads": 32,
    "n_kv_heads": 8,
    "vocab_size": 32000,
    "multiple_of": 256,
    "rms_norm_eps": 1e-5,
    "theta": 1000000,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "ignore_token_id": -100,
    "compute_dtype": "bfloat16",
    "extend_method": "None",
    "use_flash_attention": True,
    "offset": 0,
    "checkpoint_name_or_path": "",
}
MOE = {
    "expert_num": 8,
    "capacity_factor": 1.1,
    "aux_loss_factor": 0.05,
    "num_experts_chosen": 2,
    "routing_policy": "TopkRouterV2",
    "enable_sdrop": True,
}


def run(changes=None, moe=MOE, inner=None, arch="LlamaForCausalLM", **more):
    values = {**MODEL, **(changes or {}), **({"moe_config": inner} if inner else {})}
    source = {"model": {"arch": {"type": arch}, "model_config": values}, "use_parallel": True}
    return {**source, **({"moe_config": moe} if moe else {}), **more}


def test_the_file_of_a_run():
    config, ignored = from_mindformers(run())
    assert (config.hidden_size, config.num_hidden_layers, config.num_key_value_heads) == (
        4096,
        32,
        8,
    )
    assert (config.intermediate_size, config.rope_theta, config.head_size) == (14336, 1e6, 128)
    assert (config.max_position_embeddings, config.sliding_window) == (4096, None)
    assert (config.moe.num_local_experts, config.moe.num_experts_per_tok) == (8, 2)
    assert "seq_length" in ignored


def test_their_defaults():
    """Of LlamaConfig and MoEConfig, where a file is silent."""
    silent = {k: v for k, v in MODEL.items() if k not in ("theta", "n_kv_heads", "seq_length")}
    source = run(moe={"expert_num": 8, "routing_policy": "TopkRouterV2"})
    source["model"]["model_config"] = silent
    config, _ = from_mindformers(source)
    assert (config.rope_theta, config.num_key_value_heads) == (1e4, 32)
    assert config.max_position_embeddings == 2048
    assert (config.moe.num_experts_per_tok, config.moe.norm_topk_prob) == (1, False)
    assert from_mindformers(run(moe={"expert_num": 1}))[0].moe is None
    assert from_mindformers(run({"pad_token_id": -1}))[0].pad_token_id is None


def test_of_our_models_in_their_trainer():
    """Hugging Face's keys and defaults, under either name."""
    changes = {"type": "MixtralConfig", "max_position_embeddings": 32768, "pad_token_id": -1}
    config, ignored = from_mindformers(run(changes, arch="MixtralForCausalLM"))
    assert (config.max_position_embeddings, config.pad_token_id) == (32768, None)
    assert (config.rope_theta, config.num_key_value_heads) == (1e6, 8)
    assert config.moe.num_experts_per_tok == 2
    assert "use_flash_attention" in ignored
    dense, _ = from_mindformers(run({"type": "MistralConfig", "sliding_window": 512}, moe=None))
    assert (dense.sliding_window, dense.moe, dense.max_position_embeddings) == (512, None, 4096)
    assert from_mindformers(run({"type": "MistralConfig"}, moe=None))[0].sliding_window == 4096
    with pytest.raises(ConfigError, match=r"contradiction: .*theta: .*are one setting"):
        from_mindformers(run({"type": "MixtralConfig", "rope_theta": 1e4}))
    with pytest.raises(ConfigError, match=r"unsupported key: .*shared_layers"):
        from_mindformers(run({"type": "MixtralConfig", "shared_layers": 1}))


@pytest.mark.parametrize("moe", [None, {"num_local_experts": 6, "num_experts_per_tok": 3}])
def test_written_and_read_again(tmp_path, moe):
    config = model(moe=moe, tie_word_embeddings=moe is None)
    path = tmp_path / "mindspore_model.yaml"
    path.write_bytes(encode_yaml(to_mindformers(config)))
    (tmp_path / "of_a_run.yaml").write_text("seed: 0")
    assert read_mindformers(tmp_path)[0] == config
    experts = to_mindformers(config)["model"]["model_config"].get("moe_config")
    assert experts is None or experts["capacity_factor"] < 0  # else MindFormers drops tokens


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (run(arch="BloomLMHeadModel"), r"model\.arch\.type: 'BloomLMHeadModel': supported: Llama"),
        (run({"type": "GLMConfig"}), r"model\.model_config\.type: 'GLMConfig'"),
        ({"model": {"arch": {}}}, r"wrong type: .*model\.model_config: None"),
        (run({"qkv_concat": True}), r"unsupported value: .*qkv_concat: True"),
        (run({"extend_method": "PI"}), r"extend_method: 'PI'"),
        (run({"shared_layers": 2}), r"unsupported key: .*model_config: shared_layers: 2: .*theta"),
        (run(moe=MOE | {"routing_policy": "TopkRouterV1"}), r"routing_policy: 'TopkRouterV1'"),
        (run(moe=MOE | {"shared_expert_num": 1}), r"moe_config: shared_expert_num: 1"),
        (run(moe=MOE | {"experts": 1}), r"unsupported key: .*moe_config: experts"),
        (run(inner=MOE | {"expert_num": 4}), r"contradiction: .*expert_num: 8: .* has 4"),
        (run({"num_heads": 33}), r"num_key_value_heads \(8\) must divide"),
    ],
)
def test_what_is_refused(source, message):
    with pytest.raises(ConfigError, match=message):
        from_mindformers(source)


def test_a_missing_size():
    source = run()
    del source["model"]["model_config"]["intermediate_size"]
    with pytest.raises(ConfigError, match=r"missing key: .*model_config: intermediate_size"):
        from_mindformers(source)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 8}, r"sliding_window: 8: .*max_position_embeddings to 8"),
        ({"head_dim": 16}, "head_dim: 16"),
        ({"eos_token_id": (2, 3)}, r"eos_token_id: \(2, 3\): must be one"),
        (
            {"moe": {"sparse_layers": "every_other"}},
            "sparse_layers: .*are sparse, or none",
        ),
        ({"moe": {"n_shared_experts": 2}}, "n_shared_experts: 2"),
        ({"moe": {"num_experts_per_tok": 1}}, "norm_topk_prob: True: of one expert"),
    ],
)
def test_what_their_class_does_not_have(changes, message):
    with pytest.raises(ConfigError, match=message):
        to_mindformers(model(**changes))
