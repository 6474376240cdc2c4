"""Configurations of Hugging Face and Mistral, read, written, refused."""

import json

import pytest
from support.configs import HF_MISTRAL as MISTRAL
from support.configs import HF_MIXTRAL as MIXTRAL
from support.configs import SIZES, model
from support.hf import STACKED
from transformers import AutoConfig, MinistralConfig, MistralConfig, MixtralConfig

from mistral_ms.config import (
    GateSettings,
    from_hf,
    to_hf,
    to_native,
)
from mistral_ms.errors import ConfigError

# what decides the mathematics, the tensors, or the tokens
SEMANTICS = (
    *SIZES,
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "sliding_window",
    "tie_word_embeddings",
    "initializer_range",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "hidden_act",
)
MOE_SEMANTICS = ("num_local_experts", "num_experts_per_tok", "router_aux_loss_coef")

HF_CONFIGS = {
    "mixtral": MixtralConfig(**SIZES),
    "mixtral-other-values": MixtralConfig(
        **SIZES,
        num_local_experts=6,
        num_experts_per_tok=3,
        router_aux_loss_coef=0.02,
        sliding_window=4096,
        head_dim=24,
        tie_word_embeddings=True,
        rope_theta=5e5,
        rms_norm_eps=3e-6,
        initializer_range=0.01,
        max_position_embeddings=1234,
        bos_token_id=None,
        eos_token_id=[2, 7],
        pad_token_id=0,
        dtype="bfloat16",
    ),
    "mistral": MistralConfig(**SIZES),
    "mistral-no-window": MistralConfig(**SIZES, sliding_window=None, rope_theta=1e6),
    # transformers 5 does not take None
    "mistral-no-grouping": MistralConfig(
        **{**SIZES, "num_key_value_heads": SIZES["num_attention_heads"] if STACKED else None}
    ),
    "mistral-published-sizes": MistralConfig(),
    "mixtral-published-sizes": MixtralConfig(),
}


def value_of(config, key):
    """Of transformers' configuration; version 5 keeps theta elsewhere."""
    return config.rope_parameters[key] if STACKED and key == "rope_theta" else getattr(config, key)


def saved(config, directory):
    """config.json as transformers writes it."""
    config.save_pretrained(directory)
    return json.loads((directory / "config.json").read_text())


class TestHuggingFaceBothWays:
    @pytest.fixture(params=HF_CONFIGS)
    def theirs(self, request):
        return HF_CONFIGS[request.param]

    def test_every_value_is_read(self, theirs, tmp_path):
        config, ignored = from_hf(saved(theirs, tmp_path))
        for key in set(SEMANTICS) - {"hidden_act", "eos_token_id"}:
            assert getattr(config, key) == value_of(theirs, key), key
        ends = theirs.eos_token_id
        assert config.eos_token_ids == tuple(ends if isinstance(ends, list) else [ends])
        head_dim = theirs.head_dim or theirs.hidden_size // theirs.num_attention_heads
        assert config.head_size == head_dim
        assert (config.moe is not None) == (theirs.model_type == "mixtral")
        if config.moe is not None:
            for key in MOE_SEMANTICS:
                assert getattr(config.moe, key) == getattr(theirs, key), key
            assert config.moe.norm_topk_prob
            assert len(config.sparse_layers) == config.num_hidden_layers
        assert set(ignored) <= {
            "attention_dropout",
            "output_router_logits",
            "transformers_version",
            "use_cache",
        }

    def test_transformers_reads_what_we_write(self, theirs, tmp_path):
        config, _ = from_hf(saved(theirs, tmp_path / "theirs"))
        ours = tmp_path / "ours"
        ours.mkdir()
        (ours / "config.json").write_text(json.dumps(to_hf(config)))
        again = AutoConfig.from_pretrained(ours)
        assert type(again) is type(theirs)
        for key in SEMANTICS + (MOE_SEMANTICS if config.moe is not None else ()):
            assert value_of(again, key) == value_of(theirs, key), key
        assert again.head_dim == config.head_size
        assert again.architectures == [type(theirs).__name__.replace("Config", "ForCausalLM")]
        assert str(again.dtype) == f"torch.{config.torch_dtype}"

    def test_ours_is_a_fixed_point(self, theirs, tmp_path):
        config, _ = from_hf(saved(theirs, tmp_path))
        again, ignored = from_hf(json.loads(json.dumps(to_hf(config))))
        assert again == config.model_copy(update={"head_dim": config.head_size})
        assert ignored == ()


class TestAbsentKeysMeanWhatTransformersMeans:
    @pytest.mark.parametrize("family", ["mixtral", "mistral"])
    @pytest.mark.parametrize(
        "key",
        [
            "num_key_value_heads",
            "max_position_embeddings",
            "rms_norm_eps",
            "rope_theta",
            "sliding_window",
            "head_dim",
            "tie_word_embeddings",
            "initializer_range",
            "bos_token_id",
            "eos_token_id",
            "pad_token_id",
            "num_experts_per_tok",
            "router_aux_loss_coef",
            "dtype",
        ],
    )
    def test_one_key_left_out(self, family, key):
        config_class, moe = {
            "mixtral": (MixtralConfig, dict(num_local_experts=8)),
            "mistral": (MistralConfig, {}),
        }[family]
        other = config_class(
            **SIZES, **moe, sliding_window=9, rope_theta=7.0, rms_norm_eps=0.5, dtype="float16"
        ).to_dict()
        other.pop(key, None)
        theirs = config_class(**other)
        found, wanted = from_hf(other)[0], from_hf(theirs.to_dict())[0]
        if STACKED:  # which may write it out
            found, wanted = (
                each.model_copy(update={"head_dim": each.head_size}) for each in (found, wanted)
            )
        assert found == wanted

    def test_no_window_and_no_word_about_it_differ_for_mistral(self):
        """MistralConfig's default is 4096: published files that mean none say null."""
        assert from_hf(MISTRAL)[0].sliding_window == 4096
        assert from_hf(MISTRAL | {"sliding_window": None})[0].sliding_window is None
        assert from_hf(MIXTRAL)[0].sliding_window is None
        assert from_hf(MIXTRAL | {"sliding_window": 4096})[0].sliding_window == 4096

    def test_no_key_value_heads_means_no_grouping(self):
        assert from_hf(MIXTRAL | {"num_key_value_heads": None})[0].num_key_value_heads == 8


class TestTransformers5:
    def test_theta_and_dtype_have_moved(self):
        source = MIXTRAL | {
            "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"},
            "dtype": "float16",
        }
        config, ignored = from_hf(source)
        assert (config.rope_theta, config.torch_dtype) == (5e5, "float16")
        assert ignored == ()

    def test_the_source_is_left_alone(self):
        source = MIXTRAL | {"rope_parameters": {"rope_theta": 5e5}, "dtype": "float16"}
        before = json.dumps(source)
        from_hf(source)
        assert json.dumps(source) == before

    @pytest.mark.parametrize(
        ("rope", "message"),
        [
            (
                {"partial_rotary_factor": 0.5},
                r"unsupported value: c\.json: rope_parameters: partial_rotary_factor: 0\.5",
            ),
            (
                {"rope_type": "default", "mrope_section": [16]},
                r"unsupported key: c\.json: rope_parameters: mrope_section: \[16\]",
            ),
            ({"rope_type": "longrope", "factor": 4.0}, r"c\.json: rope_scaling\.rope_type: 'long"),
            ({"type": "linear"}, r"invalid configuration: c\.json: rope_scaling\.factor"),
            (
                {"rope_type": "yarn", "type": "linear", "factor": 2.0},
                r"contradiction: c\.json: rope_parameters\.type: 'linear': rope_type is 'yarn'",
            ),
        ],
    )
    def test_other_angles_are_refused(self, rope, message):
        with pytest.raises(ConfigError, match=message):
            from_hf(MIXTRAL | {"rope_parameters": rope}, "c.json")

    @pytest.mark.parametrize(
        ("key", "value"),
        [("rope_theta", 1e4), ("rope_scaling", {"rope_type": "linear", "factor": 3.0})],
    )
    def test_two_words_on_the_same_angles(self, key, value):
        rope = {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}
        with pytest.raises(ConfigError, match=r"contradiction: c\.json: rope_parameters"):
            from_hf(MIXTRAL | {"rope_parameters": rope, key: value}, "c.json")

    def test_the_experts_of_qwen3(self):
        """Which version 5 calls as Mixtral's."""
        qwen = SIZES | dict(model_type="qwen3_moe", num_experts=16, head_dim=8)
        config, ignored = from_hf(qwen)
        newer = {k: v for k, v in qwen.items() if k != "num_experts"} | {"num_local_experts": 16}
        assert from_hf(newer) == (config, ignored)
        assert config.moe.num_local_experts == 16
        with pytest.raises(
            ConfigError, match=r"contradiction: c\.json: num_local_experts: 8: num_"
        ):
            from_hf(qwen | {"num_local_experts": 8}, "c.json")


ALTERNATING = ["full_attention", "sliding_attention"] * 2


class TestLayerTypes:
    @pytest.mark.parametrize("kind", ["mistral", "ministral"])
    def test_alternating_windows(self, kind, tmp_path):
        source = MISTRAL | {"model_type": kind, "layer_types": ALTERNATING, "sliding_window": 9}
        config, ignored = from_hf(source)
        assert [config.window_of(i) for i in range(4)] == [None, 9, None, 9]
        assert (config.windows, ignored) == ((None, 9), ())
        (tmp_path / "config.json").write_text(json.dumps(to_hf(config)))
        theirs = AutoConfig.from_pretrained(tmp_path)
        assert isinstance(theirs, MinistralConfig)
        assert (theirs.layer_types, theirs.sliding_window) == (ALTERNATING, 9)
        assert from_hf(saved(theirs, tmp_path))[0] == from_hf(to_hf(config))[0]

    @pytest.mark.parametrize(
        ("word", "window"), [("full_attention", None), ("sliding_attention", 9)]
    )
    def test_the_same_in_every_layer(self, word, window):
        config, _ = from_hf(MISTRAL | {"layer_types": [word] * 4, "sliding_window": 9})
        assert (config.sliding_window, config.layer_types) == (window, None)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"layer_types": ALTERNATING[:3]}, "layer_types has 3 entries"),
            ({"layer_types": ALTERNATING, "sliding_window": None}, "sliding_window must be given"),
            ({"layer_types": ["chunked_attention", *ALTERNATING[1:]]}, r"layer_types\.0: 'chunked"),
            ({"layer_types": "full_attention"}, "wrong type: .*layer_types"),
            ({"layer_types": [1, 2, 3, 4]}, "wrong type: .*layer_types"),
            ({"layer_types": ["sliding_attention"] * 4, "sliding_window": None}, "sliding_window"),
        ],
    )
    def test_refused(self, changes, message):
        with pytest.raises(ConfigError, match=message):
            from_hf(MISTRAL | {"sliding_window": 9} | changes, "c.json")

    def test_transformers_mixtral_has_one_window(self):
        """It would ignore the key: what it computes is what the file means there."""
        source = MIXTRAL | {"layer_types": ALTERNATING, "sliding_window": 9}
        with pytest.raises(ConfigError, match=r"contradiction: c\.json: layer_types"):
            from_hf(source, "c.json")
        with pytest.raises(ConfigError, match=r"not expressible.*one sliding window"):
            to_hf(model(layer_types=ALTERNATING, sliding_window=9))


# config.json of published models, as their repositories have it; sizes are beside the point
PUBLISHED = {
    "Mixtral-8x7B-v0.1": {
        "architectures": ["MixtralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 32768,
        "model_type": "mixtral",
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.36.0.dev0",
        "use_cache": True,
    },
    "an unsloth derivative of Mistral 7B v0.3": {
        "_name_or_path": "unsloth/mistral-7b-v0.3",
        "architectures": ["MistralForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "head_dim": 128,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "pad_token_id": 770,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.44.2",
        "unsloth_version": "2024.9",
        "use_cache": True,
    },
    "a derivative with Llama's keys": {
        "architectures": ["MistralForCausalLM"],
        "attention_bias": False,
        "max_position_embeddings": 32768,
        "mlp_bias": False,
        "model_type": "mistral",
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "sliding_window": 4096,
        "use_cache": False,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_are_read(name):
    config, ignored = from_hf(SIZES | PUBLISHED[name])
    assert config.max_position_embeddings == 32768
    assert "use_cache" in ignored


@pytest.mark.parametrize("kind", [MistralConfig, MixtralConfig, MinistralConfig])
def test_everything_that_transformers_can_write_is_known(kind):
    """to_dict() holds every attribute, not only what save_pretrained finds worth saying."""
    source = json.loads(json.dumps(kind(**SIZES).to_dict()))
    config, ignored = from_hf(source)
    assert config.hidden_size == SIZES["hidden_size"]
    assert (config.layer_types, config.rope_scaling) == (None, None)
    assert set(ignored) < set(source)


class TestNative:
    @pytest.mark.parametrize(
        "moe",
        [
            None,
            {},
            dict(sparse_layers="every_other"),
            dict(sparse_layers=(3, 0)),
            dict(sparse_layers={"first_k_dense_replace": 1}, moe_intermediate_size=24),
            dict(
                n_shared_experts=1, shared_expert_intermediate_size=9, shared_expert_gate="sigmoid"
            ),
            dict(norm_topk_prob=False, num_experts_per_tok=1),
        ],
    )
    @pytest.mark.parametrize("windows", [{}, dict(layer_types=ALTERNATING, sliding_window=5)])
    def test_says_what_hugging_faces_keys_cannot(self, moe, windows):
        config = model(moe=moe, head_dim=24, **windows)
        again, _ = from_hf(json.loads(json.dumps(to_native(config))))
        assert again == config

    def test_transformers_can_still_read_it(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps(to_native(model())))
        assert AutoConfig.from_pretrained(tmp_path).num_local_experts == 8

    def test_an_unknown_key_in_our_block_is_an_error(self):
        with pytest.raises(ConfigError, match=r"unknown key: c\.json: expert_groups"):
            from_hf(MIXTRAL | {"mistral_ms": {"format": 1, "expert_groups": 2}}, "c.json")

    @pytest.mark.parametrize(
        ("moe", "message"),
        [
            (dict(sparse_layers=(1,)), r"sparse_layers: \[1\]: .* experts in each of the 4 layers"),
            (dict(norm_topk_prob=False), r"norm_topk_prob: False: .* normalises the weights"),
            (dict(n_shared_experts=1), r"n_shared_experts: 1: .* no such experts"),
            (dict(gate=GateSettings(name="other")), r"gate: other: .* has the gate softmax_top_k"),
        ],
        ids=["mixed", "raw-weights", "shared", "gate"],
    )
    def test_hugging_face_cannot_express_it(self, moe, message):
        rule = rf"not expressible in Hugging Face's format: model\.moe\.{message}"
        with pytest.raises(ConfigError, match=rule):
            to_hf(model(moe=moe))
