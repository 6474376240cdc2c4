"""What a configuration says of a gate."""

import subprocess
import sys

import pytest
from support.configs import model as small_model

from mistral_ms.config import (
    GateSettings,
    ModelConfig,
    SoftmaxTopKSettings,
    from_hf,
    register_gate_settings,
    to_hf,
    to_mistral,
    to_native,
)
from mistral_ms.config.base import validate
from mistral_ms.config.computation import computation
from mistral_ms.errors import ConfigError


class ToySettings(GateSettings):
    name: str = "toy"
    warmth: float = 1.0


register_gate_settings("toy", ToySettings)


def with_gate(gate):
    values = small_model().model_dump()
    values["moe"]["gate"] = gate
    return validate(ModelConfig, values, "file")


def test_a_name_or_a_name_with_settings():
    assert with_gate("softmax_top_k").moe.gate == SoftmaxTopKSettings()
    assert small_model().moe.gate.default
    assert with_gate("toy").moe.gate == ToySettings(warmth=1.0)
    config = with_gate({"name": "toy", "warmth": 2})
    assert config.moe.gate == ToySettings(warmth=2.0)
    assert not config.moe.gate.default
    assert validate(ModelConfig, config.model_dump(mode="json"), "file") == config


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        ("softmax_topk", r"moe\.gate.*unknown gate 'softmax_topk': perhaps softmax_top_k; known:"),
        ({"name": "toy", "warmht": 2}, r"unknown key: perhaps warmth; known: name, warmth"),
        ({"name": "toy", "warmth": "much"}, r"moe\.gate.*warmth: Input should be a valid number"),
        ({"warmth": 2}, r"moe\.gate.*give the gate's name"),
        (3, r"moe\.gate.*give the gate's name"),
    ],
)
def test_what_is_wrong_is_named(gate, message):
    with pytest.raises(ConfigError, match=message):
        with_gate(gate)


def test_checkpoints_keep_it_and_other_formats_refuse_it():
    plain, other = small_model(), with_gate({"name": "toy", "warmth": 2})
    assert "gate" not in to_native(plain)["mistral_ms"]["moe"]
    assert "gate" not in computation(plain)["moe"]
    assert from_hf(to_native(other), "file")[0].moe == other.moe
    for convert in (to_hf, to_mistral):
        with pytest.raises(ConfigError, match=r"model\.moe\.gate: toy: "):
            convert(other)


def test_names_are_found_without_an_import(tmp_path):
    """Gates that ship, and those of an installed package; nobody imports MindSpore before."""
    (tmp_path / "warm_gate.py").write_text(
        "from mistral_ms.config import GateSettings, register_gate_settings\n"
        "class Warm(GateSettings):\n"
        "    name: str = 'warm'\n"
        "register_gate_settings('warm', Warm)\n"
    )
    installed = tmp_path / "warm_gate-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: warm-gate\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text("[mistral_ms.extensions]\nwarm = warm_gate\n")
    code = (
        "import sys\n"
        f"sys.path.append({str(tmp_path)!r})\n"
        "from mistral_ms.config import when_unknown\n"
        "from mistral_ms.config.gates import gate_settings\n"
        "from mistral_ms.shipped import import_shipped\n"
        "when_unknown(import_shipped)\n"
        "gate_settings('softmax_top_k')\n"
        "assert 'mindspore' not in sys.modules\n"
        "assert gate_settings('sigmoid_top_k').bias_update_rate == 0.001\n"
        "assert gate_settings('warm').name == 'warm'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
