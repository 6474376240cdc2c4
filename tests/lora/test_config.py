"""Which matrices have adapters: PEFT's rule, its configuration, and what is refused by name."""

import pytest

from mistral_ms.checkpoint import keys
from mistral_ms.config import (
    LoraConfig,
    ModelConfig,
    RunConfig,
    from_hf,
    spelled_out,
    to_hf,
    to_native,
)
from mistral_ms.config.base import validate
from mistral_ms.config.computation import computation
from mistral_ms.config.peft import from_peft, to_peft
from mistral_ms.errors import ConfigError
from mistral_ms.weights import ADAPTABLE, specs, stored_specs

SIZES = dict(
    vocab_size=48, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2,
)  # fmt: skip
MOE = dict(num_local_experts=4, sparse_layers=(1,))


def model(targets, moe=MOE, **lora):
    return ModelConfig(**SIZES, moe=moe, lora={"r": 2, "target_modules": targets, **lora})


def adapted(config):
    """The matrices that have adapters."""
    return {spec.adapts for spec in stored_specs(config)}


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (["q_proj"], {"layers.0.attention.q_proj.weight", "layers.1.attention.q_proj.weight"}),
        (["model.layers.1.self_attn.q_proj"], {"layers.1.attention.q_proj.weight"}),
        (["up_proj", "w1"], {"layers.0.feed_forward.w3.weight", "layers.1.moe.experts.w1"}),
        (["gate"], {"layers.1.moe.router.weight"}),  # not gate_proj, of the dense layer
        (r".*\.0\..*(down|gate)_proj", {f"layers.0.feed_forward.w{n}.weight" for n in (1, 2)}),
        (r".*experts\.\d+\.w2", {"layers.1.moe.experts.w2"}),
    ],
)
def test_targets(targets, found):
    assert adapted(model(targets)) == found


def test_all_linear_less_what_is_excluded():
    everything = adapted(model("all-linear"))
    assert len(everything) == 4 + 3 + 4 + 4  # attention and dense; attention, router and experts
    assert everything - adapted(model("all-linear", exclude_modules=["gate"])) == {
        "layers.1.moe.router.weight"
    }


def test_names_are_those_of_checkpoints():
    """Modules that adapters are named after are those that Hugging Face's files have weights of."""
    for name, each in ADAPTABLE.items():
        stored = keys.HF[f"layers.{{layer}}.{name}"].name
        assert stored == f"model.layers.{{layer}}.{each.module}.weight"


def test_everything_else_is_frozen():
    """And the parameters of an adapter are divided as its matrix: rows divide B, columns A."""
    found = {spec.name: spec for spec in specs(model("all-linear", use_dora=True))}
    for spec in found.values():
        assert spec.kind == ("trained" if spec.adapts else "frozen")
    cuts = {name: {(c.by, c.axis) for c in spec.divide} for name, spec in found.items()}
    shapes = {name: spec.shape for name, spec in found.items()}
    rows, columns = "layers.1.moe.experts.w1_linear", "layers.1.moe.experts.w2_linear"
    assert shapes[f"{rows}.lora_A"] == (4, 2, 16)
    assert shapes[f"{rows}.lora_B"] == (4, 24, 2)
    assert shapes[f"{columns}.lora_magnitude"] == (4, 16)
    assert cuts[f"{rows}.lora_A"] == {("ep", 0)}
    assert cuts[f"{rows}.lora_B"] == {("ep", 0), ("mp", 1)}
    assert cuts[f"{columns}.lora_A"] == {("ep", 0), ("mp", 2)}
    assert cuts[f"{columns}.lora_B"] == {("ep", 0)}
    partial = {name for name, spec in found.items() if spec.partial_gradient}
    assert {f"{rows}.lora_A", f"{columns}.lora_B"} <= partial
    assert not {f"{rows}.lora_B", f"{columns}.lora_A"} & partial


def test_scaling():
    lora = LoraConfig(r=16, lora_alpha=8, target_modules=["q_proj"])
    assert lora.scaling == 0.5
    assert lora.model_copy(update={"use_rslora": True}).scaling == 2.0


@pytest.mark.parametrize(
    ("targets", "more", "message"),
    [
        (["q_porj"], {}, r"lora\.target_modules: q_porj: .*nearest names: q_proj"),
        (["q_proj", "lm_head"], {}, r"lora\.target_modules: lm_head: .*embedding and head have no"),
        (r".*kv_proj", {}, r"lora\.target_modules: \.\*kv_proj"),
        (["q_proj"], {"exclude_modules": ["w9"]}, r"lora\.exclude_modules: w9"),
        (["q_proj"], {"exclude_modules": ["q_proj"]}, r"no adapters: lora\.exclude_modules"),
        (r".*experts\.[01]\.w1", {}, r"experts\.0\.w1, not .*experts\.2\.w1: all experts"),
        (["gate"], {"gate": "noisy_top_k"}, r"block_sparse_moe\.gate with the gate noisy_top_k"),
    ],
)
def test_impossible_targets(targets, more, message):
    gate = more.pop("gate", None)
    moe = MOE if gate is None else {**MOE, "gate": gate}
    if gate is not None:
        import mistral_ms.moe  # noqa: F401 - registers the gates
    with pytest.raises(ConfigError, match=message):
        specs(model(targets, moe, **more))


def test_other_families_are_refused():
    """Their modules have other names."""
    moe = dict(num_local_experts=4, moe_intermediate_size=8)
    config = ModelConfig(**SIZES, head_dim=4, qk_norm="head", moe=moe)
    assert to_hf(config)["model_type"] == "qwen3_moe"
    changed = config.model_copy(update={"lora": LoraConfig(target_modules=["q_proj"])})
    with pytest.raises(ConfigError, match="lora: a model of the type qwen3_moe"):
        specs(changed)


GIVEN = {
    "peft_type": "LORA", "r": 4, "lora_alpha": 16, "target_modules": ["w1", "q_proj"],
    "bias": "none", "task_type": "CAUSAL_LM", "lora_dropout": 0.1, "rank_pattern": {},
    "modules_to_save": None, "peft_version": "0.21.2", "a_key_of_later_versions": None,
}  # fmt: skip
RUN = {
    "model": {**SIZES, "moe": MOE},
    "training": {"max_steps": 1, "seq_length": 8, "global_batch_size": 8},
    "lora": {"r": 2, "target_modules": ["q_proj"]},
}


class TestPeftsConfiguration:
    def test_both_ways(self):
        lora = from_peft(GIVEN, "file")
        assert lora == LoraConfig(
            r=4, lora_alpha=16, target_modules=("q_proj", "w1"), lora_dropout=0.1
        )
        assert from_peft(to_peft(lora), "file") == lora

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("peft_type", "IA3"), ("bias", "all"), ("modules_to_save", ["lm_head"]),
            ("rank_pattern", {"q_proj": 8}), ("alpha_pattern", {"q_proj": 8}),
            ("layers_to_transform", [0]), ("fan_in_fan_out", True), ("lora_bias", True),
            ("target_parameters", ["mlp.experts.gate_proj"]), ("init_lora_weights", "pissa"),
            ("a_key_of_later_versions", 3), ("r", 0), ("target_modules", []),
        ],
    )  # fmt: skip
    def test_no_key_is_ignored_that_changes_the_result(self, key, value):
        with pytest.raises(ConfigError, match=f"file: {key}"):
            from_peft({**GIVEN, key: value}, "file")

    @pytest.mark.parametrize("key", ["peft_type", "target_modules"])
    def test_missing_keys(self, key):
        given = {name: value for name, value in GIVEN.items() if name != key}
        with pytest.raises(ConfigError, match=f"missing key: file: {key}"):
            from_peft(given, "file")


class TestRuns:
    def test_the_model_of_a_run_has_its_adapters(self):
        import yaml

        run = validate(RunConfig, RUN, "run")
        assert run.model.lora == run.lora == LoraConfig(r=2, target_modules=("q_proj",))
        again = yaml.safe_load(spelled_out(run))
        assert "lora" not in again["model"]
        assert validate(RunConfig, again, "run") == run

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"lora": {"r": 2}}, r"lora\.target_modules"),
            ({"lora": {"rank": 2, "target_modules": ["q_proj"]}}, r"lora\.rank"),
            ({"lora": {"target_modules": ["q_proj"], "lora_dropout": 0.1}}, r"lora\.lora_dropout"),
            ({"lora": {"target_modules": "("}}, r"lora\.target_modules.*no regular expression"),
            (
                {
                    "lora": {"target_modules": ["q_proj"], "use_dora": True},
                    "parallel": {"mp": 2},
                },
                r"lora\.use_dora needs parallel\.mp of 1",
            ),
        ],
    )
    def test_refused(self, change, message):
        with pytest.raises(ConfigError, match=message):
            validate(RunConfig, RUN | change, "run")


def test_our_configuration_file_keeps_them():
    config = model("all-linear", use_dora=True)
    found, _ = from_hf(to_native(config), "config.json")
    assert computation(found) == computation(config)
    assert found.lora == config.lora
    with pytest.raises(ConfigError, match=r"model\.lora: DoRA.*an adapter is a change"):
        to_hf(config)
