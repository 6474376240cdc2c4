"""What keys of MindFormers' model configurations mean, and what is refused."""

from pathlib import Path

import pytest
from support.mindformers_files import EXPERTS, config_of, version_1_7

from mistral_ms.config.capacity import expert_capacity
from mistral_ms.config.mindformers_keys import FIXED
from mistral_ms.errors import ConfigError

SHIM = Path(__file__).parents[2] / "scripts" / "mindformers"


def test_everything_is_registered(mf):
    for kind, one in (
        (mf.kinds.CONFIG, mf.MixtralConfig),
        (mf.kinds.CONFIG, mf.MistralConfig),
        (mf.kinds.MODELS, mf.MixtralForCausalLM),
        (mf.kinds.MODELS, mf.MistralForCausalLM),
    ):
        assert mf.registered(kind, one.__name__) is one
    for name in ("MFTrainOneStepCell", "MoETrainOneStepCell"):
        found = mf.registered(mf.kinds.WRAPPER, name)
        assert found is mf.MoETrainOneStepCell
    assert type(mf.AutoConfig.for_model("mixtral")) is mf.MixtralConfig
    for auto in mf.AutoModels:
        assert auto._model_mapping[mf.MixtralConfig] is mf.MixtralForCausalLM


def test_their_own_launcher_finds_the_classes(mf, monkeypatch, tmp_path):
    """By ``--register_path`` and ``auto_register``, which copies the one file."""
    monkeypatch.setenv("REGISTER_PATH", str(SHIM))
    monkeypatch.chdir(tmp_path)
    keys = {"type": "MixtralConfig", "auto_register": "mixtral_shim.MixtralConfig"}
    config = mf.made(keys, mf.kinds.CONFIG)
    assert type(config) is mf.MixtralConfig


def test_attributes_that_are_set_later_count(mf):
    config = config_of(mf, version_1_7("MixtralConfig"))
    config.num_layers = 3
    config.moe_config.enable_sdrop = False
    assert config.architecture().num_hidden_layers == 3
    assert config.routing(training=True).drop_priority == "choice_major"
    config.moe_config.capacity_factor = -1
    assert config.routing(training=True).policy == "dropless"


@pytest.mark.parametrize("tokens", [7, 24, 100, 4096])
@pytest.mark.parametrize("mp", [1, 2, 4])
def test_the_old_rounding_of_the_capacity(mf, tokens, mp):
    """Against MindFormers' own function; theirs may exceed the tokens, of which a slot is empty."""
    from mindformers.modules.transformer.moe import calculate_expert_capacity_v2

    config = mf.MixtralConfig(
        moe_config={**EXPERTS, "capacity_factor": 1.1}, capacity_multiple_of=mp
    )
    routing = config.routing(training=True)
    found = expert_capacity(tokens, 8, 2, routing)
    assert found == min(tokens, calculate_expert_capacity_v2(2, tokens, 1.1, 8, mp))


@pytest.mark.parametrize(
    "keys, message",
    [
        (dict(num_layer=2), r"unknown key: model_config.num_layer: .*perhaps num_layers"),
        (dict(num_layers=2, num_hidden_layers=3), "contradiction: model_config.num_hidden_layers"),
        (dict(multiple_of=256), "missing key: model_config.intermediate_size"),
    ],
)
def test_unknown_and_missing_keys_are_refused(mf, keys, message):
    with pytest.raises(ConfigError, match=message):
        mf.MixtralConfig(**keys)


WRONG = {
    "is_dynamic": True, "extend_method": "PI", "scaling_factor": 2.0, "qkv_has_bias": True,
    "attn_proj_has_bias": True, "qkv_concat": True, "offset": [1, 0], "pp_interleave_num": 2,
    "fine_grain_interleave": 2, "ffn_dim_multiplier": 1.3, "use_rope_slice": True,
    "use_ring_attention": True, "use_eod_attn_mask_compression": True, "parallel_optimizer": True,
    "quant_config": {"method": "x"}, "quantization": "x",
    "quantization_config": {"method": "x"}, "pet_config": {"pet_type": "lora"},
    "parallel_decoding_params": {"x": 1}, "chunk_prefill": True, "return_hidden_states": True,
    "calculate_per_token_loss": True, "pipeline_stage": {"start_stage": 0}, "text_config": {},
    "vision_config": {}, "head_config": {}, "llm_backend": "x",
}  # fmt: skip


@pytest.mark.parametrize("key", FIXED)
def test_values_that_change_what_is_computed_are_refused(mf, key):
    config = mf.MixtralConfig(**{key: WRONG[key]})
    with pytest.raises(ConfigError, match=f"unsupported value: model_config.{key}"):
        config.architecture()


@pytest.mark.parametrize(
    "settings, found",
    [
        ({}, "none"),
        ({"recompute": True}, "full"),
        ({"select_recompute": True}, "selective"),
        ({"recompute": [2, 1]}, "recompute: .2, 1.: of all blocks the same"),
        (
            {"select_recompute": {"feed_forward": True}},
            "select_recompute: .*of all blocks the same",
        ),
        ({"mp_comm_recompute": False}, "mp_comm_recompute: False: .*exchange"),
        ({"select_comm_recompute": True}, "select_comm_recompute: True"),
    ],
)
def test_what_is_computed_again(mf, settings, found):
    config = mf.MixtralConfig(parallel_config={"recompute": settings})
    if found in ("none", "full", "selective"):
        assert config.recompute == found
        return
    with pytest.raises(ConfigError, match=found):
        _ = config.recompute


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(routing_policy="TopkRouterV1"), "routing_policy.*TopkRouterV1.*set 'TopkRouterV2'"),
        (dict(shared_expert_num=1), "shared_expert_num"),
        (dict(balance_via_topk_bias=True), "balance_via_topk_bias"),
        (dict(comp_comm_parallel=True), "comp_comm_parallel"),
    ],
)
def test_experts_of_other_models_are_refused(mf, changes, message):
    config = mf.MixtralConfig(moe_config=mf.MoEConfig(**{**EXPERTS, **changes}))
    with pytest.raises(ConfigError, match=message):
        config.architecture()


def test_contradictions_are_refused(mf):
    config = mf.MixtralConfig(num_local_experts=4, moe_config=EXPERTS)
    with pytest.raises(ConfigError, match=r"num_local_experts: 4: moe_config says 8"):
        config.architecture()
    with pytest.raises(ConfigError, match="has no experts"):
        mf.MistralConfig(moe_config=EXPERTS).architecture()
    with pytest.raises(ConfigError, match="sequence too long"):
        mf.MixtralConfig(seq_length=64, max_position_embeddings=32).architecture()


@pytest.mark.parametrize("name", ["MixtralConfig", "MistralConfig"])
def test_a_configuration_of_ours_survives(mf, name):
    kind = getattr(mf, name)
    architecture = kind(rope_theta=5e5, sliding_window=7, num_layers=2, head_dim=64).architecture()
    assert kind.of(architecture).architecture() == architecture
