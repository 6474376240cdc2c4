"""Mistral's params.json, read, written, refused."""

import json

import pytest
from support.configs import model

from mistral_ms.config import from_mistral, to_mistral
from mistral_ms.errors import ConfigError

MIXTRAL_PARAMS = {  # params.json of Mixtral-8x7B-v0.1
    "dim": 4096,
    "n_layers": 32,
    "head_dim": 128,
    "hidden_dim": 14336,
    "n_heads": 32,
    "n_kv_heads": 8,
    "norm_eps": 1e-05,
    "vocab_size": 32000,
    "moe": {"num_experts_per_tok": 2, "num_experts": 8},
}
DENSE_PARAMS = {k: v for k, v in MIXTRAL_PARAMS.items() if k != "moe"}


class TestMistral:
    def test_assumed_positions_are_said(self, caplog):
        assert from_mistral(MIXTRAL_PARAMS, "p.json").max_position_embeddings == 32768
        assert "p.json does not state max_seq_len: 32768 positions are assumed" in caplog.text
        caplog.clear()
        stated = from_mistral(MIXTRAL_PARAMS | {"max_seq_len": 65536})
        assert stated.max_position_embeddings == 65536
        assert not caplog.records

    def test_mixtral(self):
        config = from_mistral(MIXTRAL_PARAMS)
        assert (config.hidden_size, config.intermediate_size, config.head_size) == (
            4096,
            14336,
            128,
        )
        assert (config.num_attention_heads, config.num_key_value_heads) == (32, 8)
        assert (config.num_hidden_layers, config.vocab_size, config.rms_norm_eps) == (
            32,
            32000,
            1e-5,
        )
        assert (config.moe.num_local_experts, config.moe.num_experts_per_tok) == (8, 2)
        assert (config.rope_theta, config.sliding_window) == (1e6, None)
        assert config.max_position_embeddings == 32768

    def test_experts_at_the_top_level(self):
        flat = DENSE_PARAMS | {"num_experts": 8, "num_experts_per_tok": 2}
        assert from_mistral(flat) == from_mistral(MIXTRAL_PARAMS)

    def test_a_window_without_a_theta_means_the_first_release(self):
        config = from_mistral(DENSE_PARAMS | {"sliding_window": 4096})
        assert (config.rope_theta, config.sliding_window, config.moe) == (1e4, 4096, None)

    @pytest.mark.parametrize("window", [None, 4096])
    def test_a_theta_that_is_stated_counts(self, window):
        source = DENSE_PARAMS | {"rope_theta": 5e5, "sliding_window": window}
        assert from_mistral(source).rope_theta == 5e5

    def test_the_source_is_left_alone(self):
        before = json.dumps(MIXTRAL_PARAMS)
        from_mistral(MIXTRAL_PARAMS)
        assert json.dumps(MIXTRAL_PARAMS) == before

    @pytest.mark.parametrize(
        "config",
        [
            model(torch_dtype="bfloat16", head_dim=24),
            model(moe=None, sliding_window=9, rope_theta=1e4, head_dim=8),
            model(moe=dict(num_experts_per_tok=3), max_position_embeddings=77, head_dim=8),
        ],
        ids=["mixtral", "mistral", "other-values"],
    )
    def test_both_ways(self, config):
        assert from_mistral(json.loads(json.dumps(to_mistral(config)))) == config

    def test_a_derived_head_dim_is_written_out(self):
        assert to_mistral(model())["head_dim"] == 8

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"use_biases": True}, r"unsupported key: p\.json: use_biases"),
            ({"vision_encoder": {}}, r"unsupported key: p\.json: vision_encoder: known keys: dim"),
            ({"dim": None}, r"p\.json: hidden_size: None"),
            ({"moe": {"num_experts_per_tok": 2}}, r"missing key: p\.json: moe: num_experts"),
            ({"moe": {}}, r"missing key: p\.json: moe: num_experts"),
            ({"moe": 3}, r"wrong type: p\.json: moe: 3: must be an object"),
            ({"moe": "num_experts"}, r"wrong type: p\.json: moe: 'num_experts': must be"),
            (
                {"moe": {"num_experts": 8, "num_shared_experts": 1}},
                r"unsupported key: p\.json: moe\.num_shared_experts: "
                r"known keys: num_experts, num_experts_per_tok$",
            ),
            ({"n_kv_heads": 5}, r"p\.json: .*must divide"),
        ],
    )
    def test_errors(self, changes, message):
        with pytest.raises(ConfigError, match=message):
            from_mistral(MIXTRAL_PARAMS | changes, "p.json")

    @pytest.mark.parametrize(
        "key", ["dim", "n_layers", "hidden_dim", "n_heads", "n_kv_heads", "norm_eps"]
    )
    def test_a_missing_key(self, key):
        source = {k: v for k, v in MIXTRAL_PARAMS.items() if k != key}
        with pytest.raises(ConfigError, match=rf"missing key: p\.json: {key}"):
            from_mistral(source, "p.json")

    @pytest.mark.parametrize(
        ("config", "reason"),
        [
            (model(tie_word_embeddings=True), "tied head"),
            (model(moe=dict(sparse_layers=(1,))), "dense and sparse layers mixed"),
            (model(moe=dict(norm_topk_prob=False)), "un-normalised top-k weights"),
        ],
        ids=["tied", "mixed", "raw-weights"],
    )
    def test_what_the_format_cannot_express(self, config, reason):
        with pytest.raises(ConfigError, match=rf"not expressible in Mistral's format.*{reason}"):
            to_mistral(config)
