"""Specifications as data: what they refuse, and what whole models have."""

import pytest
from support.configs import model

from mistral_ms.checkpoint.keys import HF
from mistral_ms.checkpoint.layout import format_layout
from mistral_ms.config import LayerKinds, from_hf, to_hf, to_mistral, to_native
from mistral_ms.config.computation import check_same_model, computation
from mistral_ms.errors import CheckpointError, ConfigError, WeightError
from mistral_ms.weights import (
    Cut,
    ParamSpec,
    by_name,
    check_parameters,
    layer_specs,
    register_layer,
    specs,
)

CUSTOM = model(layer_kinds=LayerKinds(attention="no such attention"))


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"axes": ("H",)}, "every axis has a name"),
        ({"shape": (8, 0)}, "a length of at least 1"),
        ({"divide": (Cut("mp", 0, 8), Cut("mp", 1, 4))}, "each kind of parallelism divides one"),
        ({"divide": (Cut("ep", 0, 8), Cut("mp", 0, 8))}, "each axis is divided once"),
        ({"divide": (Cut("mp", 2, 1),)}, r"an axis of whole units \(axis 2, 1\)"),
        ({"divide": (Cut("mp", 0, 3),)}, r"an axis of whole units \(axis 0, 3\)"),
        ({"divide": (Cut("ep", 1, 4),)}, "divides the first axis, expert by expert"),
        ({"divide": (Cut("ep", 0, 4),)}, "divides the first axis, expert by expert"),
        ({"divide": (Cut("mp", 0, 8),), "partial_gradient": True}, "a gradient is partial where"),
    ],
)
def test_impossible_parameters(changes, rule):
    message = rf"impossible parameter: a\.weight: .* = \[.*\]: .*{rule}"
    with pytest.raises(WeightError, match=message):
        ParamSpec(**{"name": "a.weight", "axes": ("E", "H"), "shape": (8, 4), **changes})


def test_names_modules_and_kinds_of_a_model():
    found = by_name(specs(model(num_hidden_layers=12, moe={"sparse_layers": (11,)})))
    assert found["embed_tokens.weight"].module == "embedding"
    assert {found[name].module for name in ("norm.weight", "lm_head.weight")} == {"head"}
    expert = found["layers.11.moe.experts.w2"]
    assert (expert.module, expert.pattern) == (11, "layers.{layer}.moe.experts.w2")
    assert found["norm.weight"].pattern == "norm.weight"
    assert "layers.11.feed_forward.w1.weight" not in found
    # vectors scale: they start at one and do not decay
    for spec in found.values():
        expected = ("ones", False) if len(spec.shape) == 1 else ("normal", True)
        assert (spec.init, spec.decay) == expected, spec.name
        assert spec.kind == "trained"


def test_a_tied_head_has_no_parameter():
    assert "lm_head.weight" not in by_name(specs(model(tie_word_embeddings=True)))


def test_kinds_that_nobody_has_registered():
    with pytest.raises(WeightError, match=r"unknown layer kind: .*: no such attention: known: att"):
        specs(CUSTOM)
    with pytest.raises(WeightError, match="layer kind given twice: moe: "):
        register_layer("moe")(lambda config: ())
    assert layer_specs("feed_forward", model())[0].name == "w1.weight"


def test_parameters_are_compared_by_name_and_shape():
    check_parameters({"a": (1,)}, {"a": (1,)})
    with pytest.raises(WeightError, match="weight without a specification: b: declare it beside"):
        check_parameters({"a": (1,), "b": (2,)}, {"a": (1,)})
    with pytest.raises(WeightError, match=r"specification without a weight: b: \[2\]"):
        check_parameters({"a": (1,)}, {"a": (1,), "b": (2,)})
    with pytest.raises(WeightError, match=r"weight of another shape: a: \[2\]: .* says \[1\]"):
        check_parameters({"a": (2,)}, {"a": (1,)})


def test_a_weight_that_a_format_has_no_name_for():
    table = {name: stored for name, stored in HF.items() if name != "norm.weight"}
    with pytest.raises(CheckpointError, match=r"weight without a name: norm.weight: the format"):
        format_layout(model(), table)


def test_kinds_in_configurations():
    """Our own files keep them, the formats of others cannot, and another kind is another model."""
    assert from_hf(to_native(CUSTOM))[0] == CUSTOM.model_copy(update={"head_dim": 8})
    assert "layer_kinds" not in to_native(model())["mistral_ms"]
    for write in (to_hf, to_mistral):
        with pytest.raises(
            ConfigError, match=r"model\.layer_kinds: no such attention, feed_forward"
        ):
            write(CUSTOM)
    assert computation(model())["layer_kinds"] is None
    with pytest.raises(ConfigError, match=r"another model: model.layer_kinds: C has"):
        check_same_model(model(), CUSTOM, "C", "agree")
