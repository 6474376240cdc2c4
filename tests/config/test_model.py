"""The architecture: its rules, what it derives, and that nobody can change it."""

import pytest
from pydantic import ValidationError

from mistral_ms.config import ModelConfig, MoEArchitecture
from mistral_ms.config.base import Frozen, validate
from mistral_ms.errors import ConfigError

VALUES = dict(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
)
MOE = dict(num_local_experts=8)


def build(**changes) -> ModelConfig:
    return validate(ModelConfig, {**VALUES, **changes}, "model.yaml")


class TestDerived:
    def test_head_size(self):
        assert build().head_size == 8
        assert build(head_dim=24).head_size == 24

    def test_a_dense_model_has_no_sparse_layers(self):
        config = build()
        assert config.sparse_layers == ()
        assert not config.is_sparse(0)

    @pytest.mark.parametrize(
        ("pattern", "layers"),
        [
            ("all", (0, 1, 2, 3)),
            ("every_other", (1, 3)),
            ([2], (2,)),
            ([3, 0], (0, 3)),
            ((1, 2), (1, 2)),
            ({"first_k_dense_replace": 1}, (1, 2, 3)),
            ({"first_k_dense_replace": 1, "moe_layer_freq": 2}, (2,)),
            ({"moe_layer_freq": 2}, (0, 2)),
            ({"decoder_sparse_step": 2}, (1, 3)),
            ({"decoder_sparse_step": 3, "mlp_only_layers": []}, (2,)),
            ({"mlp_only_layers": [0, 2]}, (1, 3)),
        ],
    )
    def test_sparse_patterns(self, pattern, layers):
        config = build(moe=MOE | {"sparse_layers": pattern})
        assert config.sparse_layers == layers
        assert [config.is_sparse(i) for i in range(4)] == [i in layers for i in range(4)]

    def test_widths_of_experts(self):
        """HF's DeepSeek has one feed-forward for all shared experts, Qwen2-MoE says its width."""
        plain = build(moe=MOE)
        assert (plain.expert_size, plain.shared_expert_size) == (96, 0)
        fine = MOE | {"moe_intermediate_size": 24, "n_shared_experts": 2}
        assert (build(moe=fine).expert_size, build(moe=fine).shared_expert_size) == (24, 48)
        qwen = fine | {"shared_expert_intermediate_size": 40}
        assert build(moe=qwen).shared_expert_size == 40
        assert (build().expert_size, build().shared_expert_size) == (96, 0)
        assert build(moe=fine).moe.added == (
            ("moe_intermediate_size", 24),
            ("n_shared_experts", 2),
        )
        assert plain.moe.added == ()

    def test_every_layer_is_sparse_by_default(self):
        assert build(moe=MOE).sparse_layers == (0, 1, 2, 3)

    @pytest.mark.parametrize(
        ("ids", "all_ids"), [(2, (2,)), ([2, 7], (2, 7)), (None, ()), (0, (0,))]
    )
    def test_end_tokens(self, ids, all_ids):
        assert build(eos_token_id=ids).eos_token_ids == all_ids


class TestFrozen:
    def test_no_value_can_be_set(self):
        config = build(moe=MOE)
        with pytest.raises(ValidationError, match="frozen"):
            config.vocab_size = 1
        with pytest.raises(ValidationError, match="frozen"):
            config.moe.num_local_experts = 1

    def test_equal_configurations_are_equal_and_hashable(self):
        assert build(moe=MOE) == build(moe=MOE)
        assert len({build(moe=MOE), build(moe=MOE), build()}) == 2


class TestErrors:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (dict(num_key_value_heads=3), r"num_key_value_heads \(3\) must divide .*\(8\)"),
            (dict(hidden_size=60), r"num_attention_heads \(8\) must divide hidden_size \(60\)"),
            (dict(head_dim=9), r"head_dim \(9\) must be even"),
            (dict(hidden_size=72), r"head_dim \(9\) must be even"),
            (dict(moe=dict(num_local_experts=2, num_experts_per_tok=3)), r"must not exceed"),
            (dict(moe=MOE | {"sparse_layers": [4]}), r"distinct layer indices between 0 and 3"),
            (dict(moe=MOE | {"sparse_layers": [-1]}), r"distinct layer indices"),
            (dict(moe=MOE | {"sparse_layers": [1, 1]}), r"distinct layer indices"),
            (dict(moe=MOE | {"sparse_layers": []}), r"at least one"),
            (dict(moe=MOE | {"sparse_layers": "some"}), r"sparse_layers"),
            (
                dict(num_hidden_layers=1, moe=MOE | {"sparse_layers": "every_other"}),
                r"none of the 1",
            ),
            (
                dict(moe=MOE | {"sparse_layers": {"first_k_dense_replace": 4}}),
                r"leaves none of the 4",
            ),
            (
                dict(moe=MOE | {"sparse_layers": {"moe_layer_freq": 2, "decoder_sparse_step": 2}}),
                r"moe_layer_freq \(2\) and decoder_sparse_step \(2\) both say how often",
            ),
            (
                dict(moe=MOE | {"sparse_layers": {"first_k_dense": 1}}),
                r"sparse_layers.*first_k_dense",
            ),
            (
                dict(moe=MOE | {"shared_expert_gate": "sigmoid"}),
                r"shared_expert_gate \(sigmoid\) needs n_shared_experts",
            ),
            (
                dict(moe=MOE | {"shared_expert_intermediate_size": 8}),
                r"shared_expert_intermediate_size \(8\) needs n_shared_experts",
            ),
            (
                dict(moe=MOE | {"moe_intermediate_size": 1 << 20, "n_shared_experts": 17}),
                r"shared experts' width \(17825792\) must not exceed",
            ),
            (dict(vocab_size=0), r"vocab_size: 0: .*greater than or equal to 1"),
            (dict(rms_norm_eps=0), r"rms_norm_eps: 0: .*greater than 0"),
            (dict(sliding_window=0), r"sliding_window: 0"),
            (dict(head_dim=0), r"head_dim: 0"),
            (dict(torch_dtype="float64"), r"torch_dtype: 'float64'"),
            (dict(num_hidden_layers=2.5), r"num_hidden_layers: 2.5"),
            (dict(vocab_size="many"), r"vocab_size: 'many'"),
        ],
    )
    def test_name_the_place_the_value_and_the_rule(self, changes, message):
        with pytest.raises(ConfigError, match=r"invalid configuration: model\.yaml.*" + message):
            build(**changes)

    def test_a_missing_key_is_named(self):
        values = {k: v for k, v in VALUES.items() if k != "hidden_size"}
        with pytest.raises(ConfigError, match=r"model\.yaml: hidden_size: .*required"):
            validate(ModelConfig, values, "model.yaml")

    def test_an_unknown_key_names_the_known_ones(self):
        with pytest.raises(
            ConfigError,
            match=r"unknown key: model\.yaml: hidden_dim: 5: .*known keys: .*hidden_size",
        ):
            build(hidden_dim=5)

    def test_an_unknown_key_of_a_group_names_the_groups_keys(self):
        with pytest.raises(ConfigError, match=r"moe\.experts: 8: .*num_local_experts") as caught:
            build(moe=MOE | {"experts": 8})
        assert "hidden_size" not in str(caught.value)

    def test_an_unknown_key_two_groups_down(self):
        class Inner(Frozen):
            depth: int = 0

        class Middle(Frozen):
            inner: Inner = Inner()

        class Outer(Frozen):
            middle: Middle | None = None

        with pytest.raises(ConfigError, match=r"middle\.inner\.dept: 1: .*known keys: depth$"):
            validate(Outer, {"middle": {"inner": {"dept": 1}}}, "x")


def test_defaults_are_those_of_mixtral():
    config = build(moe=MOE)
    assert (config.rope_theta, config.rms_norm_eps, config.max_position_embeddings) == (
        1e6,
        1e-5,
        32768,
    )
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, None)
    assert config.sliding_window is None
    assert not config.tie_word_embeddings
    assert config.moe == MoEArchitecture(
        num_local_experts=8,
        num_experts_per_tok=2,
        sparse_layers="all",
        norm_topk_prob=True,
        router_aux_loss_coef=0.001,
    )


class TestPlausible:
    """Sizes that nothing could be built of are refused before anything is."""

    @pytest.mark.parametrize(
        ("changes", "key"),
        [
            ({"num_hidden_layers": 50_000_000}, "num_hidden_layers"),
            ({"moe": {"num_local_experts": 50_000_000}}, "moe.num_local_experts"),
            ({"vocab_size": 10**30}, "vocab_size"),
            ({"max_position_embeddings": 2**31}, "max_position_embeddings"),
            ({"rope_theta": float("inf")}, "rope_theta"),
            ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ],
    )
    def test_a_size_without_measure_is_named(self, changes, key):
        with pytest.raises(ConfigError, match=rf"model\.yaml: {key}: "):
            build(**changes)

    def test_experts_of_all_layers_are_counted(self):
        sizes = {"num_hidden_layers": 1024, "moe": {"num_local_experts": 4096}}
        with pytest.raises(ConfigError, match=r"\(4096\) times num_hidden_layers \(1024\)"):
            build(**sizes)

    def test_the_largest_published_sizes_are_fine(self):
        assert build(num_hidden_layers=15, moe={"num_local_experts": 2048}).moe is not None


class Group(Frozen):
    entries: tuple[MoEArchitecture, ...]


def test_an_unknown_key_inside_of_a_list_is_named_with_those_that_are_known():
    with pytest.raises(
        ConfigError,
        match=r"unknown key: x: entries\.0\.experts: .*known keys: .*gate, .*norm_topk_prob",
    ):
        validate(Group, {"entries": [{"num_local_experts": 2, "experts": 3}]}, "x")
