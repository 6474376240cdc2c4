"""What makes two configurations one model: its mathematics and shapes, however they are stored."""

import pytest
from support import configs

from mistral_ms.config.computation import check_same_model, computation
from mistral_ms.config.moe import SHAPE_KEYS
from mistral_ms.errors import ConfigError

HERE = {"num_attention_heads": 4, "moe": {}}


@pytest.mark.parametrize(
    "words",
    [
        {"head_dim": configs.model(**HERE).head_size},
        {"initializer_range": 0.5, "eos_token_id": None, "torch_dtype": "float32"},
        {"moe": {"sparse_layers": "all", "router_aux_loss_coef": 0.3}},
        {"moe": {"sparse_layers": {"decoder_sparse_step": 1}, "moe_intermediate_size": 96}},
    ],
)
def test_the_same_in_other_words(words):
    check_same_model(configs.model(**HERE), configs.model(**{**HERE, **words}), "C", "agree")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_theta", 9999.0),  # of these three no shape tells
        ("sliding_window", 8),
        ("moe", {"num_experts_per_tok": 1}),
        ("intermediate_size", 48),
        ("moe", {"moe_intermediate_size": 48}),
        ("moe", {"n_shared_experts": 1}),
    ],
)
def test_another_model_is_named_with_key_values_and_what_to_do(key, value):
    ours = configs.model(**HERE)
    with pytest.raises(ConfigError, match=f"^checkpoint of another model: model.{key}: ") as caught:
        check_same_model(ours, configs.model(**{**HERE, key: value}), "C", "agree")
    assert str(caught.value).endswith(": agree")
    assert ": C has " in str(caught.value)


def test_shared_experts_are_one_feed_forward_however_they_are_counted():
    two, one = (
        configs.model(moe={"n_shared_experts": n, "shared_expert_intermediate_size": width})
        for n, width in ((2, None), (1, 192))
    )
    check_same_model(two, one, "C", "agree")


def test_of_mixtral_nothing_new_is_said():
    """Checkpoints of trainings keep it, and compare it key by key."""
    assert not set(computation(configs.model())["moe"]) & set(SHAPE_KEYS)
