"""``rope_scaling`` of configurations: what Hugging Face and Mistral say, in every form."""

import json

import pytest
from config.test_hugging_face import MISTRAL, MIXTRAL, saved
from transformers import AutoConfig

from mistral_ms.config import from_hf, to_hf
from mistral_ms.errors import ConfigError

SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16.0,
        "truncate": False,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


class TestRopeScaling:
    @pytest.mark.parametrize("kind", SCALINGS)
    def test_both_forms_and_back(self, kind, tmp_path):
        scaling = SCALINGS[kind]
        config, ignored = from_hf(MIXTRAL | {"rope_scaling": scaling})
        assert config.rope_scaling.settings() == scaling
        older = {"type" if k == "rope_type" else k: v for k, v in scaling.items()}
        assert from_hf(MIXTRAL | {"rope_scaling": older}) == (config, ignored)
        newer = MIXTRAL | {"rope_parameters": {"rope_theta": 1e6, **scaling}}
        assert from_hf(newer) == (config, ignored)
        (tmp_path / "config.json").write_text(json.dumps(to_hf(config)))
        theirs = AutoConfig.from_pretrained(tmp_path)
        assert theirs.rope_scaling.items() >= scaling.items()  # theta, too, with transformers 5
        assert from_hf(saved(theirs, tmp_path))[0].rope_scaling == config.rope_scaling

    def test_a_key_without_effect_is_reported(self):
        scaling = {"type": "yarn", "factor": 16.0, "finetuned": True}
        assert from_hf(MISTRAL | {"rope_scaling": scaling})[1] == ("rope_scaling.finetuned",)

    @pytest.mark.parametrize(
        ("scaling", "message"),
        [
            ({"rope_type": "su", "factor": 2.0}, r"rope_scaling\.rope_type: 'su'"),
            ({"rope_type": "linear", "factor": 0.5}, r"rope_scaling\.factor: 0\.5"),
            ({"rope_type": "linear", "factor": 2.0, "beta_fast": 3.0}, "beta_fast is no setting"),
            ({"rope_type": "yarn", "factor": 2.0, "ramp": 3.0}, r"unknown key: .*ramp"),
            ({"rope_type": "yarn", "factor": 2.0, "beta_slow": 40}, "beta_fast .* below"),
            ({"rope_type": "llama3", "factor": 2.0}, "llama3 needs high_freq_factor"),
            (SCALINGS["llama3"] | {"low_freq_factor": 4.0}, "must exceed low_freq_factor"),
            (SCALINGS["dynamic"] | {"original_max_position_embeddings": 5}, "must equal max_pos"),
            ("linear", "wrong type: c.json: rope_scaling"),
        ],
    )
    def test_refused(self, scaling, message):
        with pytest.raises(ConfigError, match=message):
            from_hf(MIXTRAL | {"rope_scaling": scaling}, "c.json")

    @pytest.mark.parametrize(
        ("scaling", "longest"),
        [
            (None, 100),
            (SCALINGS["linear"], 400),
            (SCALINGS["dynamic"], 200),
            (SCALINGS["yarn"], 256),
            ({"rope_type": "yarn", "factor": 4.0}, 400),
            ({"rope_type": "llama3", **SCALINGS["llama3"], "factor": 1.5}, 100),
        ],
    )
    def test_the_longest_sequence(self, scaling, longest):
        source = MIXTRAL | {"rope_scaling": scaling, "max_position_embeddings": 100}
        assert from_hf(source)[0].longest_sequence == longest
