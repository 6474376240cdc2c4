"""Mistral's params.json, read, written, refused."""

import json

import pytest
from support.configs import model

from mistral_ms.config import GateSettings, from_mistral, to_mistral
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
ALTERNATING = ("full_attention", "sliding_attention") * 2
DENSE_PARAMS = {k: v for k, v in MIXTRAL_PARAMS.items() if k != "moe"}


class TestMistral:
    def test_assumed_positions_are_said(self, caplog):
        assert from_mistral(MIXTRAL_PARAMS, "p.json")[0].max_position_embeddings == 32768
        assert "p.json does not state max_seq_len: 32768 positions are assumed" in caplog.text
        caplog.clear()
        stated, _ = from_mistral(MIXTRAL_PARAMS | {"max_seq_len": 65536})
        assert stated.max_position_embeddings == 65536
        assert not caplog.records

    def test_mixtral(self):
        config, _ = from_mistral(MIXTRAL_PARAMS)
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
        config, _ = from_mistral(DENSE_PARAMS | {"sliding_window": 4096})
        assert (config.rope_theta, config.sliding_window, config.moe) == (1e4, 4096, None)

    @pytest.mark.parametrize("window", [None, 4096])
    def test_a_theta_that_is_stated_counts(self, window):
        source = DENSE_PARAMS | {"rope_theta": 5e5, "sliding_window": window}
        assert from_mistral(source)[0].rope_theta == 5e5

    def test_the_source_is_left_alone(self):
        before = json.dumps(MIXTRAL_PARAMS)
        from_mistral(MIXTRAL_PARAMS)
        assert json.dumps(MIXTRAL_PARAMS) == before

    @pytest.mark.parametrize(
        ("changes", "ignored"),
        [
            ({"model_type": "transformer", "lora": None, "moe": None, "max_batch_size": 0}, 1),
            ({"lora": {"enable": False, "rank": 0, "dropout": 0.0, "scaling": 2.0}}, 0),
            ({"yarn": None, "quantization": None, "vision_encoder": None}, 0),
            ({"tied_embeddings": False, "use_biases": False, "activation": "silu"}, 0),
            ({"dtype": "bfloat16"}, 1),
            ({"sliding_window": [None]}, 0),
        ],
    )
    def test_neutral_values(self, changes, ignored):
        source = DENSE_PARAMS | {"rope_theta": 1e6}
        config, keys = from_mistral(source | changes)
        assert config == from_mistral(source)[0]
        assert len(keys) == ignored
        assert set(keys) <= set(changes)

    def test_the_length_that_vllm_reads(self, caplog):
        source = DENSE_PARAMS | {"max_position_embeddings": 131072}
        assert from_mistral(source)[0].max_position_embeddings == 131072
        config, ignored = from_mistral(source | {"max_seq_len": 4096})
        assert (config.max_position_embeddings, ignored) == (131072, ("max_seq_len",))
        assert not caplog.records

    @pytest.mark.parametrize("key", ["sliding_window", "_sliding_window"])
    def test_a_pattern_of_windows_repeats(self, key):
        config, _ = from_mistral(DENSE_PARAMS | {key: [None, 64, 64, 64]})
        assert [config.window_of(i) for i in range(6)] == [None, 64, 64, 64, None, 64]
        assert from_mistral(DENSE_PARAMS | {key: [64, 64]})[0].layer_types is None

    def test_keys_of_a_parallel_run_of_experts(self):
        moe = MIXTRAL_PARAMS["moe"] | {"expert_parallel": 1, "routed_scale": 1.0}
        config, ignored = from_mistral(MIXTRAL_PARAMS | {"moe": moe})
        assert (config, ignored) == (from_mistral(MIXTRAL_PARAMS)[0], ("moe.expert_parallel",))

    @pytest.mark.parametrize(
        "config",
        [
            model(torch_dtype="bfloat16", head_dim=24),
            model(moe=None, sliding_window=9, rope_theta=1e4, head_dim=8),
            model(moe=dict(num_experts_per_tok=3), max_position_embeddings=77, head_dim=8),
            model(layer_types=ALTERNATING, sliding_window=9, head_dim=8),
        ],
        ids=["mixtral", "mistral", "other-values", "alternating-windows"],
    )
    def test_both_ways(self, config):
        assert from_mistral(json.loads(json.dumps(to_mistral(config)))) == (config, ())

    def test_a_derived_head_dim_is_written_out(self):
        assert to_mistral(model())["head_dim"] == 8

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"use_biases": True}, r"unsupported value: p\.json: use_biases: True"),
            ({"vision_encoder": {}}, r"unsupported value: p\.json: vision_encoder: {}"),
            ({"yarn": {"factor": 16}}, r"unsupported value: p\.json: yarn: {'factor': 16}"),
            ({"lora": {"enable": True}}, r"unsupported value: p\.json: lora"),
            ({"tied_embeddings": True}, r"unsupported value: p\.json: tied_embeddings: True"),
            ({"model_type": "mamba"}, r"unsupported value: p\.json: model_type: 'mamba'"),
            ({"latent": None}, r"unsupported key: p\.json: latent: None: .*known keys: dim"),
            ({"sliding_window": [4, 8]}, r"p\.json: sliding_window: \[4, 8\]: all layers with"),
            ({"sliding_window": [4, None, 4]}, r"p\.json: sliding_window: .* must divide n_lay"),
            ({"sliding_window": 3, "_sliding_window": 4}, r"contradiction: p\.json: _sliding"),
            ({"dim": None}, r"p\.json: hidden_size: None"),
            ({"moe": {"num_experts_per_tok": 2}}, r"missing key: p\.json: moe: num_experts"),
            ({"moe": {}}, r"missing key: p\.json: moe: num_experts"),
            ({"moe": 3}, r"wrong type: p\.json: moe: 3: must be an object"),
            ({"moe": "num_experts"}, r"wrong type: p\.json: moe: 'num_experts': must be"),
            (
                {"moe": {"num_experts": 8, "num_shared_experts": 1}},
                r"unsupported value: p\.json: moe: num_shared_experts: 1",
            ),
            (
                {"moe": {"num_experts": 8, "gate": 1}},
                r"unsupported key: p\.json: moe: gate: 1: .*num_experts, num_experts_per_tok",
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
            (model(tie_word_embeddings=True), r"model\.tie_word_embeddings: True: "),
            (
                model(rope_scaling=dict(rope_type="linear", factor=2)),
                r"\.rope_scaling: linear: ",
            ),
            (model(moe=dict(sparse_layers=(1,))), r"model\.moe\.sparse_layers: \[1\]: all layers"),
            (model(moe=dict(norm_topk_prob=False)), r"model\.moe\.norm_topk_prob: False: "),
            (model(moe=dict(moe_intermediate_size=8)), r"model\.moe\.moe_intermediate_size: 8: "),
            (
                model(moe=dict(gate=GateSettings(name="other"))),
                r"model\.moe\.gate: other: .* it is softmax_top_k",
            ),
        ],
        ids=["tied", "scaled", "mixed", "raw-weights", "fine-grained", "gate"],
    )
    def test_what_the_format_cannot_express(self, config, reason):
        with pytest.raises(ConfigError, match=rf"not expressible in Mistral's format.*{reason}"):
            to_mistral(config)
