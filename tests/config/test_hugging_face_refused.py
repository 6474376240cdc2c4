"""Configurations of Hugging Face that cannot be read: each is refused by its key."""

import re

import pytest
from support.configs import HF_MISTRAL as MISTRAL
from support.configs import HF_MIXTRAL as MIXTRAL
from support.configs import SIZES

from mistral_ms.config import from_hf
from mistral_ms.errors import ConfigError


class TestRefused:
    @pytest.mark.parametrize("kind", ["llama", None, "Mixtral", ["mixtral"]])
    def test_another_architecture(self, kind):
        found = re.escape(repr(kind))
        with pytest.raises(
            ConfigError,
            match=rf"unsupported architecture: c\.json: model_type: {found}: .*mistral, mixtral",
        ):
            from_hf(MIXTRAL | {"model_type": kind}, "c.json")

    def test_quantised_weights(self):
        source = MIXTRAL | {"quantization_config": {"quant_method": "awq", "bits": 4}}
        with pytest.raises(ConfigError, match=r"quantised weights: c\.json: .*awq: .*bfloat16"):
            from_hf(source, "c.json")

    @pytest.mark.parametrize("value", ["awq", 4, [["rope_theta", 1e4]], True])
    @pytest.mark.parametrize("key", ["quantization_config", "rope_parameters", "mistral_ms"])
    def test_a_block_that_is_no_object(self, key, value):
        message = rf"wrong type: c\.json: {key}: {re.escape(repr(value))}: must be an object"
        with pytest.raises(ConfigError, match=message):
            from_hf(MIXTRAL | {key: value}, "c.json")

    def test_experts_in_our_block_that_are_no_object(self):
        message = r"wrong type: c\.json: mistral_ms\.moe: 'all': must be an object"
        with pytest.raises(ConfigError, match=message):
            from_hf(MIXTRAL | {"mistral_ms": {"format": 1, "moe": "all"}}, "c.json")

    def test_no_quantisation_is_fine(self):
        assert from_hf(MIXTRAL | {"quantization_config": None})[0].moe is not None

    @pytest.mark.parametrize(
        "key", [*sorted(set(SIZES) - {"num_key_value_heads"}), "num_local_experts"]
    )
    def test_a_missing_key(self, key):
        source = {k: v for k, v in MIXTRAL.items() if k != key}
        with pytest.raises(ConfigError, match=rf"missing key: c\.json: {key}: it has no default"):
            from_hf(source, "c.json")

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("hidden_act", "gelu"),
            ("is_causal", False),
            ("logits_scaling", 16.0),
            ("embedding_multiplier", 12.0),
            ("residual_multiplier", 0.22),
            ("attention_multiplier", 0.0078125),
            ("norm_topk_prob", False),
            ("partial_rotary_factor", 0.5),
            ("attn_logit_softcapping", 50.0),
            ("clip_qkv", 8),
            ("num_shared_experts", True),
            ("attention_bias", True),
            ("mlp_bias", True),
            ("router_jitter_noise", 0.1),
        ],
    )
    def test_other_mathematics(self, key, value):
        with pytest.raises(ConfigError, match=rf"unsupported value: c\.json: {key}: ") as caught:
            from_hf(MIXTRAL | {key: value}, "c.json")
        assert repr(value) in str(caught.value)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("rope_scaling", None),
            ("rope_scaling", {"rope_type": "default"}),
            ("rope_scaling", {"type": "default", "factor": None}),
            ("hidden_act", "silu"),
            ("hidden_act", "swish"),
            ("attention_bias", False),
            ("router_jitter_noise", 0.0),
            ("partial_rotary_factor", 1.0),
            ("is_causal", True),
            ("logits_scaling", 1.0),
            ("norm_topk_prob", True),
            ("attn_logit_softcapping", None),
            ("layer_types", ["full_attention"] * 4),
            ("architectures", ["MixtralForCausalLM"]),
            ("auto_map", {"AutoTokenizer": "tokenization.T"}),
        ],
    )
    def test_the_same_keys_with_the_value_we_implement(self, key, value):
        assert from_hf(MIXTRAL | {key: value}) == from_hf(MIXTRAL)

    def test_experts_in_a_dense_model(self):
        with pytest.raises(ConfigError, match=r"contradiction: c\.json: num_local_experts: 8"):
            from_hf(MISTRAL | {"num_local_experts": 8}, "c.json")

    def test_no_experts_in_a_dense_model(self):
        source = MISTRAL | {"num_local_experts": None, "num_experts_per_tok": 2}
        assert from_hf(source) == (from_hf(MISTRAL)[0], ("num_experts_per_tok",))

    @pytest.mark.parametrize("value", [None, False, 1.0, {"a": 1}])
    def test_a_key_that_nobody_knows(self, value):
        message = rf"unsupported key: c\.json: latent_dim: {re.escape(repr(value))}: .*remove it"
        with pytest.raises(ConfigError, match=message):
            from_hf(MIXTRAL | {"latent_dim": value, "use_cache": True}, "c.json")

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"auto_map": {"AutoModelForCausalLM": "modeling_x.XForCausalLM"}},
                r"custom code: c\.json: auto_map: AutoModelForCausalLM -> modeling_x\.XFor",
            ),
            ({"auto_map": "x"}, r"wrong type: c\.json: auto_map: 'x'"),
            (
                {"architectures": ["MixtralYarnForCausalLM"]},
                r"unsupported architecture: c\.json: architectures: \['MixtralYarn",
            ),
        ],
    )
    def test_other_code(self, changes, message):
        with pytest.raises(ConfigError, match=message):
            from_hf(MIXTRAL | changes, "c.json")

    def test_inconsistent_values(self):
        with pytest.raises(ConfigError, match=r"c\.json: .*\(3\) must divide .*\(8\)"):
            from_hf(MIXTRAL | {"num_key_value_heads": 3}, "c.json")

    def test_ignored_keys_are_reported(self):
        _, ignored = from_hf(
            MIXTRAL | {"use_cache": True, "transformers_version": "4", "hidden_act": "silu"}
        )
        assert ignored == ("transformers_version", "use_cache")
