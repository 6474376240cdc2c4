"""Every file of configs/ loads, and the published models are the published models."""

from pathlib import Path

import pytest

from mistral_ms.checkpoint import our_shapes
from mistral_ms.config import load_any_config, load_model_config, load_run_config, read_yaml, to_hf

CONFIGS = Path(__file__).parents[2] / "configs"
MODELS = sorted((CONFIGS / "model").glob("*.yaml"))
RUNS = sorted((CONFIGS / "run").glob("*.yaml"))


def model(name):
    return load_model_config(CONFIGS / "model" / f"{name}.yaml")


def parameters(config, experts=None):
    """Counted by hand; ``experts`` per layer, all when None."""
    hidden, heads = config.hidden_size, config.num_attention_heads * config.head_size
    keys = config.num_key_value_heads * config.head_size
    layer = 2 * hidden * heads + 2 * hidden * keys + 2 * hidden
    feed_forward = 3 * hidden * config.intermediate_size
    if config.moe is not None:
        each = feed_forward
        feed_forward = (experts or config.moe.num_local_experts) * each
        feed_forward += hidden * config.moe.num_local_experts
    head = 0 if config.tie_word_embeddings else config.vocab_size * hidden
    total = config.num_hidden_layers * (layer + feed_forward)
    return total + config.vocab_size * hidden + head + hidden


def test_all_expected_files_are_there():
    assert {path.stem for path in MODELS} >= {
        "mistral_7b_v0.1",
        "mistral_7b_v0.3",
        "mixtral_8x7b",
        "mixtral_8x22b",
        "mistral_tiny",
        "mixtral_tiny",
    }
    assert {path.stem for path in RUNS} >= {"demo", "pretrain_mixtral_tiny_200ep"}


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_model_files_load_and_can_be_exported(path):
    config = load_model_config(path)
    assert to_hf(config)["vocab_size"] == config.vocab_size


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.stem)
def test_run_files_load(path):
    # a file for finetuning takes the model of the checkpoint that is named beside it
    takes_any_model = "model" not in read_yaml(path)
    overrides = [f"model={CONFIGS}/model/mixtral_tiny.yaml"] if takes_any_model else []
    run = load_any_config(path, overrides)
    if path.stem.startswith("predict_"):
        assert run.prediction.chunk <= run.prediction.max_length
    else:
        assert (run.training.max_steps or run.training.num_train_epochs) > 0


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_checkpoints_hold_as_many_numbers_as_counted_by_hand(path):
    config = load_model_config(path)
    stored = 0
    for shape in our_shapes(config).values():
        size = 1
        for length in shape:
            size *= length
        stored += size
    assert stored == parameters(config)


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("mistral_7b_v0.1", 7_241_732_096),
        ("mistral_7b_v0.3", 7_248_023_552),
        ("mixtral_8x7b", 46_702_792_704),
        ("mixtral_8x22b", 140_620_634_112),
    ],
)
def test_published_parameter_counts(name, published):
    assert parameters(model(name)) == published


@pytest.mark.parametrize(
    ("name", "billions", "digits"), [("mixtral_8x7b", 12.9, 1), ("mixtral_8x22b", 39, 0)]
)
def test_published_active_parameters(name, billions, digits):
    config = model(name)
    active = parameters(config, experts=config.moe.num_experts_per_tok)
    assert round(active / 1e9, digits) == billions


def test_what_distinguishes_the_published_models():
    assert model("mistral_7b_v0.1").sliding_window == 4096
    assert model("mistral_7b_v0.1").rope_theta == 1e4
    assert model("mistral_7b_v0.3").sliding_window is None
    assert model("mistral_7b_v0.3").rope_theta == 1e6
    assert model("mixtral_8x7b").sliding_window is None
    assert model("mixtral_8x7b").rope_theta == 1e6
    assert model("mixtral_8x7b").head_size == 128
    assert model("mixtral_8x22b").max_position_embeddings == 65536


def test_the_demo_has_mixtrals_structure():
    run = load_run_config(CONFIGS / "run" / "demo.yaml")
    moe = run.model.moe
    assert (moe.num_local_experts, moe.num_experts_per_tok) == (8, 2)
    assert (run.routing.policy, run.routing.capacity_factor) == ("capacity", 1.1)
    assert (run.model.vocab_size, run.training.router_aux_loss_coef > 0) == (32000, True)
